"""Records are what runs, jobs and studies wrote of themselves. They are read as hostile: whoever edited one, or a disk that
lost a block, must get one message that names the file, the line and the fault.

A record has one shape, a pydantic type that says what stands where and in which range, and one `Reader` of that shape, which
all verbs use.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import open_regular

T = TypeVar("T")

MAX_BYTES = 2**26
"""Of a record that is one document; a table has its own limit."""
LARGEST = 2**63 - 1

OPEN = ConfigDict(extra="allow", strict=True)
"""Of shapes that other versions may have given more keys."""
Count = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
"""A whole number from 0."""
Whole = Annotated[int, Field(strict=True, ge=-LARGEST, le=LARGEST)]
Positive = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
"""A whole number from 1."""
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A finite number."""
Amount = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
"""A finite number from 0."""


@dataclass(frozen=True)
class Reader(Generic[T]):
    """Reads records of one shape."""

    shape: Any
    """The pydantic type."""
    remedy: str
    """What a user can do about a damaged one."""
    nan_is_null: bool = False
    """Whether NaN, which is no JSON and which older versions wrote, is read as null."""

    def check(self, value: Any, place: str) -> T:
        """`value`, if it has the shape.

        Raises:
            UserError: it has not. `place` names where it stands.
        """
        try:
            return cast(T, _adapter(self.shape).validate_python(value, strict=True))
        except ValidationError as error:
            raise self._damaged(place, first_fault(error)) from None

    def parse(self, content: str | bytes, place: str) -> T:
        """The record in `content`.

        Raises:
            UserError: there is none. `place` names where it stands.
        """
        try:
            value = parse_json(content, nan_is_null=self.nan_is_null)
        except ValueError as error:
            raise self._damaged(place, f"not valid JSON ({error})") from None
        return self.check(value, place)

    def read(self, file: Path) -> T:
        """The record in a file.

        Raises:
            UserError: it is missing, cannot be read, or is damaged.
        """
        return self.parse(read_bytes(file), str(file))

    def read_optional(self, file: Path) -> T | None:
        """The record in a file; None if there is no such file."""
        return self.read(file) if file.exists() else None

    def read_lines(self, file: Path) -> list[T]:
        """The records in the lines of a file; empty if there is none. What a crash cut short is left out."""
        if not file.exists():
            return []
        found = []
        for number, line in enumerate(read_bytes(file).split(b"\n"), start=1):
            try:
                value = parse_json(line)
            except ValueError:
                continue  # empty, or cut short when a node died
            found.append(self.check(value, f"{file}, line {number}"))
        return found

    def _damaged(self, place: str, fault: str) -> UserError:
        return UserError(f"{place}: damaged: {fault}; {self.remedy}")


def parse_json(content: str | bytes, *, nan_is_null: bool = False) -> Any:
    """The value of strict JSON in UTF-8; with `nan_is_null` NaN and infinities are allowed, and are null.

    Raises:
        ValueError: it is none, holds a number that JSON has not, or half of a surrogate pair, or is nested too deeply.
    """
    text = content if isinstance(content, str) else content.decode("utf-8")
    try:
        value = json.loads(text, parse_constant=_null if nan_is_null else _refuse)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def read_bytes(file: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        UserError: it is missing, something else, larger than `limit` bytes, or cannot be read.
    """
    try:
        with os.fdopen(open_regular(file), "rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    if len(content) > limit:
        raise UserError(f"{file}: damaged: larger than {limit} bytes")
    return content


def read_text(file: Path, limit: int = MAX_BYTES) -> str:
    """The content of a regular file in UTF-8; UserError otherwise."""
    try:
        return read_bytes(file, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not text in UTF-8 (byte {error.start})") from None


def first_fault(error: ValidationError) -> str:
    """Where the first fault is, and what it is."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{where} is missing"
    text = first["msg"].removeprefix("Value error, ")
    return f"{where}{': ' if where else ''}{text[:1].lower()}{text[1:]}, found {_short(first['input'])}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, int) and abs(value) > LARGEST:
        return "a gigantic number"  # which Python may refuse to write out
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _null(name: str) -> None:
    return None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
