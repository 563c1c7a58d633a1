"""`megatron-synth logs RUN`: what the newest job of a run has printed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_synth.cli.options.types import count, count_or_zero
from megatron_synth.cluster import slurm
from megatron_synth.cluster.progress import tail
from megatron_synth.cluster.status import newest_job
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.core.log import show

_FOLLOW_S = 0.3


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(prog="megatron-synth logs", description="What the newest job of a run has printed.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--rank", type=count_or_zero, help="only the lines of this rank")
    parser.add_argument("--follow", "-f", action="store_true", help="go on until the job has ended")
    parser.add_argument("--lines", "-n", type=count, help="only so many, the last ones")
    return parser


def main(argv: list[str]) -> int:
    """Print what the newest job of a run has printed. Returns the exit code."""
    options = parser().parse_args(argv)
    newest = newest_job(options.run)
    file, prefix, job = newest.folder / "job.log", f"[rank {options.rank}] ", newest.id
    if not file.is_file() and not options.follow:
        raise UserError(f"{file}: not there yet; job {job} has not begun (megatron-synth status {options.run})")

    def tell(lines: Sequence[str]) -> None:
        chosen = [line for line in lines if options.rank is None or line.startswith(prefix)]
        if chosen:
            show("\n".join(chosen))

    place = 0
    if file.is_file():
        place = file.stat().st_size
        lines = tail(file, place + 1)
        if options.rank is not None:
            lines = [line for line in lines if line.startswith(prefix)]
        tell(lines[-options.lines :] if options.lines else lines)
        place = _whole(file, place)
    while options.follow:
        ended = job is None or not any(state.active for state in slurm.states([job]).values())
        if file.is_file() and file.stat().st_size > place:
            with file.open("rb") as stream:
                stream.seek(place)
                data = stream.read()
            data = data[: data.rfind(b"\n") + 1]
            tell(data.decode("utf-8", errors="replace").splitlines())
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
