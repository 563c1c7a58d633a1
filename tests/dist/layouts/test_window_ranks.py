"""Several windows of several sources in a sequence: the same run in every layout, and the run that it should be."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_synth.train.record import metrics
from tests.dist.conftest import Run, Train
from tests.dist.pool import RankPool
from tests.support import GLOBAL_BATCH_SIZE, RATIOS, SEQUENCE_LENGTH, STEPS, assert_same_losses, read_metrics, rewound

NUMBER = 4
WINDOWS = (f"data.windows_per_sequence={NUMBER}", "data.sources.web.shift_windows=true")
MASKS = ("data.document_masks=true", "data.eod_mask_loss=true")


@pytest.mark.parametrize("layout", ["dp2", "tp2pp2"])
def test_every_layout_is_the_same_run(layout: str, trained: Callable[..., Run]) -> None:
    reference, run = trained("single", *WINDOWS), trained(layout, *WINDOWS)
    assert_same_losses(run.records, reference.records, 1e-5)
    assert run.ledger == reference.ledger
    assert run.ledger["samples"] == STEPS * GLOBAL_BATCH_SIZE * NUMBER
    assert run.ledger["tokens"] == STEPS * GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH
    assert {name: source["ratio"] for name, source in run.ledger["sources"].items()} == RATIOS


def test_resumed_and_audited(ranks: RankPool, train: Train, trained: Callable[..., Run], tmp_path: Path) -> None:
    reference = trained("tp2pp2", *WINDOWS)
    run = rewound(reference.path, tmp_path / "run", 10)
    train(run, "tp2pp2", *WINDOWS)
    assert_same_losses(read_metrics(run), reference.records, 0)
    (audit,) = ranks.run(1, "megatron_synth.cli.main.main", ["mix", "audit", str(run)])
    assert audit.value == 0, audit.stdout + audit.stderr
    again = rewound(reference.path, tmp_path / "again", 10)
    (result,) = train(again, "single", *WINDOWS[1:], f"train.sequence_length={SEQUENCE_LENGTH // NUMBER}", code=2)
    assert "the mixture differs" in result.stderr


def test_masked_windows_are_sequences_of_their_own(trained: Callable[..., Run]) -> None:
    """With attention within documents a sequence of four windows is four short ones: same labels, same losses by source."""
    short = (f"train.sequence_length={SEQUENCE_LENGTH // NUMBER}", f"train.global_batch_size={GLOBAL_BATCH_SIZE * NUMBER}")
    reference, run = trained("single", *short, *WINDOWS[1:], *MASKS), trained("dp2", *WINDOWS, *MASKS)
    for ours, expected in zip(run.records, reference.records, strict=True):
        for name in (metrics.LOSS, metrics.GRAD_NORM, *(metrics.SOURCE_LOSS + source for source in RATIOS)):
            assert math.isclose(ours[name], expected[name], rel_tol=1e-5), (ours["step"], name)
        for name in metrics.parts(expected, "data/"):
            assert ours["data/" + name] == expected["data/" + name]
    assert run.ledger == reference.ledger
