"""Stopping on request: a signal sets a flag, the ranks agree on it at the end of a step, then save and leave."""

from __future__ import annotations

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Listens for SIGTERM and SIGUSR1. Handlers only set a flag: schedulers send signals twice and at any moment."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        """This rank was asked to stop."""
        return self.signal_name is not None
