"""`megatron-synth status RUN...` and `megatron-synth logs RUN`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_synth.cluster import slurm
from megatron_synth.cluster.progress import jobs_of, tail
from megatron_synth.cluster.status import RunStatus, find_runs, jobs_folder, rows, status
from megatron_synth.config.errors import EXIT_OK, UserError

_CLEAR = "\033[H\033[J"
_FOLLOW_S = 0.3


def main(argv: list[str]) -> int:
    """Print where runs stand. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth status", description="Where runs stand, from their directories and SLURM's queue."
    )
    parser.add_argument("runs", nargs="*", type=Path, default=[Path("runs")], metavar="RUN", help="default: all in runs/")
    parser.add_argument("--watch", nargs="?", type=_seconds, const=5.0, metavar="SECONDS", help="again and again; default 5")
    parser.add_argument("--json", action="store_true", help="one JSON object per run, for programs")
    options = parser.parse_args(argv)
    while True:
        found = look(options.runs)
        if options.json:
            for one in found:
                print(json.dumps(dataclasses.asdict(one) | {"run": str(one.run)}))
        else:
            text = _table(found)
            print(f"{_CLEAR}{time.strftime('%F %T')}\n{text}" if options.watch else text, flush=True)
        if options.watch is None:
            return EXIT_OK
        time.sleep(options.watch)


def look(paths: Sequence[Path]) -> list[RunStatus]:
    """The state of every run in `paths`, with one request to SLURM for all."""
    runs = find_runs(paths)
    newest = [jobs[-1].id for jobs in map(jobs_of, runs) if jobs]
    states = slurm.states(job for job in newest if job is not None) if newest and slurm.available() else {}
    return [status(run, states) for run in runs]


def logs(argv: list[str]) -> int:
    """Print what the newest job of a run has printed. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="megatron-synth logs", description="What the newest job of a run has printed.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--rank", type=int, help="only the lines of this rank")
    parser.add_argument("--follow", "-f", action="store_true", help="go on until the job has ended")
    parser.add_argument("--lines", "-n", type=int, help="only so many, the last ones")
    options = parser.parse_args(argv)
    folder = jobs_folder(options.run)
    file, prefix = folder / "job.log", f"[rank {options.rank}] "
    job = (folder / "job.id").read_text().strip()
    if not file.is_file() and not options.follow:
        raise UserError(f"{file}: not there yet; job {job} has not begun (megatron-synth status {options.run})")

    def show(lines: Sequence[str]) -> None:
        for line in lines:
            if options.rank is None or line.startswith(prefix):
                print(line)
        sys.stdout.flush()

    place = 0
    if file.is_file():
        place = file.stat().st_size
        lines = tail(file, place + 1)
        if options.rank is not None:
            lines = [line for line in lines if line.startswith(prefix)]
        show(lines[-options.lines :] if options.lines else lines)
        place = _whole(file, place)
    while options.follow:
        ended = not any(state.active for state in slurm.states([job]).values())
        if file.is_file() and file.stat().st_size > place:
            with file.open("rb") as stream:
                stream.seek(place)
                data = stream.read()
            data = data[: data.rfind(b"\n") + 1]
            show(data.decode("utf-8", errors="replace").splitlines())
            place += len(data)
        if ended:
            break
        time.sleep(_FOLLOW_S)
    return EXIT_OK


def _whole(file: Path, size: int) -> int:
    """Where the last whole line of the first `size` bytes ends."""
    with file.open("rb") as stream:
        stream.seek(max(0, size - (1 << 16)))
        rest = stream.read(min(size, 1 << 16))
    return size - (len(rest) - (rest.rfind(b"\n") + 1))


def _table(found: Sequence[RunStatus]) -> str:
    cells = rows(found, shutil.get_terminal_size((160, 24)).columns)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    right = {3, 4, 5, 6, 7}
    lines = []
    for row in cells:
        padded = (c.rjust(w) if n in right else c.ljust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 86_400:
        raise argparse.ArgumentTypeError(f"expected seconds, found '{text}'")
    return value
