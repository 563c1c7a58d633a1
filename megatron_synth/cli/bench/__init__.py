"""`megatron-synth bench`: benchmarks that a command regenerates."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from megatron_synth.config.errors import EXIT_OK, UserError

BENCHMARKS = {
    "train": "tokens/s, TFLOP/s, MFU of training, beside other loops; sweeps",
    "kernels": "every operation by every backend, beside torch.compile and others",
    "health": "what recording a run's health costs (log.health_interval)",
    "memory": "the estimate of memory per rank beside what is allocated",
    "gpu": "everything that a GPU has to show, in one command",
    "report": "tables and figures of what the others have written; regressions",
}
"""Name -> what it measures. `cli/bench/NAME.py` has its `parser()` and its `main(argv)`, imported when it is called."""
MOVED = ("checkpoint", "fp8", "launch", "loader", "prepare")


def usage() -> str:
    """The text of --help."""
    width = max(map(len, BENCHMARKS))
    lines = (f"  {name:<{width}}  {text}" for name, text in BENCHMARKS.items())
    return "\n".join(["usage: megatron-synth bench NAME [ARGUMENT ...]; each tells more with --help", "", *lines])


def main(argv: list[str]) -> int:
    """Run the benchmark that `argv[0]` names."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return EXIT_OK
    if argv[0] in MOVED:
        raise UserError(f"bench {argv[0]} compares with other projects and is run from a clone: python -m benchmarks {argv[0]}")
    if argv[0] not in BENCHMARKS:
        raise UserError(f"unknown benchmark '{argv[0]}'; one of: {', '.join(BENCHMARKS)}")
    run: Callable[[list[str]], int] = importlib.import_module(f"megatron_synth.cli.bench.{argv[0]}").main
    return run(argv[1:])
