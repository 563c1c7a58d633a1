"""Steps that stand out are skipped, alike in every layout and through a kill; their samples are read, counted and named."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_synth.train.record.anomalies import STANDS_OUT
from tests.dist.conftest import Train
from tests.dist.pool import RankPool, RanksFailed
from tests.support import GLOBAL_BATCH_SIZE, LAYOUTS, assert_same_losses, read_ledger, read_metrics

JOB, MAIN = "tests.dist.faults.skip_jobs.train_with_fault", "megatron_synth.cli.main.main"
STEPS, FAULT = 48, 36
COMMON = (
    f"train.steps={STEPS}",
    "checkpoint.interval=10",
    "checkpoint.keep_last=9",
    "eval.interval=null",
    "optim.schedule=wsd",
    "data.sources.web.max_epochs=9",
    "data.sources.qa.max_epochs=9",
)
WEB_ALONE = ("data.sources.qa=null", "data.sources.web.ratio=1", "data.sources.web.max_epochs=99")
SKIP = "train.skip={sigmas: 8, window: 32, least: 12}"

Fault = Callable[..., Path]


@pytest.fixture(scope="module")
def faulty(ranks: RankPool, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Fault:
    """faulty(name, layout, fault, *settings, code=0): a run with a fault in step FAULT, made once."""
    folder = tmp_path_factory.mktemp("faulty")

    def call(name: str, layout: str, fault: str, *settings: str, code: int = 0, kill_at: int | None = None) -> Path:
        run = folder / name
        arguments = ["train", str(config), *LAYOUTS[layout][1], *COMMON, *settings, "--run-dir", str(run)]
        if kill_at is not None:
            with pytest.raises(RanksFailed):
                ranks.run(LAYOUTS[layout][0], JOB, arguments, fault, FAULT, kill_at)
        results = ranks.run(LAYOUTS[layout][0], JOB, arguments, fault, FAULT)
        assert [result.value for result in results] == [code] * len(results), results[0].stdout + results[0].stderr
        (run / "stderr").write_text(results[0].stderr)
        return run

    return call


def events(run: Path) -> list[str]:
    return [line for line in (run / "events.log").read_text().splitlines() if " warning: step " in line and "skipped" in line]


def largest_loss(event: str) -> float:
    """Nats per label of the first row that a note names."""
    found = re.search(r"largest losses: sample \d+ ([\d.]+) \(", event)
    assert found is not None, event
    return float(found[1])


def audited(ranks: RankPool, run: Path) -> None:
    (result,) = ranks.run(1, MAIN, ["mix", "audit", str(run)])
    assert result.value == 0, result.stdout + result.stderr


def test_a_batch_of_noise_is_skipped_alike_everywhere(faulty: Fault, ranks: RankPool) -> None:
    reference = faulty("single", "single", "noise", SKIP)
    records = read_metrics(reference)
    assert [record["step"] for record in records if record["optim/skipped"]] == list(range(FAULT, STEPS + 1))
    assert records[-1]["optim/skipped"] == 1
    first = (FAULT - 1) * GLOBAL_BATCH_SIZE
    (event,) = events(reference)
    assert f"step {FAULT}: skipped: loss " in event and f"samples {first} to {first + GLOBAL_BATCH_SIZE - 1}:" in event
    named = [int(number) for number in re.findall(r"sample (\d+) [\d.]+ \(", event)]
    assert len(named) == 4 and set(named) <= set(range(first, first + GLOBAL_BATCH_SIZE))
    assert re.search(r"\(web: \S+/web/shard-0000\d\.bin, documents? \d+", event)
    ledger = read_ledger(reference)
    assert ledger["samples"] == STEPS * GLOBAL_BATCH_SIZE and ledger["unlearned"]["samples"] == GLOBAL_BATCH_SIZE
    audited(ranks, reference)
    # a kill before the fault, after the last checkpoint, and one in the middle of the window: the window is resumed
    kills = {"killed": FAULT, "dp2": 33}
    for name in ("killed", "tp2", "pp2", "dp2", "cp2"):
        layout = "single" if name == "killed" else name
        run = faulty(name, layout, "noise", SKIP, kill_at=kills.get(name))
        assert_same_losses(read_metrics(run), records, 0 if layout == "single" else 1e-4)
        assert read_ledger(run) == ledger
        (told,) = events(run)
        assert largest_loss(told) == pytest.approx(largest_loss(event), rel=2e-3)


def test_what_is_skipped_costs_no_more_than_a_step(faulty: Fault) -> None:
    plain = read_metrics(faulty("plain", "single", "none"))
    guarded = read_metrics(faulty("guarded", "single", "none", SKIP))
    assert_same_losses(guarded, plain, 1e-12)  # where nothing stands out, nothing changes
    for name, fault, layout in (("single", "noise", "single"), ("nan", "nan", "dp2")):
        found = read_metrics(faulty(name, layout, fault, SKIP))[-1]
        assert found["optim/skipped"] == 1
        assert found["eval/loss"] == pytest.approx(plain[-1]["eval/loss"], rel=0.02)
    assert math.isnan(read_metrics(faulty("nan", "dp2", "nan", SKIP))[FAULT - 1]["train/loss"])


@pytest.mark.parametrize("layout", ["single", "dp2"])
def test_a_damaged_row_is_named_though_its_step_does_not_stand_out(layout: str, faulty: Fault, ranks: RankPool) -> None:
    run = faulty(f"row-{layout}", layout, "row", *WEB_ALONE)
    lines = (run / "events.log").read_text().splitlines()
    (note,) = [line for line in lines if STANDS_OUT in line]
    sample = (FAULT - 1) * GLOBAL_BATCH_SIZE + 3
    assert f"step {FAULT}: a row {STANDS_OUT}, " in note and f": sample {sample} " in note
    assert re.search(r"\(web: \S+/web/shard-0000\d\.bin, documents? \d+", note)
    assert not [line for line in lines if "loss spike" in line or "skipped" in line]
    (result,) = ranks.run(1, MAIN, ["report", str(run)])
    assert f"rows that may be damaged, noted in events.log: step {FAULT}: a row" in result.stdout
    (shown,) = ranks.run(1, MAIN, note.partition("read it with: megatron-synth ")[2].split())
    assert shown.value == 0 and f"sample   {sample}: step {FAULT} of {STEPS}" in shown.stdout


def test_too_many_in_a_row_say_where_to_start_again(
    faulty: Fault, train: Train, ranks: RankPool, tmp_path: Path
) -> None:
    """After a step with a rate 20 times too high nothing is as it was; the command that is named leads round it."""
    run = faulty("rate", "single", "rate", SKIP, "train.max_consecutive_skips=3", code=1)
    said = (run / "stderr").read_text()
    assert said.startswith("error: 3 steps in a row were skipped") and "Traceback" not in said
    found = re.search(r"checkpoint\.branch_from=(\S+) data\.skip='(\S+ \S+)'", said)
    assert found is not None, said
    first = FAULT * GLOBAL_BATCH_SIZE
    assert found[1] == f"{run}@30" and found[2] == f"[[{first}, {first + 3 * GLOBAL_BATCH_SIZE - 1}]]"
    branch = tmp_path / "branch"
    (result,) = train(branch, "single", *COMMON, SKIP, f"checkpoint.branch_from={found[1]}", f"data.skip={found[2]}")
    plain = read_metrics(faulty("plain", "single", "none"))
    assert read_metrics(branch)[-1]["eval/loss"] == pytest.approx(plain[-1]["eval/loss"], rel=0.02)
    audited(ranks, branch)
    samples = read_ledger(branch)
    assert samples["samples"] == STEPS * GLOBAL_BATCH_SIZE
    (shown,) = ranks.run(1, MAIN, ["mix", "show", str(branch), f"{first}-{first + 3 * GLOBAL_BATCH_SIZE}"])
    assert shown.stdout.count("left out by data.skip") == 3 * GLOBAL_BATCH_SIZE
    assert f"sample   {first + 3 * GLOBAL_BATCH_SIZE}: step {FAULT + 1} of {STEPS}" in shown.stdout
    # it goes on in its place, and what was consumed cannot be left out afterwards
    (refused,) = train(branch, "single", *COMMON, SKIP, f"checkpoint.branch_from={found[1]}", "data.skip=[[8, 15]]", code=2)
    assert "data.skip: [8, 15] begins within" in refused.stderr
