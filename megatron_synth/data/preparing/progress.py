"""How far a preparation is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from megatron_synth.core.log import human, show

LOG_INTERVAL_S = 30.0


class Progress(Protocol):
    """Told what was done."""

    def update(self, n: int) -> object:
        """So many bytes or tokens more."""


class _Lines:
    """Progress in a log."""

    def __init__(self, name: str, total: int, unit: str):
        self._name, self._unit, self._done = name, unit, 0
        self._of = f" of about {human(total)}" if total else ""
        self._began = self._told = time.monotonic()

    def update(self, n: int) -> None:
        """Writes a line when the last one is LOG_INTERVAL_S old."""
        self._done += n
        now = time.monotonic()
        if now - self._told >= LOG_INTERVAL_S:
            self._told = now
            line = f"{self._name}: {human(self._done)}{self._of} {self._unit} after {now - self._began:.0f} s"
            show(line, error=True)


@contextmanager
def progress(name: str, total: int, unit: str = "bytes") -> Iterator[Progress]:
    """A bar of `total` bytes or tokens on a terminal, lines elsewhere; 0: the end is not known."""
    if not sys.stderr.isatty():
        yield _Lines(name, total, unit)
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(desc=name, total=total or None, unit=f" {unit}", unit_scale=True, leave=False) as bar:
        yield bar
