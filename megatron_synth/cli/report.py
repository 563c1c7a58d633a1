"""`megatron-synth report RUN...`: a summary of each run, and its figures."""

from __future__ import annotations

import argparse

from megatron_synth.config.errors import EXIT_OK
from megatron_synth.core.log import show


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth report",
        description="Print a summary of a run, and draw its report.png; health.png and loss_by.png where these were recorded.",
    )
    parser.add_argument("run", nargs="+", help="run directory, or URL of a run in a bucket")
    return parser


def main(argv: list[str]) -> int:
    """Summarize each run and return the exit code."""
    runs = parser().parse_args(argv).run
    from megatron_synth.cluster.status import goodput_of
    from megatron_synth.train.checkpoint import fetched
    from megatron_synth.train.record.figures.health import write_health
    from megatron_synth.train.record.figures.plot import write_report
    from megatron_synth.train.record.figures.times import write_times
    from megatron_synth.train.record.figures.values import write_values
    from megatron_synth.train.record.summary import summary

    for run in map(fetched.local_records, runs):
        time_spent = goodput_of(run)
        show(summary(run))  # first: figures need a library that not everybody has
        show(f"-> {write_report(run)}")
        if time_spent is not None:
            show(time_spent.text())
            show(f"-> {write_times(run, run.resolve().name, time_spent)}")
        health = write_health(run)
        by_value = write_values(run)
        for figure in (health, by_value):
            if figure is not None:
                show(f"-> {figure}")
    return EXIT_OK
