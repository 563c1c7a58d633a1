"""The `plan` verb: every layout is legal, memory decides, the model of time behaves, and published speeds are met as stated."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_synth.cli import plan as plan_module
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import load_yaml
from megatron_synth.config.schema import Config, ModelConfig
from megatron_synth.estimate.hardware import ACCELERATORS
from megatron_synth.estimate.published_runs import RUNS, configuration, fit, predict
from megatron_synth.estimate.search import search
from megatron_synth.estimate.step_time import Assumptions, gemm_seconds, step_time
from megatron_synth.parallel.plan import plan
from tests.support import write_config, write_corpus

H200, H100 = ACCELERATORS["h200"], ACCELERATORS["h100"]


def model(name: str, batch: int = 1024, length: int = 4096) -> Config:
    shape = ModelConfig(**load_yaml(f"model/{name}.yaml")["model"], vocab_size=50304)
    return configuration(shape, length, batch)


@pytest.mark.parametrize("gpus", [8, 64, 512])
def test_every_layout_is_legal_and_sorted(gpus: int) -> None:
    found = search(model("3b"), gpus, H200)
    assert len({one.describe() for one in found}) == len(found) > 50
    for one in found:
        assert plan(one.config, gpus) == one.layout
        assert one.fits == (one.needed <= H200.memory)
        assert one.time.total == pytest.approx(sum(vars(one.time).values()))
        assert all(value >= 0 for value in vars(one.time).values())
        # tokens/s, FLOP/s and MFU are one figure
        assert one.tokens_per_s * gpus * one.time.total == pytest.approx(1024 * 4096)
        assert 0 < one.mfu < 1
    speeds = [one.tokens_per_s for one in found if one.fits]
    assert speeds == sorted(speeds, reverse=True)


def test_less_memory_and_more_arithmetic_are_told_apart() -> None:
    base = model("3b", batch=64)
    seconds, needed = {}, {}
    for recompute in ("none", "selective", "full"):
        config = base.model_copy(update={"train": base.train.model_copy(update={"recompute": recompute})})
        time = step_time(config, 8, H200)
        seconds[recompute], needed[recompute] = time.total, time.gemm
    assert seconds["none"] < seconds["selective"] < seconds["full"]
    # the forward products of the layers once more: a third of the layers' share, none of the output layer's
    assert 1.2 < needed["full"] / needed["none"] < 1.34


def test_products_are_bound_by_arithmetic_or_by_memory() -> None:
    exact = Assumptions(sustained=1.0)
    square = gemm_seconds(H200, exact, 8192, 8192, 8192, False, False)
    assert 2 * 8192**3 / square == pytest.approx(788e12, rel=0.05)  # measured on an H200
    thin = gemm_seconds(H200, exact, 8192, 8192, 16, False, False)
    assert thin == pytest.approx(2 * (2 * 8192 * 16 + 8192**2) / 4.3e12, rel=0.01)


def test_a_pipeline_pays_its_bubble_and_interleaving_divides_it() -> None:
    base = model("3b", batch=64)

    def bubble(stages: int, chunks: int | None) -> float:
        update = {"pipeline_model_parallel_size": stages, "virtual_pipeline_model_parallel_size": chunks}
        parallel = base.parallel.model_copy(update=update)
        time = step_time(base.model_copy(update={"parallel": parallel}), 1, H200)
        return time.bubble

    assert bubble(1, None) == 0
    assert bubble(4, 7) == pytest.approx(bubble(4, None) / 7)


@pytest.mark.slow
def test_published_speeds_are_met_as_stated() -> None:
    ratios = {(run.who, run.model.name, run.gpu): predict(run).tokens_per_s / run.tokens_per_s for run in RUNS if run.fitted}
    assert all(2 / 3 < ratio < 1.5 for ratio in ratios.values()), ratios
    assert abs(sum(map(math.log, ratios.values()))) / len(ratios) < 0.02
    assert fit() == pytest.approx(Assumptions().sustained, abs=0.01)
    assert predict(RUNS[0]).fits


def test_the_verb_answers_without_torch_and_says_what_does_not_fit(tmp_path: Path) -> None:
    argv = ["plan", "3b", "--gpus", "1,8", "--gpu", "h100", "--json", str(tmp_path / "plan.json")]
    code = (
        "import sys; from megatron_synth.cli.main import main; code = main(sys.argv[1:])\n"
        "assert not {'torch', 'megatron', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "needs" in done.stdout and "of 74.5 GiB, most of it" in done.stdout
    assert "TP1 x PP1 x DP8, micro-batch" in done.stdout and "Predictions, not measurements" in done.stdout
    plans = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert [one["gpus"] for one in plans] == [1, 8]
    best = plans[1]["layouts"][0]
    assert best["fits"] and best["mfu"] > 0.3 and best["bound"] == "gemm"
    assert sum(best["seconds"].values()) == pytest.approx(best["step_s"])
    assert not any(layout["fits"] for layout in plans[0]["layouts"] if layout["needed_bytes"] > 80e9)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no-such-size"], "no configuration file model/no-such-size.yaml"),
        ([], "plan needs a model"),
        (["3b", "--gpus", "8,x"], "--gpus: expected a whole number"),
        (["3b", "--gpu", "a100", "--fp8"], "a100 has no FP8 products"),
        (["3b", "--gpus", "11", "--global-batch-size", "1"], "has no layout on 11 GPUs"),
        (["3b", "--json", "no/such/x.json"], "no/such is not a folder"),
    ],
)
def test_mistakes(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_module.main(argv)


def test_a_run_is_planned_with_its_own_precision_and_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml", write_corpus(tmp_path / "corpus"))  # fp32, its tokenizer has 256 tokens
    told = {}
    for dtype in ("fp32", "bf16"):
        assert (
            plan_module.main([str(config), f"precision.dtype={dtype}", "--gpus", "1", "--json", str(tmp_path / "p.json")]) == 0
        )
        out = capsys.readouterr().out
        assert f"{dtype.upper()}, vocabulary 256: " in out and ("in FP32 products are slower" in out) == (dtype == "fp32")
        told[dtype] = json.loads((tmp_path / "p.json").read_text())["plans"][0]["layouts"][0]["memory_bytes"]
    assert told["fp32"]["weights"] == 2 * told["bf16"]["weights"]
    assert plan_module.main([str(config), "--gpus", "1", "--vocab-size", "512"]) == 0
    assert ", vocabulary 512: " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--fp8: .* has precision.dtype fp32"):
        plan_module.main([str(config), "--gpus", "1", "--fp8"])
