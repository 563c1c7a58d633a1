"""A step whose loss or gradient is not finite changes no weight on any rank; too many in a row end the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dist.conftest import Run, Train
from tests.dist.pool import RankPool
from tests.support import GLOBAL_BATCH_SIZE, LAYOUTS, STEPS, assert_same_losses, checkpoint_names, read_ledger, read_metrics

POISONED = 6


def _arguments(config: Path, run: Path, layout: str, *settings: str) -> list[str]:
    return ["train", str(config), *LAYOUTS[layout][1], *settings, "--run-dir", str(run)]


@pytest.mark.parametrize(
    ("layout", "what", "target"),
    [
        ("single", "loss", 0),
        ("tp2pp2", "gradient", 1),
        ("dp2", "loss", 1),
        ("dp2-plain", "gradient", 1),
        ("dp2-overlap-both", "loss", 0),
    ],
)
def test_a_step_that_is_not_finite_is_skipped_on_every_rank(
    layout: str, what: str, target: int, ranks: RankPool, config: Path, trained: Callable[..., Run], tmp_path: Path
) -> None:
    world_size, steps = LAYOUTS[layout][0], 9
    settings = ("optim.schedule=constant", "eval.interval=null", "checkpoint.interval=null")
    results = ranks.run(
        world_size,
        "tests.dist.jobs.train_poisoned",
        _arguments(config, tmp_path / "run", layout, *settings, f"train.steps={steps}"),
        what,
        target,
        [POISONED],
    )
    for result in results:
        code, digests = result.value
        assert code == 0, results[0].stdout + results[0].stderr
        # digests[0] is of the initial weights, digests[s] of those after step s
        assert [step for step in range(1, steps + 1) if digests[step] == digests[step - 1]] == [POISONED]
    records = read_metrics(tmp_path / "run")
    assert [record["optim/skipped"] for record in records] == [0] * (POISONED - 1) + [1] * (steps - POISONED + 1)
    for record in records:
        finite = math.isfinite(record["train/loss"]) and math.isfinite(record["optim/grad_norm"])
        assert finite is (record["step"] != POISONED)
    # a skipped step has consumed its samples
    assert read_ledger(tmp_path / "run")["samples"] == steps * 8
    reference = trained("single", *settings).records
    without_eval = [{k: v for k, v in record.items() if not k.startswith("eval/")} for record in records]
    assert_same_losses(without_eval[: POISONED - 1], reference[: POISONED - 1], 1e-5)
    assert records[-1]["train/loss"] < records[0]["train/loss"]


def test_too_many_in_a_row_end_the_run_and_leave_the_last_checkpoint(
    ranks: RankPool, config: Path, train: Train, trained: Callable[..., Run], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    results = ranks.run(
        2,
        "tests.dist.jobs.train_poisoned",
        _arguments(config, run, "dp2", "train.max_consecutive_skips=3"),
        "loss",
        1,
        [5, 6, 12, 13, 14],  # two in a row, separated from the next by good steps, are not three
    )
    assert [result.value[0] for result in results] == [1, 1]
    assert [result.stderr.count("error:") for result in results] == [1, 0]
    message = results[0].stderr
    assert "3 steps in a row" in message and "train.max_consecutive_skips" in message and str(run) in message
    assert [record["step"] for record in read_metrics(run)] == list(range(1, 15))
    assert read_metrics(run)[-1]["optim/skipped"] == 5
    assert checkpoint_names(run) == ["step_00000010"]
    train(run, "dp2", "train.max_consecutive_skips=3")
    records = read_metrics(run)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["optim/skipped"] for record in records[10:]] == [2] * (STEPS - 10)
    assert all(math.isfinite(record["train/loss"]) for record in records[10:])
    ledger = read_ledger(run)
    assert ledger.pop("unlearned")["samples"] == 2 * GLOBAL_BATCH_SIZE  # of the two that the checkpoint is after
    assert ledger == trained("single").ledger
