"""What is said when a verb is interrupted: what is kept, and how to go on."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from megatron_synth.core.log import is_first_rank, show

_NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "the end of the terminal (SIGHUP)"}


class Interrupted(KeyboardInterrupt):
    """A request to end that came as a signal."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@contextlib.contextmanager
def interruptible(kept: str | Callable[[], str]) -> Iterator[None]:
    """Within, Ctrl-C, SIGTERM and the end of the terminal raise `Interrupted`; then one line says what is kept. Main thread.

    kept: what is kept and how to go on, or a function that knows it when it is asked for.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, handle) for number in _NAMES if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    except KeyboardInterrupt as error:
        for number in before:  # the line is said whole, and once
            signal.signal(number, signal.SIG_IGN)
        if is_first_rank():
            text = kept if isinstance(kept, str) else kept()
            number = getattr(error, "number", signal.SIGINT)
            show(f"ended by {_NAMES.get(number) or signal.Signals(number).name}: {text}", error=True)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
