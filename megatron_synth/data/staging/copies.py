"""Copies of prepared sources on a disk of this machine, made before a run: for windows in random order a network file
system asks its server thousands of times a second, a local disk does not mind.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_atomic, write_json
from megatron_synth.core.log import human, show
from megatron_synth.data.shards.block_hash import BlockHasher
from megatron_synth.data.shards.columns import SUFFIX as COLUMNS
from megatron_synth.data.shards.indexed import with_suffix
from megatron_synth.data.shards.manifest import FILE_NAME, Manifest, ShardInfo
from megatron_synth.data.shards.open_files import file_size
from megatron_synth.storage import objects
from megatron_synth.storage.faults import ObjectMissing
from megatron_synth.storage.remote import Location, Remote

COPY_BYTES = 16 * 2**20
LOG_INTERVAL_S = 30.0
LOCK, CHECKED = ".lock", ".checked.json"
DOCUMENT_FILES = (".idx", COLUMNS)
"""What tells of documents: enough to choose some."""
Progress = Callable[[int, int], None]


def stage(source: Location, folder: Path, progress: Progress | None = None) -> Path:
    """A copy of a prepared source below `folder`, made unless a whole one is there already.

    The copy is named after the digest of the source's content, so that another source of the same name never takes its
    place. Each file is whole or absent, and the manifest comes last. Of several processes on a machine that ask for the
    same copy one makes it and the others wait. The folder of a copy is its owner's alone, and a file that was touched since its
    checksum was compared is compared again, and copied again if it differs.

    Args:
        source: folder with a manifest.json, on a disk or in object storage.
        folder: on the local disk; it is made if need be.
        progress: called with the bytes that are there and the bytes of all; default: a bar on a terminal, lines in a log.

    Returns:
        The folder of the copy.

    Raises:
        UserError: the source is damaged, there is no room, or a file cannot be read or written.
    """
    manifest = Manifest.load(source)
    target = folder / copy_name(source, manifest)
    _copied(source, target, manifest, files_of(source, manifest, target), progress)
    return target


def copy_name(source: Location, manifest: Manifest) -> str:
    """What the folder of a source's copy is called."""
    name = source.name if isinstance(source, Remote) else source.resolve().name
    return f"{name}-{manifest.digest()[:16]}"


def files_of(source: Location, manifest: Manifest, target: Path) -> list[StagedFile]:
    """The files of a source and their copies in `target`; a UserError where one has not the size that is announced."""
    found = objects.listing(source)[0] if isinstance(source, Remote) else {}
    wanted: list[StagedFile] = []
    for shard in manifest.shards:
        for suffix, size in reversed(shard.sizes.items()):
            path: Location
            if isinstance(source, Remote):
                path = found.get(shard.name + suffix, source / (shard.name + suffix))
                if not path.etag:
                    raise UserError(f"{path}: there is no such object, and {FILE_NAME} announces it; copy it there again")
                there = path.size
            else:
                path = with_suffix(source / shard.name, suffix)
                there = file_size(path)
            if there != size:
                raise UserError(f"{path}: {FILE_NAME} announces {size} bytes, found {there}; copy it again")
            wanted.append(StagedFile(path, with_suffix(target / shard.name, suffix), size, shard, manifest.block_bytes))
    return wanted


def stage_documents(source: Remote, manifest: Manifest, folder: Path) -> tuple[Path, Manifest]:
    """Of the copy of a source in object storage what tells of its documents: indexes and columns, no tokens.

    `stage` copies the rest. Returns the folder of the copy, and the manifest as it is for it.

    Raises:
        UserError: as `stage`.
    """
    target = folder / copy_name(source, manifest)
    wanted = [one for one in files_of(source, manifest, target) if one.copy.suffix in DOCUMENT_FILES]
    return target, _copied(source, target, manifest, wanted, None, whole=False)


def _copied(
    source: Location,
    target: Path,
    manifest: Manifest,
    wanted: Sequence[StagedFile],
    progress: Progress | None,
    *,
    whole: bool = True,
) -> Manifest:
    """`complete` in a folder that is this user's, under its lock."""
    try:
        own_folder(target)
        with locked(target / LOCK):
            return complete(source, target, manifest, wanted, progress, whole=whole)
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror} while {source} was copied to {target}") from error


def complete(
    source: Location,
    target: Path,
    manifest: Manifest,
    wanted: Sequence[StagedFile],
    progress: Progress | None = None,
    *,
    whole: bool = True,
) -> Manifest:
    """Copy what is not in `target` yet; the copy's manifest, which is written last. Under its lock.

    whole: `wanted` is all of the source; if not, the manifest is not written.

    Raises:
        UserError: the source is damaged, or there is no room.
        OSError: a file cannot be read or written.
    """
    show = progress or _bar(source.name)
    for left in target.glob(".*.part"):  # of a process that was killed
        left.unlink()
    total = sum(one.size for one in wanted)
    known = _known(target / CHECKED)
    missing = [one for one in wanted if not one.is_sound(known)]
    needed, free = sum(one.size for one in missing), shutil.disk_usage(target).free
    if needed > free:
        raise UserError(f"{target}: {human(free)} bytes free, {human(needed)} needed for the copy of {source}; make room")
    done = total - needed
    for one in missing:
        one.copy.unlink(missing_ok=True)
        done = _copy(one.path, one.copy, done, total, show, one)
    own = with_tokenizer(source, target, manifest)
    checked = {} if whole else dict(known)
    checked |= {one.copy.name: _identity(one.copy) for one in wanted}
    if checked != known:
        write_json(target / CHECKED, checked)
    if whole and (not (target / FILE_NAME).exists() or Manifest.load(target) != own):
        own.save(target)
    return own


def with_tokenizer(source: Location, target: Path, manifest: Manifest) -> Manifest:
    """Copy the tokenizer beside the copy's own files, whatever its place was, where there is one; the copy's manifest."""
    tokenizer = manifest.tokenizer_of(source)
    copied = target / tokenizer.name
    content: bytes | None = None
    if isinstance(tokenizer, Remote):
        with contextlib.suppress(ObjectMissing):
            content = objects.read(tokenizer)
    elif tokenizer.exists():
        content = tokenizer.read_bytes()
    if content is not None and (copied.is_symlink() or not copied.is_file() or copied.read_bytes() != content):
        write_atomic(copied, content)
    return manifest.model_copy(update={"tokenizer": manifest.tokenizer.model_copy(update={"path": tokenizer.name})})


def head(source: Remote, folder: Path) -> Path:
    """A folder below `folder` with the manifest and the tokenizer of a source in object storage: enough to plan with it.

    Raises:
        UserError: it is no prepared source, or cannot be read or written.
    """
    manifest = Manifest.load(source)
    target = folder / (copy_name(source, manifest) + ".head")
    try:
        own_folder(target)
        with locked(target / LOCK):
            with_tokenizer(source, target, manifest).save(target)
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror} while {source} was copied to {target}") from error
    return target


def copied_file(place: Remote, folder: Path) -> Path:
    """A copy below `folder` of a small object, such as a tokenizer; made anew where it differs.

    Raises:
        UserError: it cannot be read or written.
    """
    content = objects.read(place)
    target = folder / f"{place.name}-{hashlib.sha256(content).hexdigest()[:16]}" / place.name
    try:
        own_folder(target.parent)
        if target.is_symlink() or not target.is_file() or target.read_bytes() != content:
            write_atomic(target, content)
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror} while {place} was copied to {target}") from error
    return target


@dataclass(frozen=True)
class StagedFile:
    """One file of a source, and its copy."""

    path: Location
    copy: Path
    size: int
    shard: ShardInfo
    block_bytes: int

    def is_sound(self, known: Mapping[str, Any]) -> bool:
        """Whether the copy is there and holds what it should: by its checksum, unless untouched since it was compared."""
        try:
            found = self.copy.lstat()
        except OSError:
            return False
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size != self.size:
            return False
        if known.get(self.copy.name) == _identity(self.copy):
            return True
        checksum = self.checksum()
        with open(self.copy, "rb", buffering=0) as file:
            while data := file.read(COPY_BYTES):
                checksum.update(data)
        return self.agrees(checksum)

    def checksum(self) -> Any:
        """Takes the bytes of the file."""
        blocks = self.path.suffix == ".bin" and self.shard.bin_blocks is not None
        return BlockHasher(self.block_bytes) if blocks else hashlib.sha256()

    def agrees(self, checksum: Any) -> bool:
        """Whether the bytes that `checksum` took are the manifest's."""
        if isinstance(checksum, BlockHasher):
            return checksum.finish() == self.shard.bin_blocks
        digest: str = checksum.hexdigest()
        return digest == self.shard.checksums[self.path.suffix]


def own_folder(target: Path, remedy: str = "set data.staging to one of your own") -> None:
    """Make a folder that nobody else can write in; refuse one that is another's, or a link. remedy: what to do then."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        target.mkdir(mode=0o700)
    found = target.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise UserError(f"{target}: is not a folder of yours; remove it, or {remedy}")
    if found.st_mode & 0o022:
        target.chmod(0o700)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within, the only process of this machine, and the only thread, that holds the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _identity(path: Path) -> list[int]:
    """What changes whenever a file is written, and cannot be put back."""
    found = path.lstat()
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _known(path: Path) -> dict[str, Any]:
    """Files whose checksums were compared, by name, as they then were."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) and not path.is_symlink() else {}


def _copy(path: Location, copy: Path, done: int, total: int, show: Progress, file: StagedFile) -> int:
    """Copy one file under a name that nobody can guess, and compare its checksum; returns the bytes done with it."""
    descriptor, temporary = tempfile.mkstemp(dir=copy.parent, prefix=f".{copy.name}.", suffix=".part")
    checksum = file.checksum()
    try:
        with os.fdopen(descriptor, "wb") as write:
            for data in _parts(path, file.size):
                write.write(data)
                checksum.update(data)
                done += len(data)
                show(done, total)
            write.flush()
            os.fsync(write.fileno())
        if not file.agrees(checksum):
            raise UserError(
                f"{path}: altered: its checksum is not that of {FILE_NAME}; prepare the source again, or copy it again"
            )
        os.replace(temporary, copy)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return done


def _parts(path: Location, size: int) -> Iterator[bytes]:
    """All of a file or an object, in order."""
    if isinstance(path, Remote):
        yield from objects.chunks(path, size)
        return
    with open(path, "rb") as read:
        while data := read.read(COPY_BYTES):
            yield data


def _bar(name: str) -> Progress:
    """Draws over its own line; into a log it writes a line now and then, and one when all is there."""
    if not sys.stderr.isatty():
        return _Lines(name).show

    def draw(done: int, total: int) -> None:
        filled = 30 * done // max(total, 1)
        end = "\n" if done == total else ""
        bar = f"copying {name} [{'#' * filled:<30}] {human(done)} of {human(total)} bytes"
        show(bar, error=True, control="\r", end=end)

    return draw


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
        show(line, error=True)
