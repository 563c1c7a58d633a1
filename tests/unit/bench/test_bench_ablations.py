"""Which levers a layout has, and what turning them is reported to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_synth.bench.train.ablations import LEVERS, chosen, variants
from megatron_synth.cli import bench
from megatron_synth.cli.bench.ablations import losses_apart
from megatron_synth.config.errors import UserError

CONFIG = "bench/tiny-7m.yaml"
TINY = ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.vocab_size=250"]
TINY += ["train.sequence_length=16", "train.global_batch_size=4", "train.micro_batch_size=2"]


def turned(ranks: int, device: Any, *settings: str, real: bool = False) -> tuple[dict[str, list[str]], dict[str, str]]:
    possible, refused = variants(CONFIG, [*TINY, *settings], ranks, LEVERS, device, real)
    found: dict[str, list[str]] = {}
    for one in possible:
        found.setdefault(one.lever, []).append(one.text)
    return found, {one.lever: one.reason for one in refused}


def test_every_lever_is_turned_or_says_why_not() -> None:
    for ranks, settings in ((1, []), (2, []), (2, ["parallel.tensor_model_parallel_size=2"])):
        found, refused = turned(ranks, "cpu", *settings)
        assert found.keys() | refused.keys() == {lever.name for lever in LEVERS}
    found, refused = turned(1, "cpu", "train.recompute=full", "train.fused_loss=false")
    assert found["fused loss"] == ["train.fused_loss=true"]
    assert found["recomputation"] == ["train.recompute=none", "train.recompute=selective"]
    assert refused["Triton kernels"] == "needs a GPU" and refused["interleaved pipeline"] == "one pipeline stage"
    assert "--data real" in refused["read-ahead"] and turned(1, "cpu", real=True)[0]["read-ahead"] == ["no read-ahead"]


def test_overlaps_are_turned_away_from_what_the_device_has() -> None:
    reduce, gather = "gradients reduced in the backward pass", "weights gathered in the forward pass"
    on, off = ("parallel.overlap_grad_reduce=" + word for word in ("true", "false"))
    found, refused = turned(2, "cpu")
    assert found[reduce] == [f"{on} parallel.overlap_param_gather=false"]
    assert found[gather] == [f"{on} parallel.overlap_param_gather=true"]
    assert "set parallel.overlap_grad_reduce" in refused["gradient buckets"]
    found, refused = turned(2, "gpu")
    assert found[reduce] == [f"{off} parallel.overlap_param_gather=false"]
    assert found[gather] == [f"{on} parallel.overlap_param_gather=false"]
    assert found["gradient buckets"] == ["parallel.ddp_bucket_size=10000000"]
    # what a lever cannot be turned to is refused with the configuration's own reason
    _, refused = turned(2, "gpu", "parallel.overlap_param_gather=true")
    assert "parallel.overlap_param_gather" in refused["distributed optimizer"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ablations", "warp"], "no lever 'warp'; any of these, with commas: fused loss, recomputation"),
        (["--ablations", "--sweep"], "--ablations stands alone"),
        (["--ablations", "--profile"], "--ablations has no profile"),
    ],
)
def test_mistakes_are_told_at_once(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench.main(["train", CONFIG, *argv])


def test_names_are_of_levers_and_differences_are_relative() -> None:
    assert [lever.name for lever in chosen("read-ahead, fused loss")] == ["read-ahead", "fused loss"]
    assert losses_apart([2.0, 4.0], [2.0, 4.0]) == 0 and losses_apart([2.0, 5.0], [2.0, 4.0]) == 0.25


@pytest.mark.slow
def test_a_lever_is_measured_beside_the_base_on_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = "distributed optimizer,sequence parallelism,torch.compile"
    counts = ["--ranks", "2", "--warmup", "2", "--pairs", "2", "--steps", "2"]
    more = [*counts, "--ablations", names, "--json", str(tmp_path / "l.json")]
    command = [sys.executable, "-m", "megatron_synth", "bench", "train", CONFIG, *TINY, *more]
    # no compiler: the variant that needs one fails alone, and says why
    environment = {**os.environ, "CXX": "no-such-compiler", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "l.json").read_text())
    [plain, compiled] = found["levers"]
    assert plain["turned_to"] == "parallel.use_distributed_optimizer=false" and plain["status"] == "measured"
    assert len(plain["step_time_ratios"]) == len(plain["cpu_time_ratios"]) == 2 and len(plain["warmup_losses"]) == 2
    assert plain["losses_apart"] < 1e-5 and plain["peak_bytes"] > found["base"]["peak_bytes"] > 0
    assert compiled["status"] == "failed" and "no-such-compiler is not installed" in compiled["error"]
    assert [one["lever"] for one in found["refused"]] == ["sequence parallelism"]
    # both take their turns at the same steps
    assert len(found["base"]["step_s"]) == 2 == len(plain["step_s"])
    assert bench.main(["report", str(tmp_path / "l.json")]) == 0
    table = capsys.readouterr().out
    assert "| distributed optimizer |" in table and "not here: one tensor-parallel rank" in table
