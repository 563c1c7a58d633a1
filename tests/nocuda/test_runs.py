"""Training, resuming and evaluating on the device, by the command line, with the CPU computing: see numbers.py.

Losses are those of a run on the CPU. Run by `make gpu-rehearsal`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_synth.train.checkpoint import files
from megatron_synth.train.record import metrics
from tests.nocuda.build import build, environment
from tests.nocuda.numbers import TORCH_KERNELS
from tests.nocuda.ordered import faults
from tests.nocuda.rehearse import ROOT
from tests.support import read_ledger, read_metrics, write_config, write_corpus

FEW = ("train.steps=6", "optim.schedule=constant", "checkpoint.interval=2", "checkpoint.keep_last=9", "eval.interval=3")
FP8 = ("precision.dtype=bf16", "precision.fp8=current", "precision.fp8_backend=own", "model.hidden_size=64")
CASES = {
    "fp32": (),
    "bf16": ("precision.dtype=bf16",),
    "documents, fp32": ("data.document_masks=true", "data.eod_mask_loss=true"),
    "documents, bf16": ("data.document_masks=true", "data.eod_mask_loss=true", "precision.dtype=bf16"),
    "FP8": FP8,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    return write_config(folder / "base.yaml", write_corpus(folder / "corpus"))


def command(*arguments: str, on_device: bool = True, code: int = 0, order: Path | None = None, **more: str) -> str:
    """What a run of the command line printed. order: a file that is told what streams do in a wrong order."""
    module = "tests.nocuda.numbers" if on_device else "megatron_synth"
    base = {**environment(build(ROOT / "build/nocuda")), "NOCUDA_NUMBERS": "1"} if on_device else dict(os.environ)
    base |= {} if order is None else {"NOCUDA_ORDER": str(order)}
    base |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run([sys.executable, "-m", module, *arguments], env=base, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def train(config: Path, run: Path, *settings: str, **options: object) -> str:
    arguments = ("train", str(config), *FEW, *TORCH_KERNELS, *settings, "--run-dir", str(run))
    return command(*arguments, **options)  # type: ignore[arg-type]


def losses(run: Path) -> list[float]:
    return [record[metrics.LOSS] for record in read_metrics(run)]


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_of_the_cpu_and_goes_on_as_one(case: str, config: Path, tmp_path: Path) -> None:
    settings = CASES[case]
    order = tmp_path / "order.txt"
    printed = train(config, tmp_path / "device", *settings, order=order)
    assert faults(order) == []
    assert "NVIDIA H200" in printed
    train(config, tmp_path / "cpu", *settings, on_device=False)
    # fp32: another order of sums; bf16 and FP8 round what these orders make
    tolerance = 1e-5 if "precision.dtype=bf16" not in settings else 5e-3
    whole = losses(tmp_path / "device")
    assert len(whole) == 6 and whole == pytest.approx(losses(tmp_path / "cpu"), rel=tolerance)
    assert read_ledger(tmp_path / "device") == read_ledger(tmp_path / "cpu")

    # checkpoints are written by a thread from pinned memory while training goes on; each is sound, and the run resumes from one
    found = files.all_of(tmp_path / "device" / "checkpoints")
    assert [files.faults(checkpoint, checksums=True) for checkpoint in found] == [[]] * 3
    (tmp_path / "device" / "checkpoints" / "latest").write_text(found[1].name + "\n")
    assert "resumed at step" in train(config, tmp_path / "device", *settings)
    assert losses(tmp_path / "device") == whole, "a resume is bit-equal"


def test_an_evaluation_is_that_of_the_cpu(config: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "run")
    order = tmp_path / "order.txt"
    on_device = command("eval", str(tmp_path / "run"), order=order)
    on_cpu = command("eval", str(tmp_path / "run"), on_device=False)
    assert faults(order) == []
    assert _numbers(on_device) == pytest.approx(_numbers(on_cpu), rel=1e-4) and _numbers(on_device)


def _numbers(printed: str) -> list[float]:
    lines = [line.split() for line in printed.splitlines() if "val" in line]
    return [float(word) for line in lines for word in line if word.replace(".", "", 1).isdigit()]


def test_memory_of_the_host_that_cannot_be_pinned_is_a_warning_and_in_the_end_an_error(config: Path, tmp_path: Path) -> None:
    """As a full disk is: training goes on to its last step, and then says that nothing was saved."""
    printed = train(config, tmp_path / "run", NOCUDA_PINNED="1000", code=2)
    warnings = [line for line in printed.splitlines() if line.startswith("warning:") and "memory could be pinned" in line]
    assert [step in line for step, line in zip(("step 2 ", "step 4 "), warnings, strict=True)] == [True, True]
    assert len(losses(tmp_path / "run")) == 6 and "error:" in printed
