"""What all readers give: documents, records that cannot be one, and places in files for messages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import PrepareSource
from megatron_synth.data.shards.indexed import MAX_SEQUENCE_TOKENS
from megatron_synth.storage import remote
from megatron_synth.storage.objects import open_binary

SAMPLE_BYTES = 2**20
BYTE_ORDER_MARK = "\ufeff"


class Part(NamedTuple):
    """A part of a document. markup: what spells a special token in it is one."""

    text: str
    learned: bool
    markup: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """text: what is tokenized; key: what decides its split. Documents that share a key go to the same split.

    values: of the columns of the source, in their order; None: the input has no records to take them from.
    parts: what the text is made of; None: all of it is learned.
    """

    text: str
    key: str
    values: tuple[int | float | str | None, ...] | None = None
    parts: tuple[Part, ...] | None = None


class BadRecord(UserError):
    """A record that is no document: readers give it in its place, and what reads decides what becomes of it."""


def is_held_out(key: str, holdout: Fraction) -> bool:
    """Whether a document belongs to the `holdout` share: a function of its key alone, not of its place."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") * holdout.denominator < holdout.numerator << 64


def with_text(
    name: str, source: PrepareSource, found: Iterable[Document | BadRecord], skipped: list[str] | None = None
) -> Iterator[tuple[Document, int]]:
    """The documents that are not empty, and the UTF-8 bytes of each.

    skipped: gets the messages of bad records where the source says `on_error: skip`.

    Raises:
        BadRecord: the first one, where it says `on_error: fail`.
    """
    for one in found:
        if isinstance(one, Document):
            if not one.text or one.text.isspace():
                continue
            size = len(one.text) if one.text.isascii() else len(one.text.encode())
            if size <= MAX_SEQUENCE_TOKENS:  # a byte is a token at worst
                yield one, size
                continue
            one = BadRecord(f"sources.{name}: a document of {size} bytes, at most {MAX_SEQUENCE_TOKENS} fit; split it")
        if source.on_error == "fail":
            raise one
        if skipped is not None:
            skipped.append(str(one))


@dataclass
class Place:
    """A line of a file, for messages. number: of the line, from 1, counted from byte `begin` of the file."""

    path: remote.Location
    begin: int = 0
    number: int = 0

    @property
    def is_first(self) -> bool:
        """Whether it is the first line of the file."""
        return self.begin == 0 and self.number == 1

    def __str__(self) -> str:
        return f"{self.path}, line {self.number + self.lines_before()}"

    def lines_before(self) -> int:
        """Lines before `begin`, counted only when something is wrong."""
        lines, left = 0, self.begin
        with open_binary(self.path) as file:
            while left > 0 and (part := file.read(min(left, SAMPLE_BYTES))):
                lines += part.count(b"\n")
                left -= len(part)
        return lines


def decoded(place: Place, line: bytes) -> str:
    """The text of a line, without a byte-order mark at the start of the file.

    Raises:
        BadRecord: it is not UTF-8.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"{place}: not UTF-8, {error.reason} at byte {error.start} of the line; convert the file") from None
    return text.removeprefix(BYTE_ORDER_MARK) if place.is_first else text


def checked_text(value: Any, where: object, key: str) -> str:
    """The text of a record.

    Raises:
        BadRecord: it is no text, or none that UTF-8 can hold.
    """
    if not isinstance(value, str):
        raise BadRecord(
            f"{where}: {key!r} holds {type(value).__name__}, expected text; set text_key to the field of the text, or "
            f"on_error to skip"
        )
    if value.isascii():  # known without looking
        return value
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(f"{where}: not valid Unicode, a lone surrogate at character {error.start}; fix the text") from None
    return value


def check_column(where: object, names: Iterable[str], key: str, setting: str = "text_key") -> None:
    """Refuse a table that has not exactly one column `key`."""
    found = list(names)
    if key not in found:
        raise UserError(f"{where}: no column {key!r}, found {found}; set {setting} to the column of the text")
    if found.count(key) > 1:
        raise UserError(f"{where}: {found.count(key)} columns {key!r}, expected one; rename the others")
