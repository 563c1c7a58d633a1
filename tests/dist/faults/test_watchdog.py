"""Ranks that hang, stop, die or are slow, and batches that spoil a step: who, where, when, and how to look at it."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_synth.config.errors import EXIT_RANK_LOST
from megatron_synth.train.record.nodes import read_nodes
from tests.dist.conftest import Run, Train
from tests.dist.pool import RankPool, RanksFailed
from tests.support import LAYOUTS, STEPS, assert_same_losses, read_metrics

QUICK = ("train.hang_timeout_s=6", "train.lost_rank_timeout_s=6")


def _arguments(config: Path, run: Path, layout: str, *settings: str) -> list[str]:
    return ["train", str(config), *LAYOUTS[layout][1], *settings, "--run-dir", str(run)]


@pytest.mark.parametrize(
    ("what", "layout", "target", "says"),
    [
        ("stop", "dp2", 0, "LOST, its process is stopped (SIGSTOP); last seen in "),
        ("kill", "tp2pp2", 2, "LOST, its process has ended; last seen in "),
        ("hang", "dp2", 1, "BEHIND, step of step 8 for"),
        ("raise", "dp2", 1, "LOST, its process has ended; last seen in ValueError after step of step 8"),
    ],
)
def test_a_rank_in_trouble_is_named(
    what: str, layout: str, target: int, says: str, ranks: RankPool, config: Path, train: Train, tmp_path: Path
) -> None:
    run, world_size, settings = tmp_path / "run", LAYOUTS[layout][0], (*QUICK, "checkpoint.interval=5")
    with pytest.raises(RanksFailed) as caught:
        ranks.run(world_size, "tests.dist.jobs.train_in_trouble", _arguments(config, run, layout, *settings), what, target, 8)
    own = {"kill": -signal.SIGKILL, "hang": EXIT_RANK_LOST, "stop": None, "raise": 0}[what]
    expected = {rank: own if rank == target else EXIT_RANK_LOST for rank in range(world_size)}
    assert caught.value.exit_codes == expected, str(caught.value)
    printed = str(caught.value)
    (report,) = (run / "hang").glob("report-*.txt")
    text = report.read_text()
    assert printed.count(f"error: {text}") == 1
    assert text.startswith(f"rank {target} of {world_size} is {'hanging' if what == 'hang' else 'lost'}: ")
    (line,) = [line for line in text.splitlines() if line.startswith(f"  rank {target} on ")]
    assert says in line
    # as of its last beat, which may be from before the first step: these steps take milliseconds
    assert all(1 <= int(step) <= 8 for step in re.findall(r" of step (\d+)", line))
    if what == "hang":
        assert "in troubled" not in text and "jobs.py" in line and "troubled" in line
    for rank in set(range(world_size)) - {target}:
        stacks = (run / "hang" / f"rank-{rank}.txt").read_text()
        assert stacks.startswith(f"rank {rank} on ") and "step of step 8" in stacks and "loop.py" in stacks
        assert stacks.splitlines()[2] == "MainThread, the innermost line first" and "watchdog.py" not in stacks.split("\n\n")[1]
    assert " | ".join(text.splitlines()) in (run / "events.log").read_text()
    # it resumes as from a kill; what is left of the report is not in the way
    train(run, layout, "checkpoint.interval=5")
    assert not list((run / "hang").glob("beat-*"))


def test_watching_changes_nothing_and_leaves_nothing(trained: Callable[..., Run], train: Train, tmp_path: Path) -> None:
    train(tmp_path / "run", "dp2", "train.hang_timeout_s=null")
    assert_same_losses(read_metrics(tmp_path / "run"), trained("dp2").records, 0)
    assert not (trained("dp2").path / "hang").exists()


def test_a_slow_rank_is_named_with_its_node(ranks: RankPool, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = _arguments(config, run, "dp2", "log.interval=5", "log.straggler_pct=50", "checkpoint.interval=4")
    for steps in (STEPS // 2, STEPS):  # what two starts note adds up
        results = ranks.run(2, "tests.dist.jobs.train_with_a_slow_rank", [*arguments, f"train.steps={steps}"], 1)
        assert [result.value for result in results] == [0, 0]
    events = [line for line in (run / "events.log").read_text().splitlines() if "is slow" in line]
    assert len(events) == 2 and all("rank 1 is slow" in line and "the median of 2 ranks" in line for line in events)
    assert "over by more than 50 %: 1 on node1" in events[0]
    nodes = read_nodes(run)
    assert [nodes[name]["steps"] for name in ("node0", "node1")] == [STEPS, STEPS]
    for name, seconds in (("node0", 1000), ("node1", 3000)):
        assert nodes[name]["own_s"] >= seconds * STEPS and nodes[name]["own_s"] == pytest.approx(seconds * STEPS, rel=0.2)
        assert nodes[name]["starting"] > 0 and nodes[name]["saving"] > 0 and nodes[name]["data"] > 0
    for verb in ("report", "status"):
        (result,) = ranks.run(1, "megatron_synth.cli.main.main", [verb, str(run)])
        assert result.value == 0 and "node1 is the slowest of 2 nodes: 3e+03 s a step" in result.stdout, result.stdout


def test_a_poisoned_batch_is_noted_with_the_command_that_shows_it(
    ranks: RankPool, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = _arguments(config, run, "dp2", "train.steps=9", "eval.interval=null")
    ranks.run(2, "tests.dist.jobs.train_poisoned", arguments, "loss", 1, [6])
    (note,) = [line for line in (run / "events.log").read_text().splitlines() if "not finite" in line]
    assert "step 6: not finite, skipped: loss nan" in note and "samples 40 to 47: web 5" in note and "qa 3" in note
    command = note.partition("read them with: megatron-synth ")[2].removesuffix(" --text").split()
    (result,) = ranks.run(1, "megatron_synth.cli.main.main", command)
    assert result.value == 0
    assert [f"sample   {number}: step 6 of 9" in result.stdout for number in range(40, 48)] == [True] * 8
    assert math.isnan(read_metrics(run)[5]["train/loss"])
