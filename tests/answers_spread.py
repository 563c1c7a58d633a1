"""`python -m tests.answers_spread`: how far bits per byte of right answers, and accuracy, are apart over seeds of a small run.

Texts tell the colors of made-up things, half of them often and half rarely, among other sentences; the questions ask for all of
them. What a measure says of a run is worth as much as it moves between evaluations, over its spread over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.bench import tables
from megatron_synth.config.load import load_file
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.data.preparing.prepare import prepare
from tests.dist.pool import RankPool
from tests.support import read_metrics

COLORS = ("red", "green", "blue", "white", "black", "brown", "gray", "pink")
MEASURES = (
    ("bits/byte of answers", "eval/answers_bpb/colors"),
    ("accuracy", "eval/accuracy/colors"),
    ("mean rank", "eval/rank/colors"),
)


def write(folder: Path, things: int, texts: int) -> Path:
    """Texts, questions, shards, and the configuration of the run."""
    chance = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    names = ["".join(chance.choice(letters, 5)) for _ in range(things)]
    colors = [str(chance.choice(COLORS)) for _ in names]
    weights = np.array([3.0 if number % 2 else 1.0 for number in range(things)])

    def fact(number: int) -> str:
        return f"the color of {names[number]} is {colors[number]} ."

    def text() -> str:
        facts = [fact(int(number)) for number in chance.choice(things, 4, p=weights / weights.sum())]
        others = [f"the {names[int(a)]} sees the {names[int(b)]} ." for a, b in chance.integers(0, things, (2, 2))]
        return " ".join(chance.permutation([*facts, *others]))

    for name, number in (("train", texts), ("valid", 60)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text()}) + "\n" for _ in range(number)))
    rows = [
        {"context": f"the color of {name} is", "choices": [f" {one}" for one in COLORS], "answer": COLORS.index(color)}
        for name, color in zip(names, colors, strict=True)
    ]
    (folder / "colors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {
        "train": {"kind": "natural", "input": f"{folder}/train.jsonl"},
        "valid": {"kind": "natural", "input": f"{folder}/valid.jsonl", "split": "validation"},
    }
    prepared = {"output": f"{folder}/data", "tokenizer": {"train": {"vocab_size": 400}}, "sources": sources}
    (folder / "prepare.yaml").write_text(json.dumps(prepared))
    prepare(load_file(PrepareConfig, folder / "prepare.yaml"))
    run = {
        "model": {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4},
        "data": {
            "sources": {"train": {"path": f"{folder}/data/train", "ratio": 1, "max_epochs": 99}},
            "validation": {"valid": {"path": f"{folder}/data/valid"}},
            "answers": {"colors": {"path": f"{folder}/colors.jsonl"}},
        },
        "train": {"steps": 1, "global_batch_size": 16, "micro_batch_size": 16, "sequence_length": 64},
        "optim": {"lr": 4e-3, "warmup_steps": 10, "schedule": "constant"},
        "precision": {"dtype": "fp32"},
        "log": {"wandb": {"mode": "disabled"}},
    }
    (folder / "run.yaml").write_text(json.dumps(run))
    return folder / "run.yaml"


def main(argv: list[str]) -> int:
    """Train the runs and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.answers_spread", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--every", type=int, default=40)
    parser.add_argument("--things", type=int, default=400)
    options = parser.parse_args(argv)
    found: dict[int, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, ranks = Path(name), RankPool()
        config = write(folder, options.things, 10 * options.things)
        for seed in range(options.seeds):
            settings = (f"train.seed={seed}", f"train.steps={options.steps}", f"eval.interval={options.every}")
            arguments = ["train", str(config), *settings, "--run-dir", str(folder / f"run-{seed}")]
            (result,) = ranks.run(1, "megatron_synth.cli.main.main", arguments, timeout=1200.0)
            assert result.value == 0, result.stderr
            for record in read_metrics(folder / f"run-{seed}"):
                if "eval/loss" in record:
                    found.setdefault(record["step"], []).append(record)
        ranks.close()
    rows = [["step", *(head for name, _ in MEASURES for head in (f"{name}, mean", "sd over seeds", "moved / sd"))]]
    before: dict[str, float] = {}
    for step, records in sorted(found.items()):
        row = [str(step)]
        for _, key in MEASURES:
            values = [record[key] for record in records]
            mean, spread = statistics.fmean(values), statistics.stdev(values)
            moved = "" if key not in before or not spread else f"{abs(mean - before[key]) / spread:.1f}"
            row += [f"{mean:.4f}", f"{spread:.4f}", moved]
            before[key] = mean
        rows.append(row)
    head: dict[str, Any] = tables.header("", [])
    head["command"] = " ".join(["python -m tests.answers_spread", *argv])
    print("\n".join([*tables.header_lines(head), "", *tables.markdown_table(rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
