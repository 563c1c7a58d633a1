"""FP8 on several ranks: one layer against the whole of it, whole runs against each other, and after a resume.

A layer's numbers agree to fp32 rounding. Whole runs agree so as long as no number falls on the other side of a rounding boundary of
FP8, where a difference of 1e-7 becomes one of 6 to 25 %; with tensor parallelism, whose sums have another order, that happens in the
first step, with data parallelism, where gradients alone are summed in another order, some steps later, with pipelines never.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.dist.conftest import Run, Train
from tests.dist.pool import RankPool
from tests.support import STEPS, checkpoint_names, read_metrics, rewound

LOSS, NORM = "train/loss", "optim/grad_norm"
LOSS_APART, NORM_APART = 3e-3, 0.12
"""Relative, over 20 steps, once roundings have parted: measured 1.0e-3 and 4.6e-2; FP8 and fp32 are as far apart."""
BLOCKWISE = (
    *("precision.fp8=blockwise", "model.hidden_size=256", "model.num_attention_heads=8", "model.num_query_groups=4"),
    *("model.ffn_hidden_size=256", "model.num_layers=2", "train.sequence_length=64", "train.steps=4", "optim.warmup_steps=1"),
    *("data.sources.web.max_epochs=20", "data.sources.qa.max_epochs=20", "eval.batches=1"),
)


# ---- one layer


@pytest.fixture(scope="module")
def whole(ranks: RankPool) -> Callable[..., dict[str, np.ndarray]]:
    """Output and gradients of a layer on one rank."""

    @cache
    def call(kind: str, recipe: str, number_format: str) -> dict[str, np.ndarray]:
        (result,) = ranks.run(1, "tests.dist.fp8.fp8_jobs.layer", kind, recipe, number_format, False)
        return dict(result.value)

    return call


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("recipe", ["delayed", "current", "blockwise"])
def test_a_shared_layer_is_the_layer(
    recipe: str, kind: str, sequence_parallel: bool, whole: Callable[..., dict[str, np.ndarray]], ranks: RankPool
) -> None:
    expected = whole(kind, recipe, "hybrid")
    results = ranks.run(2, "tests.dist.fp8.fp8_jobs.layer", kind, recipe, "hybrid", sequence_parallel)
    sequence = 0 if sequence_parallel else None
    axes = {"y": 2, "dx": sequence, "dw": 0} if kind == "column" else {"y": sequence, "dx": 2, "dw": 1}
    for name, axis in axes.items():
        parts = [result.value[name] for result in results]
        found = parts[0] if axis is None else np.concatenate(parts, axis)
        error = np.linalg.norm(found - expected[name]) / np.linalg.norm(expected[name])
        assert found.shape == expected[name].shape and error < 1e-6, (name, error)
        if axis is None:
            np.testing.assert_array_equal(parts[1], parts[0])


def test_a_layer_keeps_its_promises_to_the_engine(ranks: RankPool) -> None:
    ranks.run(1, "tests.dist.fp8.fp8_jobs.contract")


# ---- whole runs


def apart(run: Run, reference: Run, name: str) -> list[float]:
    """Relative difference by step."""
    pairs = zip(run.records, reference.records, strict=True)
    return [abs(ours[name] - theirs[name]) / abs(theirs[name]) for ours, theirs in pairs]


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("pp2vp2", ("precision.fp8=current",)),
        ("tp2pp2", ("precision.fp8=current", "precision.fp8_format=e4m3")),
        ("dp2-overlap-both", ("precision.fp8=delayed",)),
        ("tp2", ("precision.fp8=delayed",)),
        ("tp2pp2", BLOCKWISE),
        ("dp2", BLOCKWISE),
    ],
    ids=["current-pp2vp2", "current-tp2pp2", "delayed-dp2", "delayed-tp2", "blockwise-tp2pp2", "blockwise-dp2"],
)
def test_every_layout_is_the_same_run(layout: str, settings: tuple[str, ...], trained: Callable[..., Run]) -> None:
    reference, run = trained("single", *settings), trained(layout, *settings)
    losses, norms = apart(run, reference, LOSS), apart(run, reference, NORM)
    assert reference.records[0][LOSS] != trained("single").records[0][LOSS], "not even FP8's rounding is seen"
    if "tp2" not in layout and "dp2" not in layout:
        assert max(losses) == 0 and max(norms) < 1e-14
    elif "tp2" not in layout:  # the gradients of the first steps are equal to fp32 rounding
        assert max(losses[:3]) < 1e-7 and max(norms[:3]) < 1e-6
    assert losses[0] < 1e-6 and norms[0] < 1e-3
    assert max(losses) < LOSS_APART and max(norms) < NORM_APART
    assert run.ledger == reference.ledger


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("single", ("precision.fp8=delayed", "precision.dtype=bf16", "train.recompute=selective")),
        ("tp2pp2", ("precision.fp8=delayed", "precision.fp8_amax_history_len=2", "precision.fp8_first_last_bf16=1")),
        ("dp2-overlap-both", ("precision.fp8=current", "precision.dtype=bf16", "train.recompute=full")),
        ("single", (*BLOCKWISE, "precision.dtype=bf16")),
        ("tp2", BLOCKWISE),
    ],
    ids=["delayed-single", "delayed-tp2pp2", "current-dp2", "blockwise-single", "blockwise-tp2"],
)
def test_quantizing_in_norms_and_swiglu_changes_no_bit(
    layout: str, settings: tuple[str, ...], trained: Callable[..., Run]
) -> None:
    settings += ("train.steps=5", "optim.warmup_steps=2", "precision.fp8_log_every=2")
    fused, apart = (trained(layout, *settings, f"precision.fp8_fused={value}") for value in ("true", "false"))
    assert len(fused.records) == 5
    for ours, theirs in zip(fused.records, apart.records, strict=True):
        numbers = {name for name, value in ours.items() if name in (LOSS, NORM, "eval/loss") or name.endswith(("/amax", "/underflow"))}
        assert {name: ours[name] for name in numbers} == {name: theirs[name] for name in numbers}
    assert "SwiGLU" in fused.records[0]["fp8/layers"] and "quantized apart" in apart.records[0]["fp8/layers"]


@pytest.mark.parametrize(("fp8", "layout"), [("delayed", "tp2pp2"), ("current", "single")])
def test_resuming_in_the_same_layout_is_bit_equal(
    fp8: str, layout: str, trained: Callable[..., Run], train: Train, tmp_path: Path
) -> None:
    settings = (f"precision.fp8={fp8}", *(("precision.fp8_format=e4m3",) if fp8 == "current" else ()))
    settings += ("precision.fp8_amax_history_len=4", "optim.warmup_steps=6") if fp8 == "delayed" else ()
    reference = trained(layout, *settings)
    run = rewound(reference.path, tmp_path / "run", STEPS // 2)
    train(run, layout, *settings)
    for ours, theirs in zip(read_metrics(run), reference.records, strict=True):
        assert (ours[LOSS], ours[NORM]) == (theirs[LOSS], theirs[NORM]), ours["step"]
        assert ours.get("eval/loss") == theirs.get("eval/loss")


def test_the_history_moves_to_another_layout(trained: Callable[..., Run], train: Train, tmp_path: Path) -> None:
    settings = ("precision.fp8=delayed", "precision.fp8_amax_history_len=4", "optim.warmup_steps=6")
    reference = trained("tp2pp2", *settings)
    run = rewound(reference.path, tmp_path / "run", STEPS // 2)
    results = train(run, "dp2", *settings, "precision.fp8_log_every=11")
    assert f"resumed at step {STEPS // 2}" in results[0].stdout
    records = read_metrics(run)
    for ours, theirs in zip(records, reference.records, strict=True):
        assert abs(ours[LOSS] - theirs[LOSS]) < LOSS_APART * theirs[LOSS]
    # the scales of step 11 are those of steps 7 to 10 and not of step 11's own magnitudes
    seen = records[STEPS // 2]
    scale, amax = (seen[f"fp8/layers.2.mlp.linear_fc1/input/{name}"] for name in ("scale", "amax"))
    assert 448 / scale != pytest.approx(amax, rel=1e-6) and 0.5 < 448 / scale / amax < 2
    assert checkpoint_names(run) == [f"step_{STEPS // 2:08d}", f"step_{STEPS:08d}"]


def test_layers_are_watched_in_every_layout(trained: Callable[..., Run]) -> None:
    settings = ("precision.fp8=current", "precision.fp8_format=e4m3", "precision.fp8_log_every=10", "train.steps=10")
    settings += ("optim.warmup_steps=3", "precision.fp8_first_last_bf16=true")
    one, four = (trained(layout, *settings).records for layout in ("single", "tp2pp2"))
    assert not any(name.endswith("/amax") for name in one[8])
    names = {name for name in one[9] if name.startswith("fp8/")}
    assert len(names) == 2 * 4 * 3 * 4 and names == {name for name in four[9] if name.startswith("fp8/")}
    assert not any("layers.0." in name or "layers.3." in name for name in names), "the ends stay in the run's dtype"
    for name in names:
        kind = name.rpartition("/")[2]
        value, other = one[9][name], four[9][name]
        if kind in ("amax", "scale"):
            assert value > 0 and other == pytest.approx(value, rel=0.3), name
        else:
            assert 0 <= value < 0.2 and abs(other - value) < 0.05, name
    assert any(one[9][name] > 0 for name in names if name.endswith("grad/underflow"))
    assert "layers 1 to 2" in one[0]["fp8/layers"] and "fp8/layers" not in one[1]


# ---- refusals


def test_what_cannot_be_had_is_refused_before_anything_is_written(ranks: RankPool, config: Path, tmp_path: Path) -> None:
    arguments = ["train", str(config), *BLOCKWISE, "precision.fp8=current", "--run-dir", str(tmp_path / "run")]
    (result,) = ranks.run(1, "tests.dist.fp8.fp8_jobs.train_without_products", arguments)
    assert result.value == 2 and not (tmp_path / "run").exists()
    for text in ("precision.fp8: current (hybrid)", "linear_qkv", "only supported on devices", "what works here: blockwise (hybrid), blockwise (e4m3)"):
        assert text in result.stderr


def test_a_run_cannot_change_its_recipe(trained: Callable[..., Run], train: Train, tmp_path: Path) -> None:
    run = rewound(trained("single").path, tmp_path / "run", STEPS // 2)
    (result,) = train(run, "single", "precision.fp8=current", code=2)
    assert "precision.fp8 was off and is now current" in result.stderr
