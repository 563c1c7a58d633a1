"""What only a GPU can show: `make test-gpu` on a machine with one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_synth.train.record import metrics
from tests.support import child_environment, read_ledger, read_metrics, write_config, write_corpus

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    return write_config(folder / "base.yaml", write_corpus(folder / "corpus"))


def train(config: Path, run: Path, *settings: str, gpu: bool = True) -> Path:
    environment = child_environment()
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "megatron_synth", "train", str(config), *settings, "--run-dir", str(run)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return run


MASKS = ("data.document_masks=true", "data.eod_mask_loss=true")


@pytest.mark.parametrize("settings", [(), MASKS], ids=["rows", "documents"])
def test_losses_are_those_of_the_cpu(config: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """The same seed, fp32 without TF32: another device is another rounding, not another run."""
    gpu = read_metrics(train(config, tmp_path / "gpu", *settings))
    cpu = read_metrics(train(config, tmp_path / "cpu", *settings, gpu=False))
    for name, tolerance in ((metrics.LOSS, 1e-4), (metrics.GRAD_NORM, 1e-3)):
        assert [record[name] for record in gpu] == pytest.approx([record[name] for record in cpu], rel=tolerance), name
    assert read_ledger(tmp_path / "gpu") == read_ledger(tmp_path / "cpu")


def test_documents_in_bf16_are_those_of_fp32(config: Path, tmp_path: Path) -> None:
    """bf16 goes through flash attention, fp32 through a mask."""
    flash = read_metrics(train(config, tmp_path / "bf16", *MASKS, "precision.dtype=bf16"))
    masked = read_metrics(train(config, tmp_path / "fp32", *MASKS))
    assert [record[metrics.LOSS] for record in flash] == pytest.approx([record[metrics.LOSS] for record in masked], rel=0.02)


def test_same_seed_same_losses(config: Path, tmp_path: Path) -> None:
    first, second = (read_metrics(train(config, tmp_path / name)) for name in ("a", "b"))
    assert [record[metrics.LOSS] for record in first] == pytest.approx([record[metrics.LOSS] for record in second], rel=1e-6)


def test_bf16_trains_and_resumes(config: Path, tmp_path: Path) -> None:
    run = train(config, tmp_path / "run", "precision.dtype=bf16", "optim.schedule=constant")
    losses = [record[metrics.LOSS] for record in read_metrics(run)]
    assert losses[-1] < losses[0] - 0.05
    train(config, run, "precision.dtype=bf16", "optim.schedule=constant", "train.steps=25")
    records = read_metrics(run)
    assert [record[metrics.STEP] for record in records] == list(range(1, 26))
    assert records[-1][metrics.PEAK_GIB] > 0


def test_checkpoints_written_from_pinned_memory_are_sound_and_resumed(config: Path, tmp_path: Path) -> None:
    from megatron_synth.train.checkpoint import files

    settings = ("precision.dtype=bf16", "optim.schedule=constant", "checkpoint.interval=1", "checkpoint.keep_last=20")
    run = train(config, tmp_path / "run", *settings)
    found = files.all_of(run / "checkpoints")
    assert len(found) == 20
    assert [files.faults(checkpoint, checksums=True) for checkpoint in found] == [[]] * 20
    whole = [record[metrics.LOSS] for record in read_metrics(run)]
    (run / "checkpoints" / "latest").write_text(found[9].name + "\n")
    resumed = [record[metrics.LOSS] for record in read_metrics(train(config, run, *settings))]
    assert resumed == pytest.approx(whole, rel=1e-6)


def test_the_gradient_norm_is_that_of_fp64_in_one_pass() -> None:
    """However tensors are cut, and without a copy of them."""
    import torch

    from megatron_synth.train.grad_norm import square_sum

    numbers = torch.randn(25_000_001, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    right = numbers.double().square().sum().item()
    for parts in ([numbers], list(numbers.chunk(2)), list(numbers.split(999_999))):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        assert square_sum(parts).item() == pytest.approx(right, rel=1e-12)
        assert torch.cuda.max_memory_allocated() - before < 1 << 20
