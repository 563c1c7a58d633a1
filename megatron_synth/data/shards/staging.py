"""Copies of prepared sources on a disk of this machine, made before a run: for windows in random order a network file
system asks its server thousands of times a second, a local disk does not mind.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_synth.config.errors import UserError
from megatron_synth.core.log import human
from megatron_synth.data.shards.indexed import file_size, with_suffix
from megatron_synth.data.shards.manifest import FILE_NAME, Manifest

COPY_BYTES = 16 * 2**20
LOG_INTERVAL_S = 30.0
Progress = Callable[[int, int], None]


def stage(source: Path, folder: Path, progress: Progress | None = None) -> Path:
    """A copy of a prepared source below `folder`, made unless a whole one is there already.

    The copy is named after the digest of the source's content, so that another source of the same name never takes its
    place. Each file is whole or absent, and the manifest comes last. Of several processes on a machine that ask for the
    same copy one makes it and the others wait.

    Args:
        source: folder with a manifest.json.
        folder: on the local disk; it is made if need be.
        progress: called with the bytes that are there and the bytes of all; default: a bar on a terminal, lines in a log.

    Returns:
        The folder of the copy.

    Raises:
        UserError: the source is damaged, there is no room, or a file cannot be read or written.
    """
    manifest = Manifest.load(source)
    target = folder / f"{source.resolve().name}-{manifest.digest()[:16]}"
    tokenizer = source / manifest.tokenizer.path
    wanted: list[tuple[Path, Path, int]] = []
    for shard in manifest.shards:
        for suffix, size in ((".idx", shard.idx_bytes), (".bin", shard.bin_bytes)):
            path = with_suffix(source / shard.name, suffix)
            if file_size(path) != size:
                raise UserError(f"{path}: {FILE_NAME} announces {size} bytes, found {file_size(path)}; copy it again")
            wanted.append((path, with_suffix(target / shard.name, suffix), size))
    show = progress or _bar(source.name)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with open(target / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            total = sum(size for _, _, size in wanted)
            missing = [one for one in wanted if not (one[1].exists() and one[1].stat().st_size == one[2])]
            needed, free = sum(size for _, _, size in missing), shutil.disk_usage(target).free
            if needed > free:
                raise UserError(
                    f"{target}: {human(free)} bytes free, {human(needed)} needed for the copy of {source}; make room"
                )
            done = total - needed
            for path, copy, _ in missing:
                done = _copy(path, copy, done, total, show)
            if not (target / FILE_NAME).exists():
                # the tokenizer lies beside the copy's own files, whatever its place was
                own = manifest.model_copy(update={"tokenizer": manifest.tokenizer.model_copy(update={"path": tokenizer.name})})
                if tokenizer.exists():
                    _copy(tokenizer, target / tokenizer.name, 0, 0, lambda done, total: None)
                own.save(target)
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror} while {source} was copied to {target}") from error
    return target


def _copy(path: Path, copy: Path, done: int, total: int, show: Progress) -> int:
    """Copy one file under a temporary name; returns the bytes done with it."""
    temporary = copy.with_name(f".{copy.name}.part")
    try:
        with open(path, "rb") as read, open(temporary, "wb") as write:
            while data := read.read(COPY_BYTES):
                write.write(data)
                done += len(data)
                show(done, total)
            write.flush()
            os.fsync(write.fileno())
        os.replace(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)
    return done


def _bar(name: str) -> Progress:
    """Draws over its own line; into a log it writes a line now and then, and one when all is there."""
    if not sys.stderr.isatty():
        return _Lines(name).show

    def show(done: int, total: int) -> None:
        filled = 30 * done // max(total, 1)
        end = "\n" if done == total else ""
        bar = f"copying {name} [{'#' * filled:<30}] {human(done)} of {human(total)} bytes"
        print(f"\r{bar}", end=end, file=sys.stderr, flush=True)

    return show


class _Lines:
    """Progress in a log."""

    def __init__(self, name: str):
        self._name, self._began, self._told = name, time.monotonic(), 0.0

    def show(self, done: int, total: int) -> None:
        """A line every LOG_INTERVAL_S, the first at once."""
        now = time.monotonic()
        if self._told and now - self._told < LOG_INTERVAL_S and done < total:
            return
        self._told = now
        line = f"copying {self._name}: {human(done)} of {human(total)} bytes after {now - self._began:.0f} s"
        print(line, file=sys.stderr, flush=True)
