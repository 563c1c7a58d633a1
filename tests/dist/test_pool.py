"""The pool that all other tests here rely on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.conftest import Train
from tests.dist.pool import RankPool, RanksFailed
from tests.support import assert_same_losses, read_metrics


def test_a_job_sees_what_a_launcher_sets(ranks: RankPool) -> None:
    results = ranks.run(3, "tests.dist.jobs.place", "a", 1)
    for rank, result in enumerate(results):
        environment, arguments = result.value
        assert arguments == ("a", 1)
        assert environment == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        assert (result.stdout, result.stderr) == (f"out {rank}\n", f"err {rank}\n")
    (alone,) = ranks.run(1, "tests.dist.jobs.place")
    assert [alone.value[0][name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")] == [None] * 3


@pytest.mark.parametrize(
    ("how", "text", "exit_code"),
    [
        ("raise", "ValueError: a fault in the job", 0),
        ("exit", "SystemExit(3)", 0),
        ("die", "died with exit code -9", -9),
    ],
)
def test_a_failing_rank_is_named_and_the_next_job_works(ranks: RankPool, how: str, text: str, exit_code: int) -> None:
    with pytest.raises(RanksFailed) as caught:
        ranks.run(2, "tests.dist.jobs.misbehave", 1, how)
    assert list(caught.value.failures) == [1] and text in caught.value.failures[1]
    assert caught.value.exit_codes == {0: 0, 1: exit_code}
    assert [result.value[0]["RANK"] for result in ranks.run(2, "tests.dist.jobs.place")] == ["0", "1"]


def test_a_hanging_rank_is_named_with_the_line_it_hangs_in(ranks: RankPool) -> None:
    with pytest.raises(RanksFailed) as caught:
        ranks.run(2, "tests.dist.jobs.misbehave", 0, "hang", timeout=2)
    assert caught.value.failures == {0: "did not return in 2 s"}
    assert "in misbehave" in str(caught.value)
    assert [result.value[0]["RANK"] for result in ranks.run(2, "tests.dist.jobs.place")] == ["0", "1"]


def test_jobs_do_not_influence_each_other(ranks: RankPool, train: Train, tmp_path: Path) -> None:
    settings = ("train.steps=4", "checkpoint.interval=null")
    train(tmp_path / "first", "single", *settings)
    train(tmp_path / "dp2", "dp2", *settings)
    ranks.run(1, "tests.dist.jobs.leave_a_mess")
    train(tmp_path / "again", "single", *settings)
    train(tmp_path / "dp2-again", "dp2", *settings)
    for before, after in (("first", "again"), ("dp2", "dp2-again")):
        assert_same_losses(read_metrics(tmp_path / after), read_metrics(tmp_path / before), 0)
