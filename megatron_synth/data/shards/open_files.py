"""Files of shards: opened, mapped, read, and what went wrong told with file and offset."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import fill, open_regular
from megatron_synth.data.shards import native

AGAIN = "prepare the source again, or copy it again"


class OpenFile:
    """A descriptor of a file that is read at random; closed when nobody holds the object any more."""

    __slots__ = ("fd",)

    def __init__(self, path: Path):
        self.fd = open_regular(path)
        # windows come in random order: what read-ahead would fetch beside them is not wanted
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        fd = getattr(self, "fd", None)
        if fd is not None:
            os.close(fd)


@contextmanager
def opened_whole(path: Path, size: int, again: str = AGAIN) -> Iterator[int]:
    """A descriptor of a file of so many bytes, while it is read. again: what to do where it cannot be.

    Raises:
        UserError: it cannot be opened or read, or has another size.
    """
    try:
        file = open_regular(path)
        try:
            found = os.fstat(file).st_size
            if found != size:
                raise UserError(f"{path}: {size} bytes expected, found {found} bytes; {again}")
            yield file
        finally:
            os.close(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {again}") from None


def read_exactly(file: int, path: Path, out: memoryview, offset: int, again: str = AGAIN) -> None:
    """Fill `out` from byte `offset` of an open file on.

    Raises:
        UserError: it ends before.
    """
    done = fill(file, out, offset)
    if done < out.nbytes:
        raise UserError(f"{path}: ends at byte {offset + done}: it was cut off after it was opened; {again}")


def unreadable(path: Path, content: np.ndarray | None, error: native.BusError) -> UserError:
    """What a failed read of a memory map means. content: what was mapped; None when it is not any more."""
    offset = None if content is None else error.address - native.address_of(content)
    where = "" if offset is None else f" at offset {offset}"
    try:
        size = path.stat().st_size
        cut = offset is not None and size <= offset
        why = f"the file has {size} bytes now: it was cut off after it was opened" if cut else "check the disk"
    except OSError as gone:
        why = f"the file cannot be found now: {gone.strerror}"
    return UserError(f"{path}: the system could not read it{where} (bus error); {why}; then {AGAIN}")


def map_file(path: Path, size: int) -> mmap.mmap:
    """A file of at least `size` bytes, mapped.

    Raises:
        UserError: it cannot be, or is shorter.
    """
    try:
        descriptor = open_regular(path)
        try:
            content = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:  # an empty file is a ValueError
        raise UserError(f"{path}: {error} while mapping it; {AGAIN}") from error
    if len(content) < size:
        raise UserError(f"{path}: {size} bytes expected, found {len(content)}: the file was cut off; {AGAIN}")
    return content


def file_size(path: Path | str) -> int:
    """Bytes of `path`; a UserError when it is not there."""
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {AGAIN}") from None
