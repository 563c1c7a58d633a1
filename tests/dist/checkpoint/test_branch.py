"""A branch goes on from another run's checkpoint, with weights, moments and data position, and counts what came before."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_synth.train.checkpoint import branch
from tests.dist.conftest import Run, Train
from tests.dist.pool import RankPool, RanksFailed
from tests.support import (
    GLOBAL_BATCH_SIZE,
    SEQUENCE_LENGTH,
    STEPS,
    assert_same_losses,
    read_ledger,
    read_metrics,
    snapshot,
)

HALF = STEPS // 2
CONSUMED = HALF * GLOBAL_BATCH_SIZE
MAIN = "megatron_synth.cli.main.main"
OTHER = ("data.sources.web.ratio=1/4", "data.sources.qa.ratio=3/4", "data.sources.qa.max_epochs=8")


def of(run: Path, step: int = HALF) -> str:
    """The setting that branches from a run."""
    return f"checkpoint.branch_from={run}@{step}"


def audit(ranks: RankPool, run: Path) -> None:
    (result,) = ranks.run(1, MAIN, ["mix", "audit", str(run)])
    assert result.value == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("trunk", "layout"), [("single", "single"), ("tp2pp2", "tp2pp2"), ("single", "dp2")])
def test_a_branch_with_an_unchanged_schedule_is_the_unbranched_run(
    trunk: str, layout: str, trained: Callable[..., Run], train: Train, ranks: RankPool, tmp_path: Path
) -> None:
    reference, run = trained(trunk), tmp_path / "branch"
    results = train(run, layout, of(reference.path))
    assert f"branched at step {HALF}" in results[0].stdout
    records = read_metrics(run)
    assert_same_losses(records, reference.records[HALF:], 0 if trunk == layout else 1e-5)
    if trunk == layout:
        paths = [str(path / "checkpoints" / f"step_{STEPS:08d}") for path in (run, reference.path)]
        (result,) = ranks.run(1, "tests.dist.jobs.differences", *paths)
        assert result.value[1] == []
    ledger = read_ledger(run)
    assert {name: ledger[name] for name in reference.ledger} == reference.ledger
    assert ledger["trunk"]["samples"] == CONSUMED == ledger["branch"]["samples"]
    assert ledger["trunk"]["run"] == json.loads((reference.path / "run.json").read_text())["id"]
    audit(ranks, run)
    # on its own checkpoints it goes on without the trunk, and only as what it is
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:08d}")
    train(run, layout, of(tmp_path / "gone"))
    assert_same_losses(read_metrics(run), records, 0)
    (result, *_) = train(run, layout, of(reference.path, STEPS), code=2)
    assert "is a branch of" in result.stderr
    (result, *_) = train(run, layout, code=2)
    assert "checkpoint.branch_from: not set" in result.stderr


def test_a_branch_with_a_mixture_of_its_own(
    trained: Callable[..., Run], train: Train, ranks: RankPool, config: Path, tmp_path: Path
) -> None:
    trunk, run = trained("single").path, tmp_path / "branch"
    train(run, "single", of(trunk), *OTHER)
    ledger = read_ledger(run)
    ours = {name: part["samples"] for name, part in ledger["branch"]["sources"].items()}
    assert ours == {"web": CONSUMED // 4, "qa": CONSUMED * 3 // 4}  # whole periods: exact
    assert ledger["sources"]["qa"]["samples"] == ours["qa"] + ledger["trunk"]["sources"]["qa"]["samples"]
    audit(ranks, run)
    (shown,) = ranks.run(1, MAIN, ["mix", "show", str(run), f"{CONSUMED - 1}-{CONSUMED}"])
    assert f"trunk's part, which ends with step {HALF}" in shown.stdout and f": step {HALF + 1} of {STEPS}" in shown.stdout
    for verb in (["mix", "plan", str(run)], ["status", str(run)], ["report", str(run)], ["train", str(run / "config.yaml")]):
        more = ["--dry-run", "--run-dir", str(run)] if verb[0] == "train" else []
        (told,) = ranks.run(1, MAIN, [*verb, *more])
        assert told.value == 0, told.stderr
        assert verb[0] not in ("status", "report") or "branch of" in told.stdout
    # the command of before is the same branch, and its config.yaml describes itself
    train(run, "single", of(trunk), *OTHER)
    # a cap counts both parts: 27 samples of the trunk and 60 of its own are more than twice the 40 windows
    (result,) = train(tmp_path / "capped", "single", of(trunk), *OTHER[:2], "data.sources.qa.max_epochs=2", code=2)
    assert "data.sources: too small" in result.stderr and "qa" in result.stderr
    assert not (tmp_path / "capped" / "checkpoints").exists()


def test_a_branch_from_within_a_ramp_to_another_source(
    trained: Callable[..., Run], train: Train, ranks: RankPool, corpus: Path, tmp_path: Path
) -> None:
    """The trunk's line stays what it was where the branch leaves it; a source that the branch does not name is counted still."""
    plain = [f"data.sources.{name}.ratio=null" for name in ("web", "qa")]
    tokens = STEPS * GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH
    line = f"{{from: {{web: 1}}, to: {{web: 1/2, qa: 1/2}}, blocks: 7}}"
    ramp = f"data.phases=[{{until: {tokens}, ramp: {line}}}, {{ratios: {{web: 1}}}}]"
    trunk, run = trained("single", *plain, ramp), tmp_path / "branch"
    own = (f"data.sources.web=null", f"data.sources.more={{path: {corpus / 'val'}, ratio: 1, max_epochs: 9}}", "data.sources.qa=null")
    train(run, "single", of(trunk.path), *own)
    ledger = read_ledger(run)
    assert ledger["branch"]["sources"] == {"more": {"samples": CONSUMED, "tokens": CONSUMED * SEQUENCE_LENGTH}}
    assert set(ledger["trunk"]["sources"]) == {"web", "qa"}
    audit(ranks, run)


def test_wrong_branches_are_refused_in_one_message(
    trained: Callable[..., Run], train: Train, corpus: Path, tmp_path: Path
) -> None:
    trunk, run = trained("single").path, tmp_path / "branch"
    damaged = tmp_path / "damaged"
    shutil.copytree(trunk, damaged)
    file = damaged / "checkpoints" / f"step_{HALF:08d}" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    wrong: dict[tuple[str, ...], str] = {
        (of(tmp_path / "nothing"),): "no such run directory",
        (of(trunk, 7),): f"step 7 is not saved there; saved: {HALF}, {STEPS}",
        (of(trunk, STEPS),): f"train.steps: {STEPS}, but checkpoint.branch_from is step {STEPS}",
        (of(damaged),): "has the checksum",
        (f"checkpoint.branch_from={trunk}",): "expected RUN@STEP",
        (f"checkpoint.branch_from={trunk}@{'9' * 5000}",): "expected RUN@STEP",
        (of(trunk), f"checkpoint.init_from={trunk}"): "cannot be set with checkpoint.init_from",
        (of(trunk), "model.hidden_size=32"): "model.hidden_size was 64 and is now 32",
        (of(trunk), "precision.dtype=bf16"): "precision.dtype was fp32",
        (of(trunk), "data.seed=5"): "data.seed: 5, the trunk's is 1234",
        (of(trunk), "train.sequence_length=16"): "gives windows of 16 tokens, the trunk's have 32",
        (of(trunk), *OTHER, "data.sources.web.unique_tokens=640"): "unique_tokens: was None in the trunk and is 640",
        (of(trunk), f"data.sources.web.path={corpus / 'val'}", "data.sources.web.max_epochs=9"): "holds other data than",
    }
    for settings, message in wrong.items():
        (result,) = train(run, "single", *settings, code=2)
        assert message in result.stderr and "Traceback" not in result.stderr, (settings, result.stderr)
        assert not (run / "checkpoints").exists() and not (run / branch.FILE).exists()
    before = snapshot(trunk)
    (result,) = train(trunk, "single", of(trunk), code=2)
    assert "the branch's own run directory" in result.stderr and snapshot(trunk) == before


def test_damage_is_told_of_the_file_that_it_is_in(
    trained: Callable[..., Run], train: Train, ranks: RankPool, tmp_path: Path
) -> None:
    trunk, run = tmp_path / "trunk", tmp_path / "branch"
    shutil.copytree(trained("single").path, trunk)
    train(run, "single", of(trunk), f"train.steps={HALF + 1}")
    record = json.loads((run / branch.FILE).read_text())
    record["config"]["data"]["sources"] = 5
    (run / branch.FILE).write_text(json.dumps(record))
    (result,) = train(run, "single", of(trunk), f"train.steps={HALF + 2}", code=2)
    assert f"{run / branch.FILE}: config" in result.stderr and "restore it from a copy of the run" in result.stderr
    state = trunk / "checkpoints" / f"step_{HALF:08d}" / "trainer.json"
    saved = json.loads(state.read_text())
    del saved["config"]["train"]["seed"]
    state.write_text(json.dumps(saved))
    (result,) = train(tmp_path / "other", "single", of(trunk), code=2)
    assert f"{state}: config" in result.stderr and "branch with the version that wrote it" in result.stderr


def test_steps_for_branches_are_saved_and_kept(train: Train, tmp_path: Path) -> None:
    settings = ("train.steps=9", "checkpoint.interval=2", "checkpoint.keep_last=1", "checkpoint.keep_steps=[3, 4]")
    train(tmp_path / "run", "single", *settings, "eval.interval=null")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")) == [
        f"step_{step:08d}" for step in (3, 4, 9)
    ]


def test_kills_in_trunk_and_branches_lose_nothing(ranks: RankPool, config: Path, tmp_path: Path) -> None:
    """Three branches, of another schedule, budget and mixture, are killed as their trunk was; nobody counts twice."""
    draw = random.Random(5)

    def arguments(run: Path, settings: tuple[str, ...]) -> list[str]:
        return ["train", str(config), *settings, "--run-dir", str(run)]

    def kill(run: Path, settings: tuple[str, ...]) -> None:
        moment, delay = draw.choice(["save", "step", "start"]), draw.uniform(0, 0.3)
        extra = (0, moment, 1, delay, 4, str(tmp_path / "trace"))
        with pytest.raises(RanksFailed):
            ranks.run(1, "tests.faults.jobs.train_until_killed", arguments(run, settings), *extra)

    common = ("eval.interval=null", "checkpoint.interval=2")
    kept = (*common, "checkpoint.keep_steps=[6, 10]")
    branches = {
        "schedule": (6, ("optim.schedule=wsd", "optim.decay_steps=4", "train.steps=12")),
        "budget": (10, ("train.steps=16", "train.global_batch_size=4")),
        "mixture": (10, OTHER),
    }
    runs = {}
    for way in ("whole", "killed"):
        folder = tmp_path / way
        settings = {folder / "trunk": kept}
        settings |= {folder / name: (*common, of(folder / "trunk", at), *own) for name, (at, own) in branches.items()}
        for run, own in settings.items():
            for _ in range(2 if way == "killed" else 0):
                kill(run, own)
            (result,) = ranks.run(1, MAIN, arguments(run, own))
            assert result.value == 0, result.stderr
            audit(ranks, run)
        runs[way] = folder
    for name in ("trunk", *branches):
        found, expected = (runs[way] / name for way in ("killed", "whole"))
        assert_same_losses(read_metrics(found), read_metrics(expected), 0)
        ours, theirs = read_ledger(found), read_ledger(expected)
        for ledger in (ours, theirs):
            ledger.get("trunk", {}).pop("run", None)  # ids are drawn
        assert ours == theirs
