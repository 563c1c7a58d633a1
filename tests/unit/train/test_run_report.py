"""report.png of complete, young and bare runs."""

from __future__ import annotations

import math
import random
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_synth.cli.report import main
from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import Config
from megatron_synth.train.record import run_dir
from megatron_synth.train.record.figures import plot
from megatron_synth.train.record.figures.health import write_health
from megatron_synth.train.record.figures.plot import write_report
from megatron_synth.train.record.figures.values import write_values
from megatron_synth.train.record.metrics import MetricsFile, read_metrics
from megatron_synth.train.record.run_dir import RunDir
from megatron_synth.train.record.summary import summary

RATIOS = {"web": "67/100", "rephrased": "1/5", "qa": "1/10", "textbook": "3/100"}
BATCH, LENGTH = 64, 2048


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's name needs torch, which takes seconds to import."""
    monkeypatch.setattr(run_dir, "device_name", lambda: "NVIDIA H200")


def make_run(path: Path, steps: int, eval_every: int | None, *, per_source: bool = True, ledger: bool = True) -> Path:
    """A run directory as training would leave it, with invented but plausible numbers."""
    config = Config.model_validate(
        {
            "model": {
                "name": "llama-360m",
                "num_layers": 24,
                "hidden_size": 1024,
                "ffn_hidden_size": 2816,
                "num_attention_heads": 16,
                "num_query_groups": 4,
            },
            "data": {"sources": {name: {"path": name, "ratio": ratio} for name, ratio in RATIOS.items()}},
            "train": {"steps": 1200, "global_batch_size": BATCH, "sequence_length": LENGTH},
        }
    )
    run = RunDir.create_or_open(path, config, layout="TP2 PP1 DP4", world_size=8)
    chance = random.Random(0)
    counts = dict.fromkeys(RATIOS, 0)
    offset = {"web": 0.0, "rephrased": -0.25, "qa": -0.6, "textbook": -0.4, "code": -0.9}
    records = []
    for step in range(1, steps + 1):
        base = 2.7 + 8.2 * math.exp(-step / 18) + 1.9 * (step + 5) ** -0.35
        for name, ratio in RATIOS.items():
            counts[name] = round(Fraction(ratio) * step * BATCH)
        speed = 41_200 * (0.3 if step < 3 else 1 + chance.gauss(0, 0.01))
        record: dict[str, Any] = {
            "step": step,
            "train/loss": base + chance.gauss(0, 0.05),
            "perf/tokens_per_sec_per_gpu": speed,
            "perf/tflops_per_gpu": speed / 41_200 * 512,
            "perf/mfu": speed / 41_200 * 0.518,
            "perf/data_pct": 0.4,
            "data/tokens": step * BATCH * LENGTH,
        }
        if per_source:
            record |= {f"train/loss/{name}": base + offset[name] + chance.gauss(0, 0.08) for name in RATIOS}
            record |= {f"data/share/{name}": count / sum(counts.values()) for name, count in counts.items()}
        if step == 5:
            record["train/loss"] = math.nan
        if eval_every and step % eval_every == 0:
            domains = {name: base + offset[name] + 0.08 for name in ("web", "qa", "code")}
            record |= {f"eval/loss/{name}": loss for name, loss in domains.items()}
            record |= {f"eval/bpb/{name}": loss / 3.1 for name, loss in domains.items()}
            record["eval/loss"] = sum(domains.values()) / 3
        records.append(record)
    MetricsFile(run.metrics).append(records)
    if ledger:
        total = sum(counts.values())
        sources = {
            name: {
                "ratio": ratio,
                "samples": counts[name],
                "tokens": counts[name] * LENGTH,
                "epochs": counts[name] / 30_000,
                "share": counts[name] / total,
            }
            for name, ratio in RATIOS.items()
        }
        run.write_ledger({"samples": total, "tokens": total * LENGTH, "sequence_length": LENGTH, "sources": sources})
    return run.path


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return np.asarray(imread(path))


def size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def has_color(image: np.ndarray, color: str) -> bool:
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return bool((np.abs(image[..., :3] - wanted).max(axis=-1) < 0.01).sum() > 20)


def test_a_long_run_with_a_restart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_run(tmp_path / "mix-67-20-10-3", 800, eval_every=100)
    run = RunDir.create_or_open(path, Config.model_validate(RunDir.open(path).read_config()), layout="TP4", world_size=8)
    run.record_resume(400)
    assert main([str(path)]) == 0
    head, *_, last = capsys.readouterr().out.strip().splitlines()
    assert head.startswith("run ") and f" in {path}: step 800 of " in head and last == f"-> {path / 'report.png'}"
    assert size(path / "report.png") == (1600, 1000)
    image = pixels(path / "report.png")
    assert all(has_color(image, color) for color in (*plot.PALETTE[:5], plot.ACCENT))
    assert not has_color(image, plot.PALETTE[5])  # four sources, and one more domain
    assert sorted(entry.name for entry in path.iterdir() if entry.name.startswith(".")) == []


@pytest.mark.parametrize(
    "shape",
    [
        {"steps": 1, "eval_every": 1},
        {"steps": 60, "eval_every": 60},
        {"steps": 7, "eval_every": None, "per_source": False, "ledger": False},
    ],
)
def test_young_and_bare_runs_are_drawn_without_a_warning(
    tmp_path: Path, shape: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    path = make_run(tmp_path / "run", **shape)
    text = summary(path)
    assert f"step {shape['steps']} of" in text and "training loss" in text and "source or domain" in text
    assert ("validation, step" in text) == (shape["eval_every"] is not None)
    assert size(write_report(path)) == (1600, 1000)
    assert [str(warning.message) for warning in recwarn] == []


def test_a_finished_report_is_replaced(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", 5, None)
    (path / "report.png").write_bytes(b"old")
    assert size(write_report(path)) == (1600, 1000)


@pytest.mark.parametrize("steps", [1, 40])
def test_health_is_drawn_where_it_was_recorded(
    steps: int, tmp_path: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run(tmp_path / "run", steps, None)
    assert write_health(path) is None and not (path / "health.png").exists()
    records = read_metrics(path / "metrics.jsonl")
    for record in records:
        parts = [*map(str, range(24)), "embedding", "final_norm", "head"]
        for place, part in enumerate(parts):
            record[f"health/grad_norm/{part}"] = math.nan if record["step"] == 7 else 0.1 + 0.01 * place
            record[f"health/weight_norm/{part}"] = 10.0 + place
            record[f"health/update_norm/{part}"] = 0.0 if record["step"] == 9 else 0.01
            if part.isdecimal():
                record |= {f"health/activation_rms/{part}": 1.0 + place, f"health/max_logit/{part}": place - 3.0}
        record |= {"health/entropy": 5.0, "health/padding_probability": 0.01, "health/fp8_saturated/layers.0.mlp.fc1": 0.1}
    (path / "metrics.jsonl").unlink()
    MetricsFile(path / "metrics.jsonl").append(records)
    assert main([str(path)]) == 0
    assert capsys.readouterr().out.strip().endswith(f"-> {path / 'health.png'}")
    assert size(path / "health.png") == (1600, 1000)
    image = pixels(path / "health.png")
    assert all(has_color(image, color) for color in (plot.INK, plot.PALETTE[1], plot.PALETTE[3]))
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("steps", [1, 60])
def test_losses_by_value_are_drawn_where_they_were_recorded(
    steps: int, tmp_path: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run(tmp_path / "run", steps, 20)
    assert write_values(path) is None and not (path / "loss_by.png").exists()
    records = read_metrics(path / "metrics.jsonl")
    for record in records:
        record |= {"train/loss_by/kind/qa": 3.0 + 1 / record["step"], "train/loss_by/generator/$x$ {%s}" + "y" * 60: 4.0}
        if record["step"] % 20 == 0:
            record |= {"eval/loss_by/kind/qa": 3.5, "eval/loss_by/kind/(none)": 3.7}
    (path / "metrics.jsonl").unlink()
    MetricsFile(path / "metrics.jsonl").append(records)
    assert main([str(path)]) == 0
    assert capsys.readouterr().out.strip().endswith(f"-> {path / 'loss_by.png'}")
    assert size(path / "loss_by.png") == (1600, 1000)
    image = pixels(path / "loss_by.png")
    assert all(has_color(image, color) for color in plot.PALETTE[: 2 if steps > 1 else 1])
    assert [str(warning.message) for warning in recwarn] == []


def test_nothing_to_report(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", 0, None, ledger=False)
    for tell in (write_report, summary):
        with pytest.raises(UserError, match="no steps recorded yet"):
            tell(path)
    with pytest.raises(UserError, match="not a run directory"):
        write_report(tmp_path)
    assert not (path / "report.png").exists()


def test_labels_never_overlap_and_stay_inside() -> None:
    chance = random.Random(1)
    for _ in range(200):
        count = chance.randint(1, 12)
        heights = sorted(chance.choice([chance.random(), 0.0, 0.99, 1.3, -0.2]) for _ in range(count))
        sizes = [chance.choice([0.05, 0.08]) for _ in range(count)]
        placed = plot._apart(heights, sizes)
        assert all(-1e-9 <= height <= 1 for height in placed)
        for i in range(count - 1):
            assert placed[i + 1] - placed[i] >= (sizes[i] + sizes[i + 1]) / 2 - 1e-9
    assert plot._apart([0.2, 0.5, 0.9], [0.1, 0.1, 0.1]) == [0.2, 0.5, 0.9]


def test_smoothing_keeps_short_series_and_means() -> None:
    short = np.arange(60.0)
    assert plot._smooth(short) is short
    long = np.arange(500.0)
    assert plot._smooth(long)[-1] == pytest.approx(np.mean(long[-10:])) and plot._smooth(long)[0] == 0.0
