"""A batch ramp is the same run as one that was stopped and went on with a larger batch, exactly in samples and ledger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_synth.train.record import metrics
from tests.dist.conftest import Run, Train
from tests.dist.pool import RankPool
from tests.support import GLOBAL_BATCH_SIZE, SEQUENCE_LENGTH, STEPS, assert_same_losses, read_ledger, read_metrics, rewound

HALF, SMALL = STEPS // 2, GLOBAL_BATCH_SIZE // 2
RAMP = f"train.batch_ramp=[{{steps: {HALF}, global_batch_size: {SMALL}}}]"


def test_a_ramp_is_a_change_of_batch_size(
    trained: Callable[..., Run], train: Train, ranks: RankPool, config: Path, tmp_path: Path
) -> None:
    run = trained("single", RAMP)
    by_hand = rewound(trained("single", f"train.global_batch_size={SMALL}").path, tmp_path / "by-hand", HALF)
    train(by_hand, "single")
    assert_same_losses(run.records, read_metrics(by_hand), 0)
    assert run.ledger == read_ledger(by_hand)
    tokens = [record[metrics.TOKENS] for record in run.records]
    expected = [min(n, HALF) * SMALL + max(n - HALF, 0) * GLOBAL_BATCH_SIZE for n in range(1, STEPS + 1)]
    assert tokens == [sequences * SEQUENCE_LENGTH for sequences in expected]

    # resumed where the stage ends, by other ranks; and again from amid the second stage
    again = rewound(run.path, tmp_path / "again", HALF)
    train(again, "dp2", RAMP)
    assert_same_losses(read_metrics(again), run.records, 1e-5)
    assert read_ledger(again) == run.ledger
    (shown,) = ranks.run(1, "megatron_synth.cli.main.main", ["mix", "show", str(config), str(HALF * SMALL), RAMP])
    assert shown.value == 0 and f"step {HALF + 1} of {STEPS}, now {GLOBAL_BATCH_SIZE} sequences a step" in shown.stdout
