"""`megatron-synth bench gpu`: everything that one GPU has to show."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_synth.bench.gpu import measure, memory_of_gpus, parts
from megatron_synth.cli.options.types import count, on_disk
from megatron_synth.config.errors import EXIT_OK, UserError

EXIT_FAILED = 1


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth bench gpu",
        description="Numerics tests, kernels, and training of 1.3B and 3B models, in BF16 and FP8, in 10 minutes on one GPU. "
        "Run again, it goes on where it ended.",
    )
    parser.add_argument("--smoke", action="store_true", help="the same with tiny models, on a CPU too, in under a minute")
    parser.add_argument("--json", type=on_disk, default=Path("bench-gpu.json"), metavar="FILE", help="default bench-gpu.json")
    parser.add_argument("--again", action="store_true", help="run all of it anew, whatever the file has")
    parser.add_argument("--patience", type=count, default=1, metavar="N", help="budgets times N, on a busy machine")
    parser.add_argument("--only", metavar="TEXT", help="parts whose name holds TEXT")
    return parser


def main(argv: list[str]) -> int:
    """Run all parts; exit code 1 when one failed."""
    options = parser().parse_args(argv)
    if not options.json.resolve().parent.is_dir():
        raise UserError(f"--json: {options.json.parent} is not a folder")
    memory = 0 if options.smoke else next(iter(memory_of_gpus()), 0)
    known = parts(options.smoke, memory)
    selected = [part for part in known if options.only is None or options.only in part.name]
    if not selected:
        raise UserError(f"--only {options.only}: no such part; there are: {', '.join(part.name for part in known)}")
    passed = measure(selected, options.smoke, options.json, argv, again=options.again, patience=options.patience)
    return EXIT_OK if passed else EXIT_FAILED
