"""The average of the weights: that of a plain loop, in every layout, through resumes, in evaluations and exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_synth.train.checkpoint import files
from tests.dist.conftest import Run, Train
from tests.dist.pool import RankPool
from tests.support import STEPS, assert_same_losses, read_metrics, rewound

MAIN = "megatron_synth.cli.main.main"
DECAY = 0.8
WEIGHTS = ("optimizer.state.param.", "")
"""What the names of fp32 weights begin with; those of an optimizer that is not distributed are the model's own."""
EMA = f"optim.ema_decay={DECAY}"


def stored(run: Path, step: int, prefix: str) -> dict[str, torch.Tensor]:
    from megatron_synth.train.checkpoint.format.stored import Stored

    with Stored(run / "checkpoints" / files.name_of(step)) as opened:
        beside = () if prefix else ("optimizer.", "ema.")
        keys = [key for key in opened.shapes if key.startswith(prefix) and not key.startswith(beside)]
        return {
            key.removeprefix(prefix): opened.read(key, (0,) * len(opened.shapes[key]), opened.shapes[key]) for key in keys
        }


def averages(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith("ema/")}


@pytest.mark.parametrize("layout", ["single", "single-plain", "tp2pp2", "dp2-overlap-both", "dp2-plain"])
def test_the_average_is_that_of_a_plain_loop(layout: str, trained: Callable[..., Run], train: Train, tmp_path: Path) -> None:
    """The weights of every step, averaged by hand, beside what the run keeps; the losses are not changed."""
    steps = ("checkpoint.interval=1", "checkpoint.keep_last=99", "train.steps=6", "eval.interval=3")
    reference = trained("single", *steps).path
    run = tmp_path / "run"
    train(run, layout, EMA, *steps)
    first = tmp_path / "first"
    train(first, "single", "optim.lr=1e-30", "optim.warmup_steps=0", "train.steps=1", "eval.interval=null", "optim.weight_decay=0")
    expected = {key: value.double() for key, value in stored(first, 1, "optimizer.state.param.").items()}
    for step in range(1, 7):
        for key, value in stored(run, step, WEIGHTS[layout.endswith("plain")]).items():
            expected[key] = DECAY * expected[key] + (1 - DECAY) * value.double()
    found = stored(run, 6, "ema.")
    assert found.keys() == expected.keys() and len(found) > 8
    for key, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-6, atol=1e-7)
    records, plain = read_metrics(run), read_metrics(reference)
    assert_same_losses(records, plain, 0 if layout == "single" else 1e-5)
    assert averages(records[2]).keys() == {f"ema/{name}" for name in ("loss", "loss/val", "loss/val2", "bpb", "bpb/val", "bpb/val2")}
    assert averages(records[2])["ema/loss"] != records[2]["eval/loss"]


def test_resumed_and_in_another_layout_it_is_the_same(
    trained: Callable[..., Run], train: Train, ranks: RankPool, tmp_path: Path
) -> None:
    reference = trained("dp2", EMA)
    for layout, tolerance in (("dp2", 0.0), ("tp2", 1e-5)):
        run = rewound(reference.path, tmp_path / layout, STEPS // 2)
        train(run, layout, EMA)
        ours, theirs = stored(run, STEPS, "ema."), stored(reference.path, STEPS, "ema.")
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]) if not tolerance else torch.allclose(value, theirs[key], rtol=0, atol=1e-6)
        assert averages(read_metrics(run)[-1]) == pytest.approx(averages(reference.records[-1]), rel=tolerance or 0, abs=0)
    # evaluated and exported afterwards, and as the beginning of another run, it is what was evaluated in the loop
    run = tmp_path / "dp2"
    expected = averages(reference.records[-1])
    (result,) = ranks.run(1, MAIN, ["eval", str(run), "--ema"])
    assert result.value == 0, result.stderr
    assert f"{expected['ema/loss']:.4f}" in result.stdout
    (result,) = ranks.run(1, MAIN, ["convert", "to-hf", str(run), str(tmp_path / "hf"), "--ema"])
    assert result.value == 0, result.stderr
    (result,) = ranks.run(1, MAIN, ["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "back")])
    assert result.value == 0, result.stderr
    taken = ("checkpoint.init_ema=true", "train.steps=1", "optim.lr=1e-30", "optim.weight_decay=0", "optim.warmup_steps=0")
    for name, settings in {"own": (f"checkpoint.init_from={run}", *taken), "hf": (f"checkpoint.init_from={tmp_path / 'back'}", *taken[1:])}.items():
        train(tmp_path / f"from-{name}", "tp2", *settings)
        found = read_metrics(tmp_path / f"from-{name}")[-1]
        assert found["eval/loss"] == pytest.approx(expected["ema/loss"], rel=1e-5)
    (result,) = train(tmp_path / "none", "single", f"checkpoint.init_from={tmp_path / 'back'}", *taken, code=2)
    assert "holds no average of the weights" in result.stderr
    assert not (tmp_path / "none" / "run.json").exists()  # refused before a run begins
