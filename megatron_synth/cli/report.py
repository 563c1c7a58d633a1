"""`megatron-synth report RUN...`: a summary of each run, and its report.png."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_synth.config.errors import EXIT_OK
from megatron_synth.core.log import show


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth report", description="Print a summary of a run, and draw its report.png."
    )
    parser.add_argument("run", nargs="+", type=Path, help="run directory")
    return parser


def main(argv: list[str]) -> int:
    """Summarize each run and return the exit code."""
    runs = parser().parse_args(argv).run
    from megatron_synth.train.record.plot import write_report
    from megatron_synth.train.record.summary import summary

    for run in runs:
        show(summary(run))  # first: figures need a library that not everybody has
        show(f"-> {write_report(run)}")
    return EXIT_OK
