"""Weights in FP8, with a stand-in for TransformerEngine's tensors: start, training, evaluation, checkpoints, from on to off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dist.pool import RankPool
from tests.dist.fp8.test_fp8_ranks import LOSS_APART
from tests.support import read_metrics, rewound

SETTINGS = (
    "precision.dtype=bf16",
    "precision.fp8=current",
    "precision.fp8_log_every=2",
    "train.steps=4",
    "optim.warmup_steps=1",
)
SETTINGS += ("eval.interval=2", "eval.batches=1", "optim.schedule=constant", "checkpoint.interval=2")
DP2 = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
TINY_STEP = ("optim.lr=1e-9", "optim.min_lr=0", "train.steps=1")
LOSSES, NORM = ("train/loss", "eval/loss"), "optim/grad_norm"


def test_weights_in_fp8_train_and_are_saved_as_bf16_ones_are(ranks: RankPool, config: Path, tmp_path: Path) -> None:
    def train(name: str, size: int, in_fp8: bool, *settings: str) -> list[dict[str, Any]]:
        gather = f"precision.fp8_param_gather={str(in_fp8).lower()}"
        arguments = ["train", str(config), *SETTINGS, *settings, gather, "--run-dir", str(tmp_path / name)]
        for result in ranks.run(size, "tests.dist.fp8.fp8_param_jobs.train", arguments):
            assert result.value == 0, result.stderr
        return read_metrics(tmp_path / name)

    off, on = train("off", 2, False, *DP2), train("on", 2, True, *DP2)
    assert "weights kept and gathered in FP8" in str(on[0]["fp8/layers"])
    for ours, theirs in zip(on, off, strict=True):
        # the same numbers are multiplied, in the same order; only the norm's sum, in fp64, follows the order of other buffers
        told = [name for name in LOSSES if name in theirs]
        assert [ours[name] for name in told] == [theirs[name] for name in told]
        assert ours[NORM] == pytest.approx(theirs[NORM], rel=1e-14)
    watched = {name for name in off[1] if name.startswith("fp8/layers.")}
    hidden = {name for name in watched if "/weight/" in name and name.endswith("flow")}
    assert len(watched) == 4 * 4 * 3 * 4 and {name for name in on[1] if name.startswith("fp8/layers.")} == watched - hidden
    for name in watched - hidden:
        assert on[1][name] == off[1][name], name

    # what is saved: the same names, weights of bf16 that are the optimizer's, nothing on the grid of FP8
    (weights,) = ranks.run(1, "tests.dist.fp8.fp8_param_jobs.weights", str(tmp_path / "on"))
    (expected,) = ranks.run(1, "tests.dist.fp8.fp8_param_jobs.weights", str(tmp_path / "off"))
    assert weights.value.keys() == expected.value.keys() and len(weights.value) > 20
    for name, value in weights.value.items():
        np.testing.assert_array_equal(value, expected.value[name], err_msg=name)
    assert len(np.unique(weights.value["decoder.layers.0.mlp.linear_fc2.weight"])) > 512

    # on another layout; on to off; and off to on: always the same run
    reference = on[2:]
    for name, came_from, goes_on in (("same", "on", True), ("given-up", "on", False), ("taken-up", "off", True)):
        run = rewound(tmp_path / came_from, tmp_path / name, 2)
        resumed = train(name, 1 if name == "same" else 2, goes_on)[2:]
        assert run == tmp_path / name and len(resumed) == 2
        # one rank adds the gradients of all micro-batches in a row: where that rounds fp32 otherwise, FP8 may round the next
        # step's weights to the other side
        apart = (1e-12, LOSS_APART) if name == "same" else (0, 0)
        for ours, theirs, allowed in zip(resumed, reference, apart, strict=True):
            assert abs(ours["train/loss"] - theirs["train/loss"]) <= allowed * theirs["train/loss"], name

    # weights alone: the optimizer begins from them as they were saved; a step of Adam moves none by more than a few lr
    again = train("again", 2, True, f"checkpoint.init_from={tmp_path / 'on'}", *TINY_STEP)
    assert len(again) == 1
    (kept,) = ranks.run(1, "tests.dist.fp8.fp8_param_jobs.weights", str(tmp_path / "again"))
    for name, value in kept.value.items():
        np.testing.assert_allclose(value, weights.value[name], rtol=0, atol=1e-8, err_msg=name)
