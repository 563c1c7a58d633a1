"""When this process began, and what it did before there was a run directory to note it in."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_spans: list[tuple[str, float, float]] = []


def process_start() -> float:
    """When this process was started, in seconds since the epoch; to about a hundredth of a second."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - age


@contextmanager
def span(name: str) -> Iterator[None]:
    """Within, this process does what `name` says; see `take_spans`."""
    begin = time.time()
    yield
    _spans.append((name, begin, time.time()))


def take_spans() -> list[tuple[str, float, float]]:
    """What was noted by `span`: name, begin and end. They are forgotten."""
    found = list(_spans)
    _spans.clear()
    return found
