"""The training benchmark: the same computation on all sides, and a table that says what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_synth.bench.tables import markdown_table
from megatron_synth.bench.train.compare import Row, check_agreement
from megatron_synth.bench.train.engine import Block, Rates
from megatron_synth.cli import bench
from megatron_synth.cli.bench import train as bench_train
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.estimate.flops import flops_per_token

TINY = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.vocab_size=250",
    "train.sequence_length=16",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
]


CASES = {
    # grouped queries, a learning rate that moves the weights far, clipping that bites
    "fp32": ["model.num_query_groups=2", "optim.lr=0.01", "optim.clip_grad=0.01"],
    "bf16": ["model.share_embeddings_and_output_weights=true", "precision.dtype=bf16"],
}
AGREEMENT = {"fp32": 2e-5, "bf16": 2e-2}


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], str]]:
    """Per case what --json wrote and what was printed; in a process of their own, since the engine prepares torch."""
    folder = tmp_path_factory.mktemp("bench")
    code = "import json, sys; from megatron_synth.cli.main import main\nfor argv in json.loads(sys.argv[1]):"
    code += "\n    print('=====', flush=True)\n    assert main(argv) == 0"
    sizes = ["--pairs", "1", "--steps", "2", "--warmup", "4"]
    runs = [["bench", "train", *TINY, *more, *sizes, "--json", str(folder / case)] for case, more in CASES.items()]
    result = subprocess.run([sys.executable, "-c", code, json.dumps(runs)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    printed = result.stdout.split("=====")[1:]
    return {case: (json.loads((folder / case).read_text()), text) for case, text in zip(CASES, printed, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_engine_and_baselines_train_alike(benched: dict[str, tuple[dict[str, Any], str]], case: str) -> None:
    found, _ = benched[case]
    engine, *baselines = found["rows"]
    assert [row["name"] for row in found["rows"]] == ["megatron-synth", "hf", "plain"]
    assert len(set(engine["warmup_losses"])) == 4
    for baseline in baselines:
        assert baseline["warmup_losses"] == pytest.approx(engine["warmup_losses"], abs=AGREEMENT[case])


@pytest.mark.slow
def test_the_table_says_what_was_measured(benched: dict[str, tuple[dict[str, Any], str]]) -> None:
    found, printed = benched["fp32"]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0] for row in cells] == ["loop", "megatron-synth", "hf", "plain"]
    assert found["command"].startswith("megatron-synth bench train model.num_layers=2 ")
    assert f"`{found['command']}`" in printed and found["device"] in printed and found["date"] in printed
    assert "6 x (body + head parameters) + 12 x layers x query channels x sequence" in printed
    engine = found["rows"][0]
    for row, shown in zip(found["rows"], cells[1:], strict=True):
        [[first, second]] = row["step_s"]
        step_s = (first + second) / 2
        assert row["tokens_per_s_per_rank"] == pytest.approx(4 * 16 / step_s)
        assert shown[1:3] == [f"{1000 * step_s:.1f}", f"{4 * 16 / step_s:,.0f}"]
        if row is not engine:
            assert row["engine_speedup"] == [pytest.approx(step_s / (sum(engine["step_s"][0]) / 2))]


def test_rates_follow_the_convention() -> None:
    config = load_file(Config, "bench/tiny-7m.yaml")
    rates = Rates.of(0.5, config, 2, "NVIDIA H200")
    assert rates.tokens_per_s_per_rank == 8 * 256 / 0.5 / 2
    flops = rates.tokens_per_s_per_rank * flops_per_token(config.model, 256)
    assert rates.tflops_per_rank == flops / 1e12
    assert rates.mfu == flops / 989e12
    assert Rates.of(0.5, config, 2, "some CPU").mfu is None


def measured(name: str, *blocks: tuple[float, ...]) -> Row:
    rates = Rates(1.0, 1.0, 1.0, None)
    return Row(name, rates, None, tuple(Block(steps, (1.0,), 0) for steps in blocks), None, (0.0,))


def test_ratios_are_taken_within_pairs() -> None:
    engine, baseline = measured("a", (1.0, 1.0, 9.0), (4.0, 4.0, 4.0)), measured("b", (2.0, 2.0, 2.0), (8.0, 0.1, 8.0))
    assert engine.speedups_over(baseline) == [2.0, 2.0]
    assert engine.cpu_speedups_over(baseline) == [1.0, 1.0]
    assert bench_train._spread(engine.speedups_over(baseline)) == "x2.000 (2.000 to 2.000)"


def test_losses_that_differ_are_refused() -> None:
    contenders = [SimpleNamespace(name=name) for name in ("megatron-synth", "hf", "plain")]
    agreeing = [(5.0, 4.0), (5.0005, 4.0), (5.0, 4.0009)]
    check_agreement(contenders, agreeing, 1e-3)
    for wrong in ((5.0, 4.01), (float("nan"), 4.0)):
        with pytest.raises(UserError, match="plain does not compute what the engine computes"):
            check_agreement(contenders, [*agreeing[:2], wrong], 1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown benchmark 'trian'; one of: train"),
        (["train", "--vs", "hf,nanogpt"], "unknown baseline 'nanogpt'; any of hf, plain"),
        (["train", "model.vocab_size=null"], "model.vocab_size: a benchmark reads no tokenizer"),
        (["train", "--json", "no/such/folder/x.json"], "no/such/folder is not a folder"),
        (["train", "bench/tiny-8m.yaml"], "did you mean 'bench/tiny-7m.yaml'"),
    ],
)
def test_mistakes_are_told_before_anything_is_built(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench.main(arguments)


def test_baselines_need_a_single_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="baselines run on a single rank, this launch has 2: give --vs none"):
        bench.main(["train", "--vs", "plain"])


def test_markdown_is_aligned() -> None:
    lines = markdown_table([("loop", "ms"), ("a", "1.5"), ("longer", "12.5")])
    assert lines == ["| loop   |   ms |", "|--------|-----:|", "| a      |  1.5 |", "| longer | 12.5 |"]
