"""A run directory that another program works in, or died in; and what is known of how a start ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_synth.cluster.status import status
from megatron_synth.core.lock import Lock
from megatron_synth.train.record.run_lock import LOCK
from tests.dist.conftest import Run, Train
from tests.dist.pool import RankPool, RanksFailed
from tests.support import LAYOUTS, assert_same_losses, read_metrics, rewound, snapshot


@pytest.mark.parametrize("layout", ["single", "dp2"])
def test_a_run_directory_in_use_is_refused_and_left_alone(
    layout: str, trained: Callable[..., Run], train: Train, tmp_path: Path
) -> None:
    run = rewound(trained("single").path, tmp_path / "run", 10)
    with Lock(run / LOCK, "train"):
        before = snapshot(run)
        results = train(run, layout, code=2)
        assert snapshot(run) == before
    assert f"{run}: in use by `megatron-synth train` of" in results[0].stderr
    assert [result.stderr for result in results[1:]] == [""] * (len(results) - 1)


def test_what_was_made_for_a_start_that_is_refused_goes_again(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "a" / "run", "single", "checkpoint.init_from=/nowhere", code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "state", "event"),
    [
        ("kill", "killed", "the start before this one died without a word, killed or with its machine"),
        ("raise", "failed", "failed at step 7: ValueError: a bug"),
    ],
)
def test_how_a_start_ended_is_known_and_the_next_goes_on(
    what: str, state: str, event: str, trained: Callable[..., Run], train: Train, ranks: RankPool, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["train", str(config), *LAYOUTS["single"][1], "checkpoint.interval=5", "--run-dir", str(run)]
    with pytest.raises(RanksFailed):
        ranks.run(1, "tests.dist.jobs.train_in_trouble", arguments, what, 0, 8)
    assert status(run, {}).state == state
    train(run, "single", "checkpoint.interval=5")
    assert event in (run / "events.log").read_text()
    assert status(run, {}).state == "done" and not (run / LOCK).exists()
    assert_same_losses(read_metrics(run), trained("single").records, 0)
