"""What is done with objects: look, list, read in ranges, upload, remove. Every call is repeated where that may help.

Credentials are the business of the libraries: they take them from the environment or from files of their own.
"""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from megatron_synth.core.files import read_regular
from megatron_synth.storage.faults import ObjectMissing, StorageError, explained, fault_of
from megatron_synth.storage.remote import Location, Remote, remote

ATTEMPTS = 6
FIRST_PAUSE_S = 0.2
"""Doubled after each attempt: 6 s of waiting in all."""
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
RANGE_BYTES = 8 * 2**20
RANGES_AHEAD = 4
"""Ranges of one object that are asked for at a time."""
MOST_AT_ONCE = 2**30
"""Bytes of an object that is read whole into memory, such as a manifest."""
_ETAGS = ("ETag", "etag", "Content-MD5", "md5Hash", "generation", "blob_id")

T = TypeVar("T")


def filesystem(place: Remote) -> Any:
    """fsspec's file system of an object. It keeps connections; listings are asked for each time."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False}
    if place.scheme == "s3":
        timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S}
        options["config_kwargs"] = {**timeouts, "retries": {"mode": "standard", "total_max_attempts": 1}}
    elif place.scheme == "https":
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
        options["client_kwargs"] = {"timeout": limits, "trust_env": True}
    elif place.scheme == "hf":
        options = {}
    found = fsspec.filesystem(place.scheme, **options)
    if place.scheme == "s3":
        found.retries = 1  # attempts are counted here, for all stores alike
    return found


def attempt(place: Remote, action: str, call: Callable[[Any, str], T]) -> T:
    """`call(file system, name)`, again where the fault may pass.

    action: what is done, after `could not`, for the message.

    Raises:
        StorageError: it did not succeed.
    """
    pause = FIRST_PAUSE_S
    for number in range(1, ATTEMPTS + 1):
        try:
            return call(filesystem(place), place.url)
        except StorageError:
            raise
        except Exception as error:  # what a library raises is its own affair
            if number == ATTEMPTS or not fault_of(error).passes:
                raise explained(_fuller(error, place), place, action, number) from None
        time.sleep(pause)
        pause *= 2
    raise AssertionError


def _fuller(error: BaseException, place: Remote) -> BaseException:
    """The same error as an answer with a body tells it: that to HEAD has none, and so no code."""
    kind = fault_of(error)
    if place.scheme != "s3" or kind.detail or kind.kind not in ("missing", "denied"):
        return error
    try:
        filesystem(place).call_s3("list_objects_v2", Bucket=place.bucket, MaxKeys=1)
    except Exception as other:
        return other if fault_of(other).kind in ("bucket", "skew", "region", "denied") else error
    return error


def look(place: Remote, action: str = "find it") -> Remote:
    """The object with its size and what the store calls its content.

    Raises:
        StorageError: it is not there, is a folder, or the store tells neither size nor content.
    """
    found = attempt(place, action, lambda files, name: files.info(name))
    if found.get("type") == "directory":
        raise StorageError(f"{place}: could not {action}: it is a folder; name its objects, such as {place}/*.jsonl")
    return _described(place, found)


def _described(place: Remote, info: dict[str, Any]) -> Remote:
    etag = next((str(info[key]) for key in _ETAGS if info.get(key)), "")
    size = info.get("size")
    if not etag or not isinstance(size, int) or size < 0:
        raise StorageError(
            f"{place}: the store tells no {'size' if etag else 'ETag'} of it, by which a change would be noticed; copy it to a "
            "bucket or a disk"
        )
    return place.looked_at(size, etag.strip('"'))


def find(pattern: str, where: str = "") -> list[Remote]:
    """The objects that a pattern names, sorted, each looked at; `*`, `?`, `[...]` and `**` as in paths. None: an empty list.

    Raises:
        UserError: the store cannot be asked, or a name is not plain.
    """
    web = pattern.startswith("https://")
    asked = remote(pattern if web else pattern.replace("?", "*"), where)  # on the web a query begins with it
    if not any(mark in pattern for mark in "*?["):
        try:
            return [look(asked)]
        except ObjectMissing:
            return []
    if web:
        raise StorageError(f"{where}: {asked}: the web has no listings; name each file")
    found = attempt(asked, "list it", lambda files, name: files.glob(pattern, detail=True))
    listed = [(name, info) for name, info in found.items() if info.get("type") != "directory" and not name.endswith("/")]
    return sorted(_described(remote(f"{asked.scheme}://{name}", where), info) for name, info in listed)


def listing(folder: Remote) -> tuple[dict[str, Remote], set[str]]:
    """The objects directly in a folder by name, and the names of folders there; both empty where there is none."""

    def ask(files: Any, name: str) -> list[dict[str, Any]]:
        try:
            return list(files.ls(name, detail=True))
        except FileNotFoundError as error:
            if fault_of(_fuller(error, folder)).kind != "missing":
                raise
            return []

    objects: dict[str, Remote] = {}
    folders: set[str] = set()
    for info in attempt(folder, "list it", ask):
        name = str(info["name"]).rstrip("/").rpartition("/")[2]
        if info.get("type") == "directory":
            folders.add(name)
        elif name and name != folder.name:
            objects[name] = _described(folder / name, info)
    return objects, folders


def read(place: Remote, action: str = "read it") -> bytes:
    """All of a small object.

    Raises:
        StorageError: it cannot be read, or has more than MOST_AT_ONCE bytes.
    """
    size = look(place, action).size
    if size > MOST_AT_ONCE:
        raise StorageError(f"{place}: could not {action}: {size} bytes, at most {MOST_AT_ONCE} were expected")
    return b"".join(chunks(place, size, action))


def read_range(place: Remote, begin: int, end: int, action: str = "read it") -> bytes:
    """Bytes [begin, end) of an object.

    Raises:
        StorageError: they cannot be read, or it ends before.
    """
    if begin == end:
        return b""

    def ask(files: Any, name: str) -> bytes:
        data: bytes = files.cat_file(name, start=begin, end=end)
        return data

    data = attempt(place, action, ask)
    if len(data) != end - begin:
        raise StorageError(
            f"{place}: could not {action}: it is truncated, {end} bytes were expected and it ends after {begin + len(data)}; "
            "copy it there again"
        )
    return data


def chunks(place: Remote, size: int, action: str = "read it") -> Iterator[bytes]:
    """All `size` bytes of an object in order, several ranges at a time. Raises StorageError."""
    ranges = [(begin, min(begin + RANGE_BYTES, size)) for begin in range(0, size, RANGE_BYTES)]
    if len(ranges) == 1:
        yield read_range(place, 0, size, action)
    if len(ranges) < 2:
        return
    with ThreadPoolExecutor(RANGES_AHEAD, "storage") as pool:
        waiting = deque(pool.submit(read_range, place, *one, action) for one in ranges[:RANGES_AHEAD])
        try:
            for number in range(len(ranges)):
                yield waiting.popleft().result()
                if number + RANGES_AHEAD < len(ranges):
                    waiting.append(pool.submit(read_range, place, *ranges[number + RANGES_AHEAD], action))
        finally:
            pool.shutdown(cancel_futures=True)


class _RangedFile(io.RawIOBase):
    """An object as a file to read, in ranges. It opens only while its content is what was looked at."""

    def __init__(self, place: Remote):
        super().__init__()
        found = look(place, "read it")
        self._place = place if place.etag else found
        self._at = 0
        if (found.size, found.etag) != (self._place.size, self._place.etag):
            raise StorageError(
                f"{place}: could not read it: it has changed since it was first looked at ({place.size} bytes, ETag "
                f"{place.etag}; now {found.size}, {found.etag}); leave it alone until the run has ended, and start again"
            )

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._place.size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._at + len(view), self._place.size)
        if end <= self._at:
            return 0
        data = read_range(self._place, self._at, end)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def upload(path: Path, place: Remote) -> None:
    """Copy a file to an object. Raises StorageError, and OSError where the file cannot be read."""
    size = path.stat().st_size
    with path.open("rb"):  # what is wrong with the file is no fault of the store
        pass
    attempt(place, "upload it", lambda files, name: files.put_file(str(path), name))
    found = look(place, "upload it").size
    if found != size:
        raise StorageError(f"{place}: could not upload it: it has {found} bytes there, {path} has {size}; start again")


def write(place: Remote, data: bytes) -> None:
    """Write a small object. Raises StorageError."""
    attempt(place, "write it", lambda files, name: files.pipe_file(name, data))


def remove(place: Remote) -> None:
    """Remove an object, if it is there. Raises StorageError."""

    def ask(files: Any, name: str) -> None:
        try:
            files.rm_file(name)
        except FileNotFoundError:
            return

    attempt(place, "remove it", ask)


def open_binary(place: Location, buffer_bytes: int = RANGE_BYTES) -> io.BufferedIOBase:
    """A file or an object, to read from its start or anywhere. Raises OSError of a file, StorageError of an object."""
    return io.BufferedReader(_RangedFile(place), buffer_bytes) if isinstance(place, Remote) else place.open("rb")


def read_location(place: Location) -> bytes:
    """All of a small file or object. Raises OSError of a file, StorageError of an object."""
    return read(place) if isinstance(place, Remote) else read_regular(place)


def size_of(place: Location) -> int:
    """Bytes of a file, or of an object that was looked at."""
    return place.size if isinstance(place, Remote) else place.stat().st_size
