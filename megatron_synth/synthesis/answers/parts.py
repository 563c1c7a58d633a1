"""Raw answers on disk: append-only parts of one JSON line per answered request, kept as they came.

Each share of a synthesis that several processes answer has a folder of parts of its own inside.

A line begins with its key, so that a start reads no JSON to know what has been asked. A line that a kill has cut short, at the
end of the last part, is cut off; nothing else is ever changed. `kill -9` at any moment loses what was in flight, and no more.
A power failure may lose what was written in the last SYNC_S seconds; it is asked again.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal

import msgspec
from pydantic import Field
from typing_extensions import TypedDict

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import open_regular, sync_folder
from megatron_synth.core.records import Amount, Count, Reader
from megatron_synth.synthesis.answers.index import KeyIndex
from megatron_synth.synthesis.shares import FOLDERS

PART_BYTES = 2**28
SYNC_S = 5.0
KEY_DIGITS = 32
_HEAD = b'{"key": "'
_encode = msgspec.json.Encoder().encode
_KEY = slice(len(_HEAD), len(_HEAD) + KEY_DIGITS)
Text = Annotated[str, Field(strict=True)]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request has become.

    finish: why the text ends: stop, length, or what else a server says; `refused` where the engine would not answer.
    text: as it came; for a refused one what the engine said. tokens_in, tokens_out: None where a server does not tell.
    cached: tokens of the prompt that a prefix cache had. seconds: from sending to the whole answer.
    """

    text: str
    finish: str
    tokens_in: int | None
    tokens_out: int | None
    cached: int = 0
    seconds: float = 0.0


REFUSED = "refused"


class Line(TypedDict):
    """A line of a part."""

    key: Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{32}$")]
    parents: Annotated[list[Text], Field(min_length=1)]
    chunk: Count
    sample: Count
    finish: Text
    tokens_in: Count | None
    tokens_out: Count | None
    cached: Count
    seconds: Amount
    text: Text


LINES: Reader[Line] = Reader(Line, "take the part away: its answers are asked for again")


class Answers:
    """All answers of an output. One process at a time adds to a folder of parts.

    Args:
        folder: of all parts.
        own: name of the folder inside to which answers are added; "" for `folder` itself.
    """

    def __init__(self, folder: Path, own: str = ""):
        """Opens all parts, or begins a folder of them. Without `own` nobody else may have it open.

        Raises:
            UserError: a part is damaged elsewhere than at its end.
        """
        self._folder = folder / own
        self._folder.mkdir(parents=True, exist_ok=True)
        self.index = KeyIndex()
        # its own come last: the last of all is the one to which it adds
        self._parts = sorted(parts_of(folder), key=lambda part: (part.parent == self._folder, part))
        self._own = sum(part.parent == self._folder for part in self._parts)
        for number, part in enumerate(self._parts):
            if not own or part.parent == self._folder:
                _cut_torn_line(part)
            for offset, key in _keys(part):
                if key in self.index:
                    raise UserError(f"{part}, byte {offset}: the key {key} is there twice; {LINES.remedy}")
                self.index.add(key, (number, offset))
        self._descriptor = -1
        self._size = 0
        self._synced = time.monotonic()
        self._reading: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, key: str) -> bool:
        return key in self.index

    def add(self, found: Sequence[tuple[str, Sequence[str], int, int, Answer]]) -> None:
        """Keep answers: (key, ids of the parents, chunk, sample, answer) of each. Those of a key that is known are left out.

        They are the system's when this returns, and survive the end of the process.

        Raises:
            UserError: the disk is full or fails. Nothing of these answers is kept then, and all before is.
        """
        lines = []
        fresh: dict[str, int] = {}
        length = 0
        for key, parents, chunk, sample, answer in found:
            if key in fresh or key in self.index:
                continue
            record = {
                "parents": parents,
                "chunk": chunk,
                "sample": sample,
                "finish": answer.finish,
                "tokens_in": answer.tokens_in,
                "tokens_out": answer.tokens_out,
                "cached": answer.cached,
                "seconds": round(answer.seconds, 6),
                "text": answer.text,
            }
            try:
                rest = _encode(record)
            except UnicodeEncodeError:
                record |= {"text": _storable(answer.text), "finish": _storable(answer.finish)}
                rest = _encode(record)
            line = b'%b%b", %b\n' % (_HEAD, key.encode(), rest[1:])
            fresh[key] = length
            lines.append(line)
            length += len(line)
        if not fresh:
            return
        self._make_room()
        start = self._size
        self._write(b"".join(lines))
        for key, offset in fresh.items():
            self.index.add(key, (len(self._parts) - 1, start + offset))

    def _make_room(self) -> None:
        """The last part open for writing, a new one if it is full."""
        if self._descriptor >= 0 and self._size < PART_BYTES:
            return
        self.close_part()
        if not self._own or self._parts[-1].stat().st_size >= PART_BYTES:
            self._parts.append(self._folder / f"part-{self._own:05d}.jsonl")
            self._own += 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self._parts[-1], flags, 0o666)
        self._size = os.fstat(self._descriptor).st_size
        sync_folder(self._folder)

    def _write(self, data: bytes) -> None:
        try:
            written = os.write(self._descriptor, data)
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            now = time.monotonic()
            if now - self._synced >= SYNC_S:
                os.fdatasync(self._descriptor)
                self._synced = now
        except OSError as error:
            os.ftruncate(self._descriptor, self._size)
            reason = f"{error.strerror}; {len(self)} answers are kept; make room and give the same command again"
            raise UserError(f"{self._parts[-1]}: {reason}") from None
        self._size += len(data)

    def read(self, key: str) -> Line | None:
        """The line of a key; None if it has not been answered.

        Raises:
            UserError: the line is damaged.
        """
        place = self.index.find(key)
        if place is None:
            return None
        number, offset = place
        if number not in self._reading:
            self._reading[number] = open_regular(self._parts[number], os.O_RDONLY | os.O_NOFOLLOW)
        line = _line_at(self._reading[number], offset)
        return LINES.parse(line, f"{self._parts[number]}, byte {offset}")

    def close_part(self) -> None:
        """Force the open part to disk and close it."""
        if self._descriptor >= 0:
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def close(self) -> None:
        """Close everything."""
        self.close_part()
        for descriptor in self._reading.values():
            os.close(descriptor)
        self._reading = {}


def parts_of(folder: Path) -> list[Path]:
    """All parts of a folder of answers, those of shares too, in order."""
    return [*sorted(folder.glob("part-*.jsonl")), *sorted(folder.glob(f"{FOLDERS}/part-*.jsonl"))]


def keys_of(folder: Path) -> Iterator[str]:
    """Keys of all answers of a folder, also while a run adds to it.

    Raises:
        UserError: a part is damaged elsewhere than at its end.
    """
    for part in parts_of(folder):
        for _, key in _keys(part):
            yield key


def lines(folder: Path) -> Iterator[Line]:
    """Every answer of a folder as they came, also while a run adds to it. A line without an end is left out."""
    for part in parts_of(folder):
        with _opened(part) as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield LINES.parse(line, f"{part}, line {number}")


def _storable(text: str) -> str:
    """Half of a surrogate pair, which JSON can carry and no file of text, becomes U+FFFD."""
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _opened(part: Path, mode: Literal["rb", "r+b"] = "rb") -> IO[bytes]:
    """A part, which is a file of this folder's own: what a link leads to would be cut and added to, too.

    Raises:
        UserError: it is something else, or cannot be opened.
    """
    try:
        flags = os.O_RDONLY if mode == "rb" else os.O_RDWR
        return os.fdopen(open_regular(part, flags | os.O_NOFOLLOW), mode)
    except OSError as error:
        reason = "a link, expected a file" if error.errno == errno.ELOOP else error.strerror
        raise UserError(f"{part}: {reason}; {LINES.remedy}") from None


def _cut_torn_line(part: Path) -> None:
    """Cut off what follows the last line break."""
    with _opened(part, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        at = end
        while at:
            start = max(at - 65_536, 0)
            file.seek(start)
            found = file.read(at - start).rfind(b"\n")
            if found >= 0:
                at = start + found + 1
                break
            at = start
        if at < end:
            file.truncate(at)


def _keys(part: Path) -> Iterator[tuple[int, str]]:
    """Place and key of each line. One without an end, which another process may be writing, is left out.

    Raises:
        UserError: a line does not begin as one of ours.
    """
    offset = 0
    with _opened(part) as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            key = line[_KEY]
            whole = line.startswith(_HEAD) and line.endswith(b"}\n") and len(key) == KEY_DIGITS
            if not whole or not set(key) <= set(b"0123456789abcdef"):
                raise UserError(f"{part}, byte {offset}: damaged: not a line of an answer; {LINES.remedy}")
            yield offset, key.decode()
            offset += len(line)


def _line_at(descriptor: int, offset: int) -> bytes:
    line, size = b"", 8192
    while not line.endswith(b"\n"):
        more = os.pread(descriptor, size, offset + len(line))
        if not more:
            break
        end = more.find(b"\n")
        line += more if end < 0 else more[: end + 1]
        size *= 4
    return line
