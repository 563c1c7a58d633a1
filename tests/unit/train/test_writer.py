"""A save is told to the ranks whatever the console does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_synth.parallel import engine


class Letters(dict[str, Any]):
    """A mailbox in which nothing is waited for."""

    def put(self, name: str, value: Any) -> None:
        self[name] = value

    def get(self, name: str) -> Any:
        return self[name]


def nobody_reads(*_: object) -> None:
    raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("error", [None, "disk full"])
def test_a_console_that_is_gone_is_raised_after_the_ranks_have_heard(
    error: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.load()  # before anything of megatron-core
    from megatron_synth.train.checkpoint.writer import CheckpointWriter, SaveFailed, SaveRequest, _Report

    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    writer = CheckpointWriter.__new__(CheckpointWriter)  # without process groups
    letters = Letters()
    writer.__dict__ |= {"_root": tmp_path, "_attempt": "a", "_rank": 0, "_world_size": 1, "_mailbox": letters}
    writer.__dict__ |= {"_thread": None, "_saves": 1, "_untold": None}
    monkeypatch.setattr(writer, "_write_own", lambda *_: _Report([], {}, error))
    monkeypatch.setattr(writer, "_commit", lambda *_: tmp_path / "step_00000001")
    state: Any = type("State", (), {"pieces": [], "objects": {}, "common": {}})()
    writer._work(state, [], None, SaveRequest(1, {}, nobody_reads, nobody_reads), "1", "")
    assert bool(letters["1/end"]) == bool(error)
    with pytest.raises(SaveFailed if error else BrokenPipeError):
        writer.outcome()
    if error:
        with pytest.raises(BrokenPipeError):
            writer.begin(lambda: state, SaveRequest(2, {}, nobody_reads, nobody_reads))
    else:
        writer.outcome()
