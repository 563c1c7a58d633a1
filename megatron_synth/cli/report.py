"""`megatron-synth report RUN...`: draw report.png of each run, print where it is."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_synth.config.errors import EXIT_OK
from megatron_synth.core.log import show


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(prog="megatron-synth report", description="Draw report.png of a run.")
    parser.add_argument("run", nargs="+", type=Path, help="run directory")
    return parser


def main(argv: list[str]) -> int:
    """Draw each run and return the exit code."""
    runs = parser().parse_args(argv).run
    from megatron_synth.train.record.plot import write_report

    for run in runs:
        show(str(write_report(run)))
    return EXIT_OK
