"""Tasks of an array on fewer processors than tasks: they take turns of many seconds, as if each had a node of its own."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

TURN_S = 20.0
"""Long beside what it costs to fill a processor's caches again, short beside hours."""


@contextlib.contextmanager
def in_turn(folder: Path, turn_s: float = TURN_S) -> Iterator[None]:
    """While the block runs, of all processes that prepare a share by a configuration in a folder only one is not stopped.

    The system's scheduler would change between them every few milliseconds, and each would find its caches used by another:
    no node of a cluster does that. When the block ends, none is left stopped.
    """
    ended = threading.Event()
    # commands of jobs name their files without links, whatever the folder was called
    thread = threading.Thread(target=_turns, args=(folder.resolve(), turn_s, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _turns(folder: Path, turn_s: float, ended: threading.Event) -> None:
    last = ""
    try:
        while not ended.wait(0 if not last else turn_s):
            last = _give(folder, last)
            if not last and ended.wait(0.5):
                return
    finally:
        for process in shares(folder).values():
            _send(process, signal.SIGCONT)


def _give(folder: Path, last: str) -> str:
    """Let the share after `last` go on, in the order of their names, and stop the others. Its name; "" if there is none."""
    found = shares(folder)
    if not found:
        return ""
    chosen = min((name for name in found if name > last), default=min(found))
    for name, process in found.items():
        if name != chosen:
            _send(process, signal.SIGSTOP)
    _send(found[chosen], signal.SIGCONT)
    return chosen


def shares(folder: Path) -> dict[str, psutil.Process]:
    """The processes that work on a share each, by `K/N`: without those that only start one."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        of_folder = any(word.startswith(f"{folder}/") for word in words[1:])
        if of_folder and "--share" in words[:-1] and words[1:2] == ["-m"]:
            found[words[words.index("--share") + 1]] = process
    return found


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
