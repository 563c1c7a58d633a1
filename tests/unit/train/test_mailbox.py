"""Messages between ranks through a store that a stranger can write to."""

from __future__ import annotations

import os
import pickle
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_synth.cluster import agent
from megatron_synth.train.checkpoint import mailbox
from megatron_synth.train.checkpoint.format.index import Entry
from megatron_synth.train.checkpoint.mailbox import Mailbox


@pytest.fixture
def store() -> Iterator[Any]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.distributed_c10d._get_default_store()
    torch.distributed.destroy_process_group()


def _got(box: Mailbox, name: str, then: Any) -> Any:
    """What arrives under a name, if `then` is done after the mailbox has been looked into."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(box.get(name)), daemon=True)
    thread.start()
    thread.join(0.2)
    assert not found
    then()
    thread.join(20)
    return found[0]


class _Call:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_what_a_stranger_leaves_is_passed_over(store: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    box = Mailbox("a")
    content = pickle.dumps(_Call(tmp_path / "ran"))
    for forged in (content, zlib.compress(content), b"\0" * 32 + zlib.compress(b'{"files": {}}'), b"", b"x"):
        store.set("mail/a/1/1", forged)
        assert _got(box, "1/1", lambda: box.put("1/1", {"files": {"a": 1}})) == {"files": {"a": 1}}
    assert not (tmp_path / "ran").exists()
    assert capsys.readouterr().out.count("passed over") == 1


def test_a_message_cannot_be_shown_again_elsewhere(store: Any) -> None:
    box = Mailbox("a")
    box.put("1/end", "")
    store.set("mail/a/2/end", store.get("mail/a/1/end"))
    assert _got(box, "2/end", lambda: box.put("2/end", "disk full")) == "disk full"
    later = Mailbox("b")
    store.set("mail/b/1/end", store.get("mail/a/1/end"))
    assert _got(later, "1/end", lambda: later.put("1/end", "no")) == "no"


def test_the_launcher_s_secret_counts(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert agent._SECRET == mailbox.SECRET
    monkeypatch.setattr(mailbox.secrets, "token_bytes", lambda size: b"t" * size)
    keys = []
    for word in ("", "one", "two", "two"):
        monkeypatch.setenv(mailbox.SECRET, word)
        keys.append(mailbox._shared_key())
    assert len(set(keys)) == 3 and keys[2] == keys[3]


def test_another_secret_on_one_rank_is_an_error(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def receive(sent: torch.Tensor, src: int) -> None:
        sent[-1] += 1  # of rank 0, which has another one

    monkeypatch.setattr(torch.distributed, "broadcast", receive)
    with pytest.raises(mailbox.RankError, match=f"{mailbox.SECRET}: this rank was handed another one"):
        Mailbox("a")


def test_reports_travel_as_plain_values() -> None:
    pytest.importorskip("megatron.core")
    from megatron_synth.parallel import cpu

    if not torch.cuda.is_available():
        cpu.prepare()
    from megatron_synth.train.checkpoint.files import FileInfo
    from megatron_synth.train.checkpoint.writer import _Report

    entries = [
        Entry("a", (4, 8), (1, 0), (3, 8), torch.bfloat16, "__1_0.distcp", 64, 48),
        Entry("b/shard_0_1", None, (), (), None, "__1_0.distcp", 0, 64),
    ]
    report = _Report(entries, {"__1_0.distcp": FileInfo(112, "0" * 16)}, None)
    assert _Report.from_json(report.to_json()) == report
