"""Muon: one run in every layout, as torch's own on transformers' Llama, resumed to the bit, and for AdamW's part AdamW."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.train.record import metrics
from tests.dist.conftest import Run, Train
from tests.dist.pool import RankPool
from tests.dist.layouts.test_huggingface import STEPS as HF_STEPS
from tests.dist.layouts.test_huggingface import load_llama, train_llama
from tests.dist.checkpoint.test_resume import _assert_bit_equal_weights
from tests.support import STEPS, assert_same_losses, read_metrics, rewound

MUON = "optim.name=muon"
HALF = STEPS // 2


# fp32 throughout: the same sums in another order. Small buckets cut matrices between ranks, and put several into one bucket.
@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("tp2pp2-plain", ()),
        ("tp2dp2", ("parallel.ddp_bucket_size=30000",)),
        ("pp2vp2dp2-overlap-both", ()),
    ],
)
def test_every_layout_is_the_same_run(layout: str, more: tuple[str, ...], trained: Callable[..., Run]) -> None:
    reference, run = trained("single", MUON), trained(layout, MUON, *more)
    assert_same_losses(run.records, reference.records, 1e-5)
    assert reference.records[-1][metrics.LOSS] < reference.records[0][metrics.LOSS] - 0.5
    assert reference.records[-1][metrics.LOSS] != trained("single").records[-1][metrics.LOSS]


class TorchMuon(torch.optim.Optimizer):
    """torch's Muon for the matrices of the layers, in fp32, and its AdamW for the rest, as one optimizer."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float):
        layers = set(map(id, self.matrices))
        matrices = [p for group in groups for p in group["params"] if id(p) in layers]
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in layers]
        super().__init__(groups, {})
        self.adam = torch.optim.AdamW(groups, betas=betas, eps=eps)
        self.muon = torch.optim.Muon(matrices, weight_decay=groups[0]["weight_decay"], adjust_lr_fn="match_rms_adamw")
        self.param_groups = [*self.adam.param_groups, *self.muon.param_groups]

    matrices: tuple[torch.Tensor, ...] = ()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.adam.step()
        self.muon.step()


def test_ten_steps_as_torch_does(
    ranks: RankPool, trained: Callable[..., Run], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks.run(1, "tests.dist.layouts.hf_jobs.export_initial", str(config), [], str(tmp_path / "hf"))
    model = load_llama(tmp_path / "hf")
    monkeypatch.setattr(TorchMuon, "matrices", tuple(p for n, p in model.named_parameters() if "layers" in n and p.ndim == 2))
    assert len(TorchMuon.matrices) == 4 * 7
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())  # torch's iteration, in fp32
    monkeypatch.setattr(torch.optim, "AdamW", _once(TorchMuon, torch.optim.AdamW))
    expected = train_llama(model, load_file(Config, config, (MUON,)))
    found = [record[metrics.LOSS] for record in trained("tp2dp2", MUON, "parallel.ddp_bucket_size=30000").records]
    # both in fp32; the iteration multiplies what rounding leaves in directions without a gradient
    assert found[:HF_STEPS] == pytest.approx(expected, abs=1e-4, rel=0)
    assert expected[-1] < expected[0] - 0.05


def _once(outer: Any, inner: Any) -> Any:
    """`outer` where it is first asked for, `inner` for `outer` itself."""
    left = [outer]
    return lambda *args, **options: (left.pop() if left else inner)(*args, **options)


@pytest.mark.parametrize("layout", ["tp2dp2", "tp2pp2-plain"])
def test_resuming(layout: str, trained: Callable[..., Run], train: Train, ranks: RankPool, tmp_path: Path) -> None:
    reference = trained(layout, MUON)
    run = rewound(reference.path, tmp_path / "run", HALF)
    train(run, layout, MUON)
    assert_same_losses(read_metrics(run), reference.records, 0)
    _assert_bit_equal_weights(ranks, run, reference.path)
    if not layout.endswith("plain"):
        other = rewound(reference.path, tmp_path / "other", HALF)
        train(other, "cp2", MUON)
        assert_same_losses(read_metrics(other), reference.records, 1e-5)


def test_in_bf16_and_with_an_average(trained: Callable[..., Run], train: Train, tmp_path: Path) -> None:
    settings = (MUON, "precision.dtype=bf16", "optim.ema_decay=0.9")
    run = trained("dp2", *settings)
    again = rewound(run.path, tmp_path / "run", HALF)
    train(again, "dp2", *settings)
    assert_same_losses(read_metrics(again), run.records, 0)
    assert run.records[-1][metrics.LOSS] < run.records[0][metrics.LOSS] - 0.5


def test_a_run_keeps_its_optimizer(trained: Callable[..., Run], train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained("single").path, run)
    (result,) = train(run, "single", MUON, f"train.steps={2 * STEPS}", code=2)
    assert "optim.name was adamw and is now muon; a run cannot change it" in result.stderr
