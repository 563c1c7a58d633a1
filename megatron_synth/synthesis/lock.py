"""One run at a time in an output."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_synth.config.errors import UserError

LOCK = ".lock"


@contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Held while a run goes on.

    Raises:
        UserError: another one holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UserError(f"output: {output}: another run writes to it; wait for it, or choose another output") from None
    try:
        yield
    finally:
        os.close(descriptor)
