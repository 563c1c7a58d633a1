"""Checkpoints that are damaged, cannot be written, or are written while training goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dist.conftest import Run, Train
from tests.dist.pool import RankPool
from tests.support import (
    LAYOUTS,
    STEPS,
    assert_same_losses,
    checkpoint_names,
    read_ledger,
    read_metrics,
    rewound,
    snapshot,
    warnings_in,
)

HALF = STEPS // 2
LAST = f"step_{STEPS:08d}"


def _arguments(config: Path, run: Path, layout: str, *settings: str) -> list[str]:
    return ["train", str(config), *LAYOUTS[layout][1], *settings, "--run-dir", str(run)]


def _shards(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def _truncate(checkpoint: Path) -> None:
    os.truncate(_shards(checkpoint), _shards(checkpoint).stat().st_size // 2)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, "bytes, expected"),
    "flipped bit in the tensors": (lambda checkpoint: _flip(_shards(checkpoint)), "has the checksum"),
    "missing index": (lambda checkpoint: (checkpoint / ".metadata").unlink(), ".metadata is missing"),
    "missing manifest": (lambda checkpoint: (checkpoint / "manifest.json").unlink(), "manifest.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(damage: str, trained: Callable[..., Run], train: Train, tmp_path: Path) -> None:
    reference, run = trained("single"), tmp_path / "run"
    shutil.copytree(reference.path, run)
    harm, says = DAMAGE[damage]
    harm(run / "checkpoints" / LAST)
    (result,) = train(run, "single")
    (warning,) = warnings_in(result.stdout)
    assert LAST in warning and says in warning and f"going back to step_{HALF:08d}" in warning
    assert warning in (run / "events.log").read_text()
    assert f"resumed at step {HALF}" in result.stdout
    assert_same_losses(read_metrics(run), reference.records, 0)
    assert read_ledger(run) == reference.ledger
    assert snapshot(run / "checkpoints" / LAST)["__0_0.distcp"] == snapshot(reference.path)[f"checkpoints/{LAST}/__0_0.distcp"]


def test_the_ranks_share_the_reading_and_all_hear_of_a_fault(trained: Callable[..., Run], train: Train, tmp_path: Path) -> None:
    reference, run = trained("tp2"), tmp_path / "run"
    shutil.copytree(reference.path, run)
    for file in (run / "checkpoints" / LAST).glob("*.distcp"):  # each is read by another rank
        _flip(file)
    results = train(run, "tp2")
    assert results[0].stdout.count("has the checksum") == 2 and not warnings_in(results[1].stdout)
    assert_same_losses(read_metrics(run), reference.records, 0)


def test_all_damaged_is_an_error_that_names_them(trained: Callable[..., Run], train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained("single").path, run)
    for checkpoint in (run / "checkpoints").glob("step_*"):
        _truncate(checkpoint)
    before = snapshot(run)
    (result,) = train(run, "single", code=2)
    assert result.stderr.count("error:") == 1 and "no checkpoint of it can be used" in result.stderr
    assert LAST in result.stderr and f"step_{HALF:08d}" in result.stderr
    assert snapshot(run) == before


def test_sizes_alone_if_asked_for(trained: Callable[..., Run], train: Train, tmp_path: Path) -> None:
    run = rewound(trained("single").path, tmp_path / "run", HALF)
    file = run / "checkpoints" / f"step_{HALF:08d}" / "trainer.json"
    content = file.read_text()
    run_id = json.loads(content)["run_id"]
    file.write_text(content.replace(run_id, run_id[::-1]))  # of the same size, and harmless
    train(run, "single", code=2)
    (result,) = train(run, "single", "checkpoint.verify=sizes")
    assert f"resumed at step {HALF}" in result.stdout and not warnings_in(result.stdout)


def test_a_checkpoint_without_a_manifest_of_an_older_version_is_resumed(
    trained: Callable[..., Run], train: Train, tmp_path: Path
) -> None:
    reference = trained("single")
    run = rewound(reference.path, tmp_path / "run", HALF)
    checkpoint = run / "checkpoints" / f"step_{HALF:08d}"
    (checkpoint / "manifest.json").unlink()
    trainer = (checkpoint / "trainer.json").read_text()
    (checkpoint / "trainer.json").write_text(trainer.replace('"format": 2', '"format": 1'))
    (result,) = train(run, "single")
    assert f"resumed at step {HALF}" in result.stdout and not warnings_in(result.stdout)
    assert_same_losses(read_metrics(run), reference.records, 0)


# ---- written while training goes on


@pytest.mark.parametrize("layout", ["single", "dp2-overlap-both", "tp2pp2"])
def test_a_checkpoint_written_meanwhile_is_that_of_a_waiting_run(
    layout: str, trained: Callable[..., Run], train: Train, tmp_path: Path
) -> None:
    train(tmp_path / "run", layout, "checkpoint.async_save=false")
    waited, meanwhile = (
        snapshot(path / "checkpoints" / f"step_{HALF:08d}") for path in (tmp_path / "run", trained(layout).path)
    )
    tensors = {name: content for name, content in meanwhile.items() if name.endswith((".distcp", ".metadata", "common.pt"))}
    assert len(tensors) == LAYOUTS[layout][0] + 2
    for name, content in tensors.items():
        if not name.endswith(".metadata"):
            assert waited[name] == content, name


def test_training_goes_on_while_a_slow_disk_is_written_to(
    ranks: RankPool, config: Path, trained: Callable[..., Run], tmp_path: Path
) -> None:
    run, arguments = tmp_path / "run", _arguments(config, tmp_path / "run", "dp2", "checkpoint.interval=2")
    results = ranks.run(2, "tests.dist.jobs.train_with_a_slow_disk", arguments, 2, STEPS)
    for result in results:
        code, steps_meanwhile = result.value
        assert code == 0 and steps_meanwhile >= STEPS // 2 - 1, result.stdout
    assert_same_losses(read_metrics(run), trained("dp2").records, 0)
    # one at a time, each whole before the next: none was left out
    assert (run / "events.log").read_text().count("saved step_") == STEPS // 2


# ---- disks


@pytest.mark.parametrize(("layout", "target"), [("single", 0), ("tp2", 1)])
def test_a_full_disk_is_a_warning_and_training_goes_on(
    layout: str, target: int, ranks: RankPool, config: Path, trained: Callable[..., Run], tmp_path: Path
) -> None:
    run, world_size = tmp_path / "run", LAYOUTS[layout][0]
    arguments = _arguments(config, run, layout, "checkpoint.interval=5")
    results = ranks.run(world_size, "tests.dist.jobs.train_with_a_full_disk", arguments, [2], target)
    assert [result.value for result in results] == [0] * world_size
    assert "the checkpoint of step 10 could not be written" in results[0].stdout and "Training goes on" in results[0].stdout
    assert "the checkpoint of step 10 could not be written" in (run / "events.log").read_text()
    assert sum(len(warnings_in(result.stdout)) for result in results) == 1
    assert_same_losses(read_metrics(run), trained(layout).records, 0)
    assert checkpoint_names(run) == ["step_00000015", LAST]


def test_a_host_without_room_for_the_copy_is_a_warning_and_training_goes_on(
    ranks: RankPool, config: Path, trained: Callable[..., Run], tmp_path: Path
) -> None:
    run, arguments = tmp_path / "run", _arguments(config, tmp_path / "run", "tp2", "checkpoint.interval=5")
    results = ranks.run(2, "tests.dist.jobs.train_without_room_for_a_copy", arguments, [2], 1)
    assert [result.value for result in results] == [0, 0]
    told = "the checkpoint of step 10 could not be written: rank 1: the host has no memory left"
    assert told in results[0].stdout and told in (run / "events.log").read_text()
    assert_same_losses(read_metrics(run), trained("tp2").records, 0)
    assert checkpoint_names(run) == ["step_00000015", LAST]


@pytest.mark.parametrize(("layout", "target"), [("single", 0), ("tp2", 1)])
def test_a_full_disk_at_the_end_is_an_error_and_leaves_the_checkpoint_before(
    layout: str, target: int, ranks: RankPool, config: Path, trained: Callable[..., Run], train: Train, tmp_path: Path
) -> None:
    run, interval, world_size = tmp_path / "run", "checkpoint.interval=15", LAYOUTS[layout][0]
    arguments = _arguments(config, run, layout, interval)
    results = ranks.run(world_size, "tests.dist.jobs.train_with_a_full_disk", arguments, [2], target)
    assert [result.value for result in results] == [2] * world_size
    assert "".join(result.stderr for result in results).count("error:") == 1
    assert results[0].stderr.startswith("error:") and "the checkpoint of step 20 could not be written" in results[0].stderr
    assert (run / "checkpoints" / "latest").read_text() == "step_00000015\n"
    assert checkpoint_names(run) == ["step_00000015"]
    results = train(run, layout, interval)
    assert "resumed at step 15" in results[0].stdout
    assert_same_losses(read_metrics(run), trained(layout).records, 0)


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_a_read_only_run_directory_is_refused(
    below: str, read_only: Callable[[Path], None], trained: Callable[..., Run], train: Train, tmp_path: Path
) -> None:
    run = rewound(trained("dp2").path, tmp_path / "run", HALF)
    before = snapshot(run)
    read_only(run / below)
    results = train(run, "dp2", code=2)
    assert str(run) in results[0].stderr and "cannot be written" in results[0].stderr
    assert "".join(result.stderr for result in results).count("error:") == 1
    assert snapshot(run) == before


# ---- the benchmark


def test_the_benchmark_saves_in_both_ways_on_two_ranks(ranks: RankPool, tmp_path: Path) -> None:
    small = ["model.num_layers=2", "model.hidden_size=48", "model.ffn_hidden_size=128", "train.global_batch_size=2"]
    arguments = ["checkpoint", *small, "--saves", "1", "--folder", str(tmp_path), "--json", str(tmp_path / "out.json")]
    results = ranks.run(2, "benchmarks.__main__.main", arguments)
    assert [result.value for result in results] == [0, 0], results[0].stderr
    table = [line for line in results[0].stdout.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in table] == ["save", "waited for", "meanwhile", "meanwhile, the first"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
