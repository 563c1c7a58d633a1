"""`megatron-synth status RUN...`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_synth.cli.options.types import seconds
from megatron_synth.cluster import slurm
from megatron_synth.cluster.progress import jobs_of
from megatron_synth.cluster.status import RunStatus, find_runs, rows, status
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.core.log import show

_CLEAR = "\033[H\033[J"


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth status", description="Where runs stand, from their directories and SLURM's queue."
    )
    parser.add_argument("runs", nargs="*", type=Path, default=[Path("runs")], metavar="RUN", help="default: all in runs/")
    parser.add_argument("--watch", nargs="?", type=seconds, const=5.0, metavar="SECONDS", help="again and again; default 5")
    parser.add_argument("--json", action="store_true", help="one JSON object per run, for programs")
    return parser


def main(argv: list[str]) -> int:
    """Print where runs stand. Returns the exit code."""
    options = parser().parse_args(argv)
    while True:
        found = look(options.runs)
        if options.json:
            for one in found:
                show(json.dumps(dataclasses.asdict(one) | {"run": str(one.run)}))
        else:
            text = _table(found)
            # the screen is cleared with the text at hand, so that nothing flickers
            show(f"{time.strftime('%F %T')}\n{text}" if options.watch else text, control=_CLEAR if options.watch else "")
        if options.watch is None:
            return EXIT_OK
        time.sleep(options.watch)


def look(paths: Sequence[Path]) -> list[RunStatus]:
    """The state of every run in `paths`, with one request to SLURM for all."""
    runs = find_runs(paths)
    newest = [job for job in map(_newest_job, runs) if job is not None]
    states = slurm.states(newest) if newest and slurm.available() else {}
    return [status(run, states) for run in runs]


def _newest_job(run: Path) -> str | None:
    try:
        jobs = jobs_of(run)
    except (UserError, OSError):  # its row tells
        return None
    return jobs[-1].id if jobs else None


def _table(found: Sequence[RunStatus]) -> str:
    cells = rows(found, shutil.get_terminal_size((160, 24)).columns)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    right = {3, 4, 5, 6, 7, 8}
    lines = []
    for row in cells:
        padded = (c.rjust(w) if n in right else c.ljust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(padded).rstrip())
    return "\n".join([*lines, *(f"{one.run.name}: {one.slow_node}" for one in found if one.slow_node is not None)])
