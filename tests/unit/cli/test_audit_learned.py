"""Which samples the audit of learned tokens counts: all but those of steps that were skipped."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_synth.cli import audit_learned as audit
from megatron_synth.cli.audit_learned import Recorded, skipped_ranges
from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.data.loading.recount import learned_labels
from megatron_synth.data.loading.run_data import open_data
from megatron_synth.train.record import metrics
from tests.support import SEQUENCE_LENGTH, with_masks, write_config, write_corpus, write_source


def records_of(skipped: list[int], tokens: int = 8 * SEQUENCE_LENGTH) -> list[metrics.Record]:
    """Steps of 8 samples, and of each how many were skipped since the first."""
    return [
        {metrics.STEP: step, metrics.TOKENS: step * tokens, metrics.SKIPPED: count}
        for step, count in enumerate(skipped, start=1)
    ]


def test_the_records_tell_which_samples_were_skipped() -> None:
    assert skipped_ranges(records_of([0, 1, 1, 2, 3]), SEQUENCE_LENGTH) == [(8, 16), (24, 32), (32, 40)]
    trunk: Any = SimpleNamespace(samples=4, skipped=1)
    assert skipped_ranges(records_of([1, 2]), SEQUENCE_LENGTH, trunk) == [(8, 16)]
    assert skipped_ranges([{metrics.STEP: 1, metrics.TOKENS: 8}], SEQUENCE_LENGTH) is None


def test_learned_tokens_of_skipped_steps_are_not_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    folder = with_masks(write_source(tmp_path / "web", 0, 2_500), 0)
    config = load_file(Config, write_config(tmp_path / "plain.yaml", corpus), [f"data.sources.web.path={folder}"])
    data, records = open_data(config), records_of([0, 1, 1, 2, 2])

    def labels(*ranges: tuple[int, int]) -> dict[str, int]:
        found = learned_labels(data.plan, data.sources, ranges, SEQUENCE_LENGTH, eod_mask_loss=False)
        return dict(zip(data.plan.names, found.tolist(), strict=True))

    counted = labels((0, 8), (16, 24), (32, 40))
    plain = np.zeros(2, np.int64)
    for sample in [*range(8), *range(16, 24), *range(32, 40)]:  # one by one
        [[source_id], [window], [offset]] = (part.tolist() for part in data.plan.places([sample]))
        learned = np.ones(SEQUENCE_LENGTH, np.bool_)
        if data.sources[source_id].masked:
            data.sources[source_id].read_learned(window * SEQUENCE_LENGTH + offset + 1, learned)
        plain[source_id] += int(learned.sum())
    assert counted == dict(zip(data.plan.names, plain.tolist(), strict=True)) != labels((0, 40))

    def found(samples: int, told: dict[str, int], earlier: Any = None, trunk: Any = None) -> list[Any]:
        return audit.audit_learned(config, data, [Recorded("x", samples, told, earlier, False)], records, trunk)

    assert found(40, counted) == [] and found(16, labels((0, 8))) == []
    assert [one[:3] for one in found(40, labels((0, 40)))] == [("x", name, "learned") for name in data.plan.names]
    earlier = {"samples": 24, "sources": {"web": 7}}
    assert found(40, {**labels((32, 40)), "web": labels((32, 40))["web"] + 7}, earlier) == []
    # what was counted before belongs to a source of the run, whatever the sums say
    unknown = {"samples": 40, "sources": {"web": 7, "lost": 1}}
    assert found(40, {"web": 7}, unknown) == [("x", "lost", "learned", "1", "0")]
    capsys.readouterr()
    # a number beyond the records is not counted to, nor is a trunk of which nobody knows what it skipped
    assert found(10**15, counted) == [] and "metrics.jsonl ends before" in capsys.readouterr().out
    trunk = SimpleNamespace(samples=4, skipped=1)
    assert found(40, counted, None, trunk) == [] and "steps of the trunk were skipped" in capsys.readouterr().out
