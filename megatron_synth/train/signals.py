"""Stopping on request: SIGTERM and SIGUSR1 from a scheduler, SIGINT from Ctrl-C.

Before the first step there is nothing to save: the process says so and ends with 75 at once, whatever its main thread waits
for: imports, other ranks, the files of a checkpoint. From `hold` on a request is a flag. The ranks agree on it at the end of a
step, or at a batch of an evaluation, then save and leave. A second Ctrl-C does not wait for that.

Light, so that it can be imported, and listen, before everything else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from megatron_synth.config.errors import EXIT_STOPPED
from megatron_synth.core import exit_record

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells do

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_GRACE_S = 5.0
"""How far apart a signal may reach the ranks of a run."""


class StopRequest:
    """Listens from its making on, which must be in the main thread. Handlers only note a signal: schedulers send it twice."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._holding = self._waited = False
        # Python runs handlers between two lines of the main thread, which may wait in compiled code for minutes. The system
        # writes to the pipe at once.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._handle)
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()

    @property
    def requested(self) -> bool:
        """This rank was asked to stop."""
        return self.signal_name is not None

    def hold(self) -> None:
        """From now on there is something to save: requests wait to be asked for."""
        self._holding = True

    def wait_for_late(self) -> None:
        """Another rank left before the first step, perhaps for a signal that is on its way here and then ends this process."""
        if not self._holding and not self._waited and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            self._waited = True
            time.sleep(_GRACE_S)

    @contextlib.contextmanager
    def before_failing(self) -> Iterator[None]:
        """Within, an error of torch's that may come of another rank's leaving waits for a late signal before it is raised."""
        try:
            yield
        except RuntimeError:
            self.wait_for_late()
            raise

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    def _listen(self, reader: int) -> None:
        interrupts = 0
        while numbers := os.read(reader, 64):
            for number in numbers:
                if number not in _SIGNALS:
                    continue
                self.signal_name = name = signal.Signals(number).name
                if not self._holding:
                    _leave(EXIT_STOPPED, f"stopped on request ({name}) before the first step; the same command starts again")
                if number == signal.SIGINT:
                    interrupts += 1
                    if interrupts > 1:
                        text = "ended by a second Ctrl-C; the same command resumes from the last checkpoint"
                        _leave(EXIT_INTERRUPTED, text)
                    _tell("Ctrl-C: saves after this step, then leaves; Ctrl-C again ends at once, without a save")


_listening: tuple[int, StopRequest] | None = None


def listen() -> StopRequest:
    """The stop request of this process, which listens from the first call on. Main thread."""
    global _listening
    if _listening is None or _listening[0] != os.getpid():  # a forked process has no thread of its parent
        _listening = (os.getpid(), StopRequest())
    return _listening[1]


def _tell(text: str) -> None:
    """A line on the console, on rank 0 only, around Python's buffers: the main thread may hold their locks."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(1, (text + "\n").encode())


def _leave(code: int, text: str) -> NoReturn:
    _tell(text)
    exit_record.report(code)
    os._exit(code)
