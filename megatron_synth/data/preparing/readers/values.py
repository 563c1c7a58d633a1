"""Values of documents, as records of the input have them, on their way to columns."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from megatron_synth.config.prepare import MAX_CATEGORY_BYTES, ColumnConfig
from megatron_synth.data.preparing.readers.documents import BadRecord

Value = int | float | str | None
_INT32 = 2**31


def document_id(text: str) -> str:
    """32 hexadecimal digits that name a text: its id as a parent of synthetic text."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def fields_of(columns: Mapping[str, ColumnConfig]) -> list[str]:
    """The fields at the top of a record that the columns look at, each once."""
    paths = (_path(name, column) for name, column in columns.items() if column.type != "text_id")
    return list(dict.fromkeys(path[0] for path in paths))


def values_of(columns: Mapping[str, ColumnConfig], record: Mapping[str, Any], text: str, where: object) -> tuple[Value, ...]:
    """What each column holds of a record, None where it has nothing.

    Raises:
        BadRecord: a value is not of the column's type.
    """
    return tuple(_value(name, column, record, text, where) for name, column in columns.items())


def _path(name: str, column: ColumnConfig) -> list[str]:
    return (column.field or name).split(".")


def _value(name: str, column: ColumnConfig, record: Mapping[str, Any], text: str, where: object) -> Value:
    if column.type == "text_id":
        return document_id(text)
    found: Any = record
    for part in _path(name, column):
        if isinstance(found, Mapping):
            found = found.get(part)
        elif isinstance(found, list) and part.isdecimal():
            found = found[int(part)] if len(part) < 10 and int(part) < len(found) else None
        else:
            found = None
    if found is None:
        return None
    converted = _number(column, found) if column.type in ("int32", "float32") else _text(column, found)
    if converted is None:
        expected = {"int32": "a whole number of 32 bits", "float32": "a number"}.get(column.type)
        expected = expected or f"text of at most {MAX_CATEGORY_BYTES} bytes"
        raise BadRecord(
            f"{where}: {column.field or name!r} holds {found!r:.80}, expected {expected} for column {name!r}; set its type or "
            "field, or on_error to skip"
        )
    return converted


def _number(column: ColumnConfig, found: Any) -> Value:
    """A number, or a text that is one; None for anything else."""
    if isinstance(found, bool):
        found = int(found)
    if not isinstance(found, int | float | str) or (isinstance(found, str) and len(found) > 64):
        return None
    try:
        if column.type == "float32":
            number = float(found)
            return number if math.isfinite(number) and abs(number) < 3.4e38 else None
        whole = int(found)
        return whole if (isinstance(found, str) or whole == found) and -_INT32 < whole < _INT32 else None
    except (ValueError, OverflowError):
        return None


def _text(column: ColumnConfig, found: Any) -> Value:
    """A text; a number as one. None for anything else."""
    if isinstance(found, bool):
        found = str(found).lower()
    if isinstance(found, int):
        found = str(found)
    if not isinstance(found, str):
        return None
    try:
        if column.type == "host":
            found = urlsplit(found).hostname or ""
        return found if len(found.encode("utf-8")) <= MAX_CATEGORY_BYTES else None
    except ValueError:  # no URL, or a lone surrogate
        return None
