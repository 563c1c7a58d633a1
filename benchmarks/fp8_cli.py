"""`python -m benchmarks fp8`."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

from benchmarks.fp8_convergence import BASELINE, CONTROL, LIMIT, run, summarize, table
from megatron_synth.bench import tables
from megatron_synth.cli.options.types import file_and_overrides
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.core.files import write_json
from megatron_synth.core.log import say

DEFAULT_CONFIG = "bench/fp8.yaml"
_SCALINGS = ("delayed", "current", "blockwise")
RECIPES = (CONTROL, *_SCALINGS, *(f"{name}-{number_format}" for name in _SCALINGS for number_format in ("hybrid", "e4m3")))


def main(argv: list[str]) -> int:
    """Train, print the table; exit code 1 where a recipe ends further than 1 % from BF16."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks fp8",
        description="Losses at the end of training in each FP8 recipe, beside BF16's, over several seeds; not speed.",
    )
    parser.add_argument("arguments", nargs="*", default=[], metavar="[CONFIG] a.b=c", help=f"default CONFIG: {DEFAULT_CONFIG}")
    parser.add_argument(
        "--recipes", default="fp32,delayed,current,blockwise", help=f"of {', '.join(RECIPES)}; default %(default)s"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each; default %(default)s")
    parser.add_argument("--tail", type=int, default=20, help="steps at the end whose mean is compared; default %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    options = parser.parse_intermixed_args(argv)
    path, overrides = file_and_overrides(options.arguments, DEFAULT_CONFIG)
    recipes = list(dict.fromkeys(options.recipes.split(",")))
    unknown = [name for name in recipes if name not in RECIPES]
    if unknown:
        raise UserError(f"--recipes: unknown recipe '{unknown[0]}'; any of {', '.join(RECIPES)} with commas")
    for name in ("seeds", "tail"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if int(os.environ.get("WORLD_SIZE", 1)) != 1:
        raise UserError(f"benchmarks fp8 runs on a single process, this launch has {os.environ['WORLD_SIZE']}")
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(f"--json: {options.json.parent} is not a folder")
    config = load_file(Config, path, overrides)
    head = tables.header("bench", ["fp8", *argv])
    seeds = [config.train.seed + number for number in range(options.seeds)]
    trials = run(config, [BASELINE, *recipes], seeds, options.tail)
    rows = summarize(trials)
    train = config.train
    lines = [
        *tables.header_lines(head),
        f"- model: {config.model.name}; {train.steps} steps of {train.tokens_per_step:,} tokens",
        f"- seeds: {', '.join(map(str, seeds))}",
        f"- training loss: mean of the last {options.tail} steps; validation loss: after the last step; means over the seeds",
        *(f"- {recipe}: {layers}" for recipe, layers in {trial.recipe: trial.layers for trial in trials}.items() if layers),
    ]
    say("\n" + "\n".join([*lines, "", *tables.markdown_table(table(rows))]))
    if options.json is not None:
        write_json(options.json, {**head, "limit": LIMIT, "rows": [*map(asdict, rows)], "trials": [*map(asdict, trials)]})
    return EXIT_OK if all(row.within for row in rows) else 1
