"""A run with the Triton kernels is the run with torch's: here interpreted, in every part of the model and on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_synth_kernels.registry import OPERATIONS, TRITON
from tests.dist.conftest import Run, Train
from tests.support import assert_same_losses

pytest.importorskip("triton")
SMALL = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "train.steps=2",
    "train.global_batch_size=2",
    "train.micro_batch_size=1",
    "train.sequence_length=16",
    "optim.warmup_steps=0",
    "checkpoint.interval=null",
    "eval.interval=null",
    "eval.batches=1",
)
NAMES = [name for name, operation in OPERATIONS.items() if any(backend.name == TRITON for backend in operation.backends)]
KERNELS = tuple(f"kernels.{name}=triton" for name in NAMES)
RTOL = 1e-5


@pytest.mark.parametrize(
    ("layout", "settings"), [("single", ("data.document_masks=true",)), ("tp2pp2", ())], ids=["document-masks", "tp2pp2"]
)
def test_the_same_run(layout: str, settings: tuple[str, ...], trained: Callable[..., Run]) -> None:
    reference, run = trained("single", *SMALL, *settings), trained(layout, *SMALL, *settings, *KERNELS)
    assert_same_losses(run.records, reference.records, RTOL)
    assert f"kernels triton: {', '.join(NAMES)} (forced by the configuration)" in run.results[0].stdout
    assert "kernels torch: " in reference.results[0].stdout and "kernels triton" not in reference.results[0].stdout


def test_a_kernel_that_cannot_be_had_is_told_once_and_nothing_is_written(train: Train, tmp_path: Path) -> None:
    results = train(tmp_path / "run", "tp2", *SMALL, "kernels.wgrad=apex", code=2)
    told = "kernels.wgrad: wgrad by apex is unavailable on cpu: needs a CUDA device"
    assert told in results[0].stderr and results[1].stderr == ""
    assert not (tmp_path / "run").exists()
