"""A run that is stopped, killed or moved to another layout goes on as if nothing had happened."""

from __future__ import annotations

import json
import math
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_synth.core.log import human
from tests.dist.conftest import Run, Train
from tests.dist.pool import RankPool, RanksFailed
from tests.support import (
    GLOBAL_BATCH_SIZE,
    LAYOUTS,
    PLAIN_OPTIMIZER,
    RATIOS,
    SEQUENCE_LENGTH,
    STEPS,
    assert_same_losses,
    checkpoint_names,
    read_ledger,
    read_metrics,
    rewound,
    snapshot,
)

HALF = STEPS // 2
LAST = f"step_{STEPS:08d}"


def _run_id(run: Path) -> str:
    return str(json.loads((run / "run.json").read_text())["id"])


def _arguments(config: Path, run: Path, layout: str, *settings: str) -> list[str]:
    return ["train", str(config), *LAYOUTS[layout][1], *settings, "--run-dir", str(run)]


def _assert_bit_equal_weights(ranks: RankPool, run: Path, reference: Path) -> None:
    """Weights and optimizer states of the last checkpoints."""
    paths = [str(path / "checkpoints" / LAST) for path in (run, reference)]
    (result,) = ranks.run(1, "tests.dist.jobs.differences", *paths)
    count, different = result.value
    assert count > 10 and different == []


# ---- in the same layout: bit-equal


@pytest.mark.parametrize("layout", ["single", "single-plain", "tp2pp2", "pp2vp2", "dp2-overlap-both"])
def test_resuming_in_the_same_layout_is_bit_equal(
    layout: str, trained: Callable[..., Run], train: Train, ranks: RankPool, tmp_path: Path
) -> None:
    reference = trained(layout)
    run = rewound(reference.path, tmp_path / "run", HALF)
    results = train(run, layout)
    assert f"resumed at step {HALF}" in results[0].stdout
    assert_same_losses(read_metrics(run), reference.records, 0)
    assert read_ledger(run) == reference.ledger
    assert _run_id(run) == _run_id(reference.path)
    _assert_bit_equal_weights(ranks, run, reference.path)


# ---- in another layout: the same numbers but for rounding


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2", "dp2", "pp2vp2"])
def test_resuming_in_another_layout(layout: str, trained: Callable[..., Run], train: Train, tmp_path: Path) -> None:
    reference = trained("tp2pp2")
    run = rewound(reference.path, tmp_path / "run", HALF)
    train(run, layout)
    assert_same_losses(read_metrics(run), reference.records, 1e-5)
    assert read_ledger(run) == reference.ledger


@pytest.mark.parametrize(("before", "after"), [("single", "tp2"), ("dp2", "tp2"), ("single-plain", "dp2-plain")])
def test_resuming_with_another_padding_of_the_vocabulary(
    before: str, after: str, trained: Callable[..., Run], train: Train, tmp_path: Path
) -> None:
    """Rows that pad it are no part of the model: more of them come as new, and those of a checkpoint may be left out."""
    wide = "model.make_vocab_size_divisible_by=384"
    reference = trained("single")
    run = rewound(trained(before).path, tmp_path / "wider", HALF)
    train(run, after, wide)
    assert_same_losses(read_metrics(run), reference.records, 1e-5)
    run = rewound(trained(before, wide).path, tmp_path / "narrower", HALF)
    train(run, after)
    assert_same_losses(read_metrics(run), reference.records, 1e-5)


def test_resuming_an_interleaved_or_data_parallel_run_on_one_rank(
    trained: Callable[..., Run], train: Train, tmp_path: Path
) -> None:
    for layout in ("pp2vp2", "dp2"):
        reference = trained(layout)
        run = rewound(reference.path, tmp_path / layout, HALF)
        train(run, "single")
        assert_same_losses(read_metrics(run), reference.records, 1e-5)


def test_another_batch_size_goes_on_with_the_next_samples(trained: Callable[..., Run], train: Train, tmp_path: Path) -> None:
    reference = trained("single")
    run = rewound(reference.path, tmp_path / "run", HALF)
    steps = HALF + HALF // 2
    train(run, "dp2", f"train.global_batch_size={2 * GLOBAL_BATCH_SIZE}", f"train.steps={steps}")
    records = read_metrics(run)
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    # the ledger, which counts the rows that were trained on, is that of the same number of samples in smaller steps
    assert read_ledger(run) == reference.ledger
    for index, record in enumerate(records[HALF:]):
        same_sample = reference.records[HALF + 2 * index + 1]
        shared = {name: value for name, value in same_sample.items() if name.startswith("data/")}
        assert {name: record[name] for name in shared} == shared
    events = (run / "events.log").read_text()
    assert f"changed: train.global_batch_size: {GLOBAL_BATCH_SIZE} -> {2 * GLOBAL_BATCH_SIZE}" in events


def test_a_run_whose_batch_size_changed_is_held_against_what_it_consumes(
    trained: Callable[..., Run], ranks: RankPool, train: Train, config: Path, tmp_path: Path
) -> None:
    reference = trained("single")
    run = rewound(reference.path, tmp_path / "run", HALF)
    before = snapshot(run)
    # 80 samples are consumed; 2 x 78 windows of web last for 234 samples, which is 38 more steps of 4
    small = ("train.global_batch_size=4", "data.sources.web.max_epochs=2", "eval.interval=null")
    phases = ("data.phases=[{tokens: 2688, ratios: {web: 2/3, qa: 1/3}}]", *(f"data.sources.{name}.ratio=null" for name in RATIOS))
    refused = {
        (*small, f"train.steps={HALF + 39}"): "a run of 236 samples, 80 of them consumed",
        (*small, *phases, f"train.steps={HALF + 2}"): "data.phases: end after 84 samples",
    }
    for settings, message in refused.items():
        (result,) = ranks.run(1, "megatron_synth.cli.main.main", _arguments(config, run, "single", *settings))
        assert result.value == 2 and message in result.stderr, result.stderr
        assert snapshot(run) == before
    # 80 + 9 x 16 samples fit, and (10 + 9) x 16 would not
    large = ("train.global_batch_size=16", "data.sources.web.max_epochs=2", f"train.steps={HALF + 9}", "eval.interval=null")
    (result,) = train(run, "single", *large)
    assert f"over {human(224 * SEQUENCE_LENGTH)} tokens in {HALF + 9} steps" in result.stdout
    assert read_ledger(run)["samples"] == 224


def test_making_a_run_longer_changes_nothing_before(
    trained: Callable[..., Run], train: Train, ranks: RankPool, tmp_path: Path
) -> None:
    constant = "optim.schedule=constant"
    reference = trained("single", constant)
    run = tmp_path / "run"
    train(run, "single", constant, f"train.steps={HALF}")
    assert_same_losses(read_metrics(run), reference.records[:HALF], 0)
    train(run, "single", constant)
    assert_same_losses(read_metrics(run), reference.records, 0)
    _assert_bit_equal_weights(ranks, run, reference.path)


def test_a_finished_run_is_left_alone(trained: Callable[..., Run], train: Train, tmp_path: Path) -> None:
    reference = trained("single")
    run = tmp_path / "run"
    shutil.copytree(reference.path, run)
    before = snapshot(run / "checkpoints")
    train(run, "single")
    assert read_metrics(run) == reference.records and snapshot(run / "checkpoints") == before


def test_fewer_steps_than_done_leave_the_run_as_it_is(trained: Callable[..., Run], train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained("single").path, run)
    before = snapshot(run)
    (result,) = train(run, "single", f"train.steps={HALF}", code=2)
    assert f"train.steps: {HALF}, but" in result.stderr and f"set it to {STEPS} or more" in result.stderr
    assert snapshot(run) == before


def test_a_finished_schedule_that_is_made_longer_is_told(trained: Callable[..., Run], train: Train, tmp_path: Path) -> None:
    run = rewound(trained("dp2").path, tmp_path / "run", STEPS)
    first, second = train(run, "dp2", f"train.steps={STEPS + 2}", "data.sources.web.max_epochs=9")
    told = f"warning: the learning rate goes from 0.00e+00 in step {STEPS} to"
    assert first.stdout.count(told) == 1 and not second.stdout
    assert f"changed: train.steps: {STEPS} -> {STEPS + 2}" in first.stdout
    assert (run / "events.log").read_text().count(told) == 1


# ---- stopping on request


@pytest.mark.parametrize(
    ("layout", "signals", "stops_at"),
    [
        ("single", [(0, "step 4", signal.SIGUSR1)], 4),
        # twice, and once more while the checkpoint is written
        ("single", [(0, "step 4", signal.SIGTERM), (0, "step 4", signal.SIGTERM), (0, "save", signal.SIGTERM)], 4),
        # one rank alone, which does not report the loss; another signal elsewhere in the save
        ("tp2pp2", [(1, "step 4", signal.SIGUSR1), (2, "save", signal.SIGTERM)], 4),
        # at a step that is saved and evaluated anyway
        ("dp2", [(1, f"step {HALF}", signal.SIGTERM)], HALF),
    ],
)
def test_a_signal_stops_with_a_checkpoint(
    layout: str,
    signals: list[tuple[int, str, int]],
    stops_at: int,
    ranks: RankPool,
    config: Path,
    trained: Callable[..., Run],
    train: Train,
    tmp_path: Path,
) -> None:
    run, world_size = tmp_path / "run", LAYOUTS[layout][0]
    results = ranks.run(world_size, "tests.dist.jobs.train_with_signals", _arguments(config, run, layout), signals)
    assert [result.value for result in results] == [75] * world_size
    by = "by another rank" if signals[0][0] else signal.Signals(signals[0][2]).name
    assert f"stopped on request ({by}) at step {stops_at}" in results[0].stdout
    assert checkpoint_names(run) == [f"step_{stops_at:08d}"]
    assert (run / "checkpoints" / "latest").read_text() == f"step_{stops_at:08d}\n"
    assert [record["step"] for record in read_metrics(run)] == list(range(1, stops_at + 1))
    assert read_ledger(run)["samples"] == stops_at * GLOBAL_BATCH_SIZE
    run_id = _run_id(run)
    train(run, layout)
    reference = trained(layout)
    # at HALF the evaluation gave way to the stop: it is made when the run goes on
    assert_same_losses(read_metrics(run), reference.records, 0)
    assert _run_id(run) == run_id
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 2


@pytest.mark.parametrize(("layout", "batch", "stops_at"), [("single", 2, HALF), ("dp2", 1, HALF), ("tp2pp2", 2, STEPS)])
def test_a_signal_in_an_evaluation_waits_for_a_batch(
    layout: str,
    batch: int,
    stops_at: int,
    ranks: RankPool,
    config: Path,
    trained: Callable[..., Run],
    train: Train,
    tmp_path: Path,
) -> None:
    run, world_size = tmp_path / "run", LAYOUTS[layout][0]
    settings = () if stops_at == HALF else (f"eval.interval={STEPS}", "checkpoint.interval=null")
    signals = [(world_size - 1, f"batch {batch}", int(signal.SIGTERM))]
    results = ranks.run(world_size, "tests.dist.jobs.train_with_signals", _arguments(config, run, layout, *settings), signals)
    assert [result.value for result in results] == [75] * world_size
    assert f"at step {stops_at}; saved, the same command resumes" in results[0].stdout
    assert checkpoint_names(run) == [f"step_{stops_at:08d}"]
    records = read_metrics(run)
    assert len(records) == stops_at and not any(name.startswith("eval/") for name in records[-1])
    again = train(run, layout)
    assert again[0].stdout.count(f"eval step {stops_at}") == 1
    reference = [dict(record) for record in trained(layout).records]
    if stops_at == STEPS:
        reference[HALF - 1] = {name: value for name, value in reference[HALF - 1].items() if not name.startswith("eval/")}
    assert_same_losses(read_metrics(run), reference, 0)


@pytest.mark.parametrize(("layout", "how"), [("single", "error"), ("dp2", "kill")])
def test_what_fails_after_the_last_step_costs_no_step(
    layout: str, how: str, ranks: RankPool, config: Path, trained: Callable[..., Run], train: Train, tmp_path: Path
) -> None:
    run, world_size = tmp_path / "run", LAYOUTS[layout][0]
    arguments = _arguments(config, run, layout, "checkpoint.interval=null", "eval.interval=null")
    if how == "error":
        (result,) = ranks.run(1, "tests.dist.jobs.train_with_broken_evaluation", arguments, 0, how)
        assert result.value == 2 and "altered" in result.stderr
    else:
        with pytest.raises(RanksFailed):
            ranks.run(world_size, "tests.dist.jobs.train_with_broken_evaluation", arguments, 1, how)
    assert checkpoint_names(run) == [LAST] and len(read_metrics(run)) == STEPS
    train(run, layout, "checkpoint.interval=null", "eval.interval=null")
    last, reference = read_metrics(run)[-1:], trained(layout).records[-1:]
    assert_same_losses(last, reference, 0)


def test_saves_by_time(train: Train, tmp_path: Path) -> None:
    settings = ("checkpoint.interval=null", "checkpoint.keep_last=9", "train.steps=4", "checkpoint.async_save=false")
    train(tmp_path / "often", "dp2", *settings, "checkpoint.interval_s=1e-9")
    assert checkpoint_names(tmp_path / "often") == [f"step_{step:08d}" for step in range(1, 5)]
    train(tmp_path / "never", "single", *settings, "checkpoint.interval_s=null")
    assert checkpoint_names(tmp_path / "never") == ["step_00000004"]


def test_a_signal_while_the_ranks_join(ranks: RankPool, config: Path, tmp_path: Path) -> None:
    with socket.socket() as nobody:  # takes the connection and never answers
        nobody.bind(("127.0.0.1", 0))
        nobody.listen()
        arguments = _arguments(config, tmp_path / "run", "dp2")
        with pytest.raises(RanksFailed) as caught:
            ranks.run(1, "tests.dist.jobs.train_stopped_while_joining", arguments, nobody.getsockname()[1], timeout=60)
    assert caught.value.exit_codes == {0: 75}, caught.value
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_signal_in_the_last_step_leaves_the_evaluation(
    evaluates: bool, ranks: RankPool, config: Path, tmp_path: Path
) -> None:
    """Where there is none, the run is done."""
    run, settings = tmp_path / "run", ["train.steps=3", *([] if evaluates else ["data.validation=null", "eval.interval=null"])]
    arguments = _arguments(config, run, "single", *settings)
    (result,) = ranks.run(1, "tests.dist.jobs.train_with_signals", arguments, [(0, "step 3", signal.SIGUSR1)])
    assert result.value == (75 if evaluates else 0)
    assert ("stopped on request (SIGUSR1) at step 3" if evaluates else "done at step 3") in result.stdout
    assert checkpoint_names(run) == ["step_00000003"]
    if evaluates:
        (again,) = ranks.run(1, "megatron_synth.cli.main.main", arguments)
        assert again.value == 0 and "eval step 3" in again.stdout and "done at step 3" in again.stdout
        assert len(read_metrics(run)) == 3 and "eval/loss/val" in read_metrics(run)[-1]


# ---- which checkpoints there are


def test_keep_last_and_keep_every(train: Train, tmp_path: Path) -> None:
    settings = ("train.steps=9", "checkpoint.interval=1", "checkpoint.keep_last=2", "checkpoint.keep_every=3")
    train(tmp_path / "run", "single", *settings)
    assert checkpoint_names(tmp_path / "run") == [f"step_{step:08d}" for step in (3, 6, 8, 9)]


def test_keep_last_alone(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "run", "single", "train.steps=5", "checkpoint.interval=2", "checkpoint.keep_last=1")
    assert checkpoint_names(tmp_path / "run") == ["step_00000005"]


def test_latest_may_name_a_checkpoint_that_is_gone(trained: Callable[..., Run], train: Train, tmp_path: Path) -> None:
    reference = trained("single")
    run = rewound(reference.path, tmp_path / "run", HALF)
    (run / "checkpoints" / "latest").write_text(f"{LAST}\n")
    results = train(run, "single")
    assert f"resumed at step {HALF}" in results[0].stdout
    assert_same_losses(read_metrics(run), reference.records, 0)


def test_a_checkpoint_without_its_trainer_state_does_not_count(
    trained: Callable[..., Run], train: Train, tmp_path: Path
) -> None:
    reference = trained("single")
    run = tmp_path / "run"
    shutil.copytree(reference.path, run)
    (run / "checkpoints" / LAST / "trainer.json").unlink()
    results = train(run, "single")
    assert f"resumed at step {HALF}" in results[0].stdout
    assert_same_losses(read_metrics(run), reference.records, 0)


def test_going_back_to_an_older_checkpoint_keeps_what_is_saved_then(
    trained: Callable[..., Run], train: Train, ranks: RankPool, config: Path, tmp_path: Path
) -> None:
    reference = trained("single")
    run = tmp_path / "run"
    shutil.copytree(reference.path, run)
    (run / "checkpoints" / "latest").write_text(f"step_{HALF:08d}\n")
    stop = [(0, "step 2", signal.SIGTERM)]
    arguments = _arguments(config, run, "single", "checkpoint.keep_last=1")
    (result,) = ranks.run(1, "tests.dist.jobs.train_with_signals", arguments, stop)
    assert result.value == 75
    results = train(run, "single")
    assert f"resumed at step {HALF + 2}" in results[0].stdout
    assert_same_losses(read_metrics(run), reference.records, 0)


# ---- killed in the middle of a save


@pytest.mark.parametrize("moment", ["shards", "torn shards", "trainer.json", "manifest.json", "rename", "latest", "prune"])
def test_a_kill_in_a_save_leaves_the_checkpoint_before(
    moment: str, ranks: RankPool, config: Path, trained: Callable[..., Run], train: Train, tmp_path: Path
) -> None:
    reference, run, interval = trained("single"), tmp_path / "run", "checkpoint.interval=5"
    arguments = _arguments(config, run, "single", interval)
    with pytest.raises(RanksFailed) as caught:
        ranks.run(1, "tests.dist.jobs.train_killed_in_save", arguments, moment, 2, 0)
    assert caught.value.exit_codes == {0: -signal.SIGKILL}
    run_id = _run_id(run)
    resumed_at = 10 if moment == "prune" else 5  # `latest` is written before anything is removed
    assert (run / "checkpoints" / "latest").read_text() == f"step_{resumed_at:08d}\n"
    results = train(run, "single", interval)
    assert f"resumed at step {resumed_at}" in results[0].stdout
    assert_same_losses(read_metrics(run), reference.records, 0)
    assert read_ledger(run) == reference.ledger and _run_id(run) == run_id
    assert checkpoint_names(run) == ["step_00000015", LAST]
    _assert_bit_equal_weights(ranks, run, reference.path)


def test_a_kill_of_one_rank_in_the_first_save(
    ranks: RankPool, config: Path, trained: Callable[..., Run], train: Train, tmp_path: Path
) -> None:
    run, interval = tmp_path / "run", "checkpoint.interval=5"
    arguments = _arguments(config, run, "tp2", interval)
    with pytest.raises(RanksFailed) as caught:
        ranks.run(2, "tests.dist.jobs.train_killed_in_save", arguments, "shards", 1, 1)
    assert caught.value.exit_codes[1] == -signal.SIGKILL
    assert not [name for name in checkpoint_names(run) if not name.endswith(".tmp")]
    results = train(run, "tp2", interval)
    assert "resumed" not in results[0].stdout
    assert_same_losses(read_metrics(run), trained("tp2").records, 0)


# ---- what a run cannot become


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        (
            ("data.sources.web.ratio=1/2", "data.sources.qa.ratio=1/2"),
            ("the mixture differs", "80 samples", "checkpoint.init_from"),
        ),
        (("train.seed=7",), ("the mixture differs", "checkpoint.init_from")),
        (("model.ffn_hidden_size=64",), ("model.ffn_hidden_size was 128 and is now 64",)),
        (("precision.dtype=bf16",), ("precision.dtype was fp32 and is now bf16", "checkpoint.init_from")),
        (
            (PLAIN_OPTIMIZER,),
            ("parallel.use_distributed_optimizer was True and is now False", "checkpoint.init_from"),
        ),
    ],
)
def test_a_run_cannot_go_on_as_another(
    settings: tuple[str, ...], texts: tuple[str, ...], trained: Callable[..., Run], train: Train, tmp_path: Path
) -> None:
    run = rewound(trained("single").path, tmp_path / "run", HALF)
    before = snapshot(run)
    (result,) = train(run, "single", *settings, code=2)
    assert result.stderr.startswith(f"error: {run}") and result.stderr.count("error:") == 1
    for text in texts:
        assert text in result.stderr
    assert snapshot(run) == before


# ---- weights of another run


@pytest.mark.parametrize(("layout", "rtol"), [("single", 0.0), ("tp2pp2", 1e-5)])
def test_init_from_takes_the_weights_alone(
    layout: str, rtol: float, trained: Callable[..., Run], train: Train, tmp_path: Path
) -> None:
    source, run = trained("single"), tmp_path / "run"
    # steps so small that they change no weight: the evaluation shows the weights that were taken
    settings = (f"checkpoint.init_from={source.path}", "train.steps=2", "optim.lr=1e-30", "optim.warmup_steps=0")
    train(run, layout, *settings)
    first, last = read_metrics(run)
    assert (first["step"], first["data/tokens"]) == (1, source.records[0]["data/tokens"])
    assert _run_id(run) != _run_id(source.path)
    evaluated: dict[str, Any] = {k: v for k, v in source.records[-1].items() if k.startswith("eval/")}
    assert len(evaluated) == 8  # loss, labels and bits per byte of both domains, and two means
    for name, value in evaluated.items():
        assert math.isclose(last[name], value, rel_tol=rtol), name


def test_a_run_begun_with_init_from_resumes_its_own_checkpoint(
    trained: Callable[..., Run], train: Train, ranks: RankPool, config: Path, tmp_path: Path
) -> None:
    source = trained("single")
    settings = (f"checkpoint.init_from={source.path}", "train.steps=4")
    train(tmp_path / "straight", "single", *settings)
    run = tmp_path / "run"
    arguments = _arguments(config, run, "single", *settings)
    (result,) = ranks.run(1, "tests.dist.jobs.train_with_signals", arguments, [(0, "step 2", signal.SIGTERM)])
    assert result.value == 75
    train(run, "single", *settings)
    assert_same_losses(read_metrics(run), read_metrics(tmp_path / "straight"), 0)
    # the optimizer and the data began again
    assert read_metrics(run)[0]["optim/grad_norm"] != source.records[0]["optim/grad_norm"]
    assert read_metrics(run)[0]["data/tokens"] == source.records[0]["data/tokens"]
