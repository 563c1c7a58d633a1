"""One program at a time in a folder: a file that says who works there, with a heartbeat.

The file is made whole, by linking it into its place, which is atomic on NFS too; locks of the operating system are not to be
had on every shared disk. Its holder touches it every `BEAT_S` seconds and removes it at the end. A holder that died is noticed
by its process where it ran on this machine, and by its heartbeat where it ran elsewhere: its file is then taken over, with a
note. Clocks of different machines are not compared: what counts is whether the file is touched while somebody looks.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from megatron_synth.config.errors import EXIT_RANK_LOST, UserError
from megatron_synth.core import exit_record
from megatron_synth.core.log import one_line, show
from megatron_synth.core.records import OPEN, Count, Positive, parse_json

BEAT_S = 5.0
"""Between two signs of life of a holder."""
STALE_S = 60.0
"""A holder on another machine that gave no sign of life for so long is gone."""
_POLL_S = 0.5
_MAX_BYTES = 1 << 14
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What file systems without hard links answer."""


@with_config(OPEN)
class LockInfo(TypedDict):
    """The content of a lock."""

    token: str
    program: str
    user: str
    host: str
    machine: str
    pid: Positive
    started: str
    since: str
    path: str
    inode: Count


class Held(UserError):
    """Another program works in the folder."""


_INFO: TypeAdapter[LockInfo] = TypeAdapter(LockInfo)


@dataclass(frozen=True)
class Holder:
    """What a lock says of who made it."""

    info: LockInfo | None
    """None: the content is not that of a lock, as after a power failure."""
    content: bytes
    touched: float
    """When the last sign of life came, by the clock of the disk."""
    copied: bool = False
    """It is a copy, made along with a folder that is locked or was."""

    @property
    def name(self) -> str:
        """Program, user, process and host in words."""
        if self.info is None:
            return "an unknown program"
        info = self.info
        return one_line(f"`megatron-synth {info['program']}` of {info['user']} on {info['host']}, pid {info['pid']}")

    @property
    def since(self) -> str:
        """When it began."""
        return "unknown" if self.info is None else one_line(self.info["since"])

    @property
    def lives(self) -> bool | None:
        """Whether its process lives; None: it runs on another machine, or nobody knows."""
        if self.info is None or self.info["machine"] != _machine():
            return None
        return _started(self.info["pid"]) == self.info["started"]

    def is_fresh(self, now: float) -> bool:
        """Whether it works, without waiting for its next sign of life: for those who only report."""
        return self.lives if self.lives is not None else abs(now - self.touched) < STALE_S


def holder(file: Path) -> Holder | None:
    """Who has made the lock in `file`; None if nobody has, as where it was copied along with its folder."""
    found = _read(file)
    return None if found is None or found.copied else found


def _read(file: Path) -> Holder | None:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as opened:
        found = os.fstat(opened.fileno())
        content = opened.read(_MAX_BYTES) if stat.S_ISREG(found.st_mode) else b""
    try:
        info = _INFO.validate_python(parse_json(content), strict=True)
    except (ValueError, ValidationError):
        return Holder(None, content, found.st_mtime)
    copied = info["inode"] != found.st_ino and info["path"] != str(file.resolve())
    return Holder(info, content, found.st_mtime, copied)


def refuse_held(file: Path) -> None:
    """Refuse at once a folder in which a program of this machine works. The lock itself is taken later.

    Raises:
        Held: names who holds it.
    """
    found = holder(file)
    if found is not None and found.lives:
        raise _held(file, found)


def refuse_alive(file: Path) -> None:
    """Refuse a folder in which a program works, on whatever machine. Waits for a sign of life of one that is elsewhere.

    Raises:
        Held: names who holds it.
    """
    first = holder(file)
    if first is None:
        return
    deadline = time.monotonic() + STALE_S
    while (found := holder(file)) is not None and found.lives is not False:
        if found.lives or (found.touched, found.content) != (first.touched, first.content):
            raise _held(file, found)
        if time.monotonic() > deadline:
            return
        time.sleep(_POLL_S)


class Lock:
    """The lock in `file`. A context: it is held within.

    Args:
        file: its folder exists.
        program: what this program does, such as `train`.
        note: is told what is taken over, and that there is something to wait for.
        lost: is called, in another thread, when another program has taken over. Default: this process ends with 70.
    """

    def __init__(
        self,
        file: Path,
        program: str,
        *,
        note: Callable[[str], None] = lambda text: show(f"note: {text}", error=True),
        lost: Callable[[str], None] | None = None,
    ):
        self._file, self._program, self._note = file, program, note
        self._lost = lost or _end
        self._token = secrets.token_hex(16)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.taken_over: Holder | None = None
        """Who held it, and died without giving it back."""

    def __enter__(self) -> Lock:
        """Take the lock.

        Raises:
            Held: another program holds it.
            UserError: the folder cannot be written.
        """
        try:
            while not self._made():
                found = _read(self._file)
                if found is None:
                    continue
                if not (found.copied or self._is_gone(found)):
                    raise _held(self._file, found)
                self._take_over(found)
            self._clear()
        except OSError as error:
            raise UserError(f"{self._file.parent}: cannot be written ({error.strerror or error})") from error
        self._owner = os.getpid()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the lock back; nothing if it is not held."""
        if self._thread is None or os.getpid() != self._owner:  # a forked process has not taken it
            return
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None
        with contextlib.suppress(OSError):
            if self._is_mine():
                self._file.unlink()

    # ---- taking

    def _made(self) -> bool:
        """Make the file; False if there is one."""
        temporary = self._file.with_name(f"{self._file.name}.{secrets.token_hex(8)}")
        try:
            self._write(temporary)
            try:
                os.link(temporary, self._file)
            except FileExistsError:
                return self._is_mine()  # NFS may repeat what has succeeded, and then fail
            except FileNotFoundError:
                if not self._file.parent.is_dir():
                    raise
                return False  # another that has just taken the lock has cleared it away
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                try:
                    self._write(self._file)
                except FileExistsError:
                    return False
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def _write(self, file: Path) -> float:
        """Make `file`; the time of that, by the clock of the disk."""
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            info: LockInfo = {
                "token": self._token,
                "program": self._program,
                "user": _user(),
                "host": socket.gethostname(),
                "machine": _machine(),
                "pid": os.getpid(),
                "started": _started(os.getpid()) or "",
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
                "path": str(self._file.resolve()),
                "inode": os.fstat(descriptor).st_ino,
            }
            os.write(descriptor, (json.dumps(info) + "\n").encode())
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)

    def _is_gone(self, found: Holder) -> bool:
        """Whether the holder has died. Waits for a sign of life of one that is elsewhere."""
        if found.lives is not None:
            return not found.lives
        patience = max(3 * BEAT_S, STALE_S - max(0.0, self._disk_time() - found.touched))
        self._note(
            f"{self._file.parent}: {found.name} began here at {found.since} and has not said that it ended; waits up to "
            f"{patience:.0f} s for a sign of life"
        )
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            time.sleep(_POLL_S)
            now = holder(self._file)
            if now is None:
                return True  # it has ended
            if (now.touched, now.content) != (found.touched, found.content):
                return False
        return True

    def _disk_time(self) -> float:
        """The time by the clock of the disk: that of a file that was just written."""
        probe = self._file.with_name(f"{self._file.name}.{secrets.token_hex(8)}")
        try:
            return self._write(probe)
        finally:
            probe.unlink(missing_ok=True)

    def _take_over(self, found: Holder) -> None:
        """Put a dead holder's lock away, unless another program has been faster."""
        aside = self._file.with_name(f"{self._file.name}.{secrets.token_hex(8)}")
        try:
            os.rename(self._file, aside)
        except FileNotFoundError:
            return
        try:
            if aside.read_bytes()[:_MAX_BYTES] != found.content:  # that of the faster one: back with it
                os.link(aside, self._file)
                return
        except (FileExistsError, FileNotFoundError):  # a third one holds it by now
            return
        finally:
            aside.unlink(missing_ok=True)
        if found.copied:
            return
        self.taken_over = found
        self._note(f"{self._file.parent}: {found.name}, since {found.since}, died without a word; its lock is taken over")

    def _clear(self) -> None:
        """Remove what others that died while they took the lock have left."""
        for path in self._file.parent.iterdir():
            if path.name.startswith(f"{self._file.name}."):
                path.unlink(missing_ok=True)

    # ---- holding

    def _is_mine(self) -> bool:
        found = holder(self._file)
        return found is not None and found.info is not None and found.info["token"] == self._token

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                if self._is_mine():
                    os.utime(self._file, follow_symlinks=False)
                    continue
                found = holder(self._file)
                if found is None and self._made():  # removed by hand
                    continue
            except OSError:  # the disk is full, or out of reach for a while
                continue
            by = "another program" if found is None else found.name
            self._lost(f"{self._file.parent}: {by} has taken this folder over, as if this process had died; ends at once")
            return


def _held(file: Path, found: Holder) -> Held:
    return Held(
        f"{file.parent}: in use by {found.name}, since {found.since}; wait until it has ended, end it, or choose another "
        f"folder ({file.name} there tells who works in it)"
    )


def _end(text: str) -> None:
    show(f"error: {text}", error=True)
    exit_record.report(EXIT_RANK_LOST, RuntimeError(text))
    os._exit(EXIT_RANK_LOST)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number without a name
        return str(os.getuid())


@cache
def _machine() -> str:
    """This start of this machine, and its space of process numbers: containers have their own."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When a process of this machine started, in whatever unit: two processes of one number differ. None: it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
        try:  # a system without /proc
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return ""
        return ""
    return None if fields[0] in "ZX" else fields[19]


@contextlib.contextmanager
def folder_for(path: Path) -> Iterator[None]:
    """`path` as a folder, made where it is not there; what was made here and is empty in the end is removed again.

    Raises:
        UserError: it cannot be made.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror or error})") from error
    try:
        yield
    finally:
        for folder in made:
            try:
                folder.rmdir()
            except OSError:  # in use
                break
