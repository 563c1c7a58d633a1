"""How much the copies in `data.staging` take together, and which of them go when others need the room.

A process that reads copies holds a lock on the `.used` file of each until it ends: what is in use stays. Of the others, those
used longest ago go first. All of that is in the file system, so that it outlives processes; of one that was killed the system
takes back the lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from megatron_synth.config.errors import UserError
from megatron_synth.core.log import human, show
from megatron_synth.data.staging.copies import CHECKED, locked, own_folder

USED, FOLDER_LOCK = ".used", ".staging.lock"
_REMOVED = ".removed-"
_held: dict[Path, int] = {}
"""Descriptors of the locks of this process, kept for its life."""


def claim(folder: Path, wanted: Mapping[str, int], limit: int | None) -> None:
    """Have room for copies in `folder`, and keep them from being removed while this process lives.

    Args:
        folder: where the copies are made.
        wanted: names of the copies, and the bytes that each takes when it is whole.
        limit: bytes of all copies together; None for no limit.

    Raises:
        UserError: they take more than the limit, together with copies that other processes use.
    """
    needed = sum(wanted.values())
    if limit is not None and needed > limit:
        raise UserError(
            f"data.staging_bytes: the copies of this run take {needed} bytes, {limit} are allowed in {folder}; raise it, or "
            "leave out sources"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / FOLDER_LOCK):
            for left in folder.glob(f"{_REMOVED}*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            if limit is not None:
                _make_room(folder, wanted, needed, limit)
            for name, size in wanted.items():
                own_folder(folder / name)
                _hold(folder / name, size)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror} while room was made for copies in {folder}") from error


def _hold(copy: Path, size: int) -> None:
    known = _held.get(copy)
    if known is None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        known = _held[copy] = os.open(copy / USED, flags, 0o600)
        fcntl.flock(known, fcntl.LOCK_SH)
    os.pwrite(known, json.dumps({"bytes": size}).encode(), 0)
    os.utime(known)


def _make_room(folder: Path, wanted: Mapping[str, int], needed: int, limit: int) -> None:
    """Remove copies that nobody uses, the one used longest ago first, until what is wanted fits."""
    others = []
    for path in folder.iterdir():
        if path.name in wanted or path.name.startswith(".") or not stat.S_ISDIR(path.lstat().st_mode):
            continue
        if (path / USED).exists() or (path / CHECKED).exists():  # manifests and tokenizers alone are small, and stay
            others.append((_last_use(path), path, _size(path)))
    total = needed + sum(size for _, _, size in others)
    kept = []
    for _, path, size in sorted(others):
        if total <= limit:
            return
        if _remove_unused(path):
            total -= size
            show(f"data.staging: removed the copy {path}, {human(size)} bytes, to make room", error=True)
        else:
            kept.append(path.name)
    if total > limit:
        raise UserError(
            f"data.staging_bytes: {human(needed)} bytes are needed in {folder}, {human(limit)} allowed, and the copies "
            f"{', '.join(kept[:5])} are in use; raise it, or wait for the runs that use them"
        )


def _last_use(copy: Path) -> float:
    """When it was claimed last; one from a version without claims, when it was made."""
    try:
        return (copy / USED).lstat().st_mtime
    except OSError:
        return copy.lstat().st_mtime


def _size(copy: Path) -> int:
    """What a copy takes, or will when it is whole."""
    there = sum(path.lstat().st_size for path in copy.iterdir())
    try:
        told = json.loads((copy / USED).read_text(encoding="utf-8"))["bytes"]
        return max(there, told if isinstance(told, int) else 0)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return there


def _remove_unused(copy: Path) -> bool:
    """Remove a copy, unless a process uses it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(copy / USED, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        doomed = copy.with_name(f"{_REMOVED}{copy.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        copy.rename(doomed)  # first out of sight, so that a crash leaves nothing that looks like a copy
        shutil.rmtree(doomed)
        return True
    finally:
        os.close(descriptor)
