"""Files that are either whole or absent."""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """The folder of what this user could make again: megatron-synth in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "megatron-synth"


def write_atomic(path: Path, data: str | bytes, *, private: bool = False) -> None:
    """Write `path` so that a reader, or a crash at any moment, sees the old content or the new, never a part.

    The file's mode is what the umask leaves, as of any new file. `private`: for its owner's eyes alone.
    """
    # of a name that is not UTF-8 the bytes that are none are written out; in JSON that is the same text
    payload = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    temporary = path.with_name(f".{_cut(path.name)}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(temporary, flags, 0o600 if private else 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        # the file that was wanted is what its user knows; a write alone would name none
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a file that was there before. A pipe would wait for a writer for ever, and a device has no end.

    flags: of `os.open`; with O_NOFOLLOW a link is refused, too.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def read_regular(path: Path) -> bytes:
    """All of such a file; OSError otherwise."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read()


def fill(descriptor: int, out: memoryview | bytearray, offset: int) -> int:
    """Read from byte `offset` of a file until `out` is full or the file ends. Returns the bytes read."""
    view, done = memoryview(out), 0
    if not view.nbytes:
        return 0
    view = view.cast("B")
    while done < len(view) and (read := os.preadv(descriptor, [view[done:]], offset + done)):
        done += read
    return done


def _cut(name: str) -> str:
    """As much of a name as leaves room for more; the limit is 255 bytes."""
    return name.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "ignore")


def append_line(path: Path, text: str) -> None:
    """Add a line to a file, in one write: lines of several processes do not mix.

    Raises:
        OSError: with the name of the file.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        os.write(descriptor, (text + "\n").encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Force the names of the files of a folder to disk: what was made, renamed or removed in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
