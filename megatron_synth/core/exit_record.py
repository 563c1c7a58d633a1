"""How a process ended, told to whoever launched it.

A launcher knows an exit code at best, and a log does not say which of a thousand errors came first. Under a
launcher that sets `MEGATRON_SYNTH_OUTCOMES` to a folder, each process adds one JSON line to a file of its node there when
it ends otherwise than with success, and rank 0 when it succeeds, too. Without the variable nothing is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_synth.core.files import append_line

FOLDER_VARIABLE = "MEGATRON_SYNTH_OUTCOMES"

_step: int | None = None
_at_end: list[Callable[[int, BaseException | None], None]] = []


def at_step(step: int) -> None:
    """Note the optimizer steps that are done, for the report of a failure."""
    global _step
    _step = step


def last_step() -> int | None:
    """The optimizer steps that are done; None before training."""
    return _step


@contextlib.contextmanager
def told_at_end(act: Callable[[int, BaseException | None], None]) -> Iterator[None]:
    """Within, `act` is called with the arguments of `report` should this process end there: whatever ends it reports first."""
    _at_end.append(act)
    try:
        yield
    finally:
        _at_end.remove(act)


def report(code: int, error: BaseException | None = None) -> None:
    """Leave a line about the end of this process.

    Args:
        code: the exit code.
        error: what ended it, where that was an exception.
    """
    for act in reversed(_at_end):
        with contextlib.suppress(OSError):
            act(code, error)
    folder = os.environ.get(FOLDER_VARIABLE)
    number = os.environ.get("RANK", "0")
    rank = int(number) if number.isdecimal() else 0
    if not folder or (code == 0 and rank != 0):
        return
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    line = {
        "time": time.time(),
        "rank": rank,
        "host": os.environ.get("SLURMD_NODENAME") or os.uname().nodename,
        "code": code,
        "step": _step,
        "error": None if error is None else type(error).__name__,
        "message": "" if error is None else str(error)[:4000],
        "where": f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else None,
    }
    try:
        append_line(Path(folder) / f"node-{os.environ.get('GROUP_RANK', '0')}.jsonl", json.dumps(line))
    except OSError:
        return  # the error itself still reaches the log; a full disk must not hide it behind another one
