"""What is known of each document beside its tokens: small typed columns, one file `X.columns` for each shard.

The file holds the columns one after the other, each an array with an entry for every document of the shard, little-endian,
beginning at a multiple of 8 bytes. The manifest says which columns there are, and has size and SHA-256 of the file.

| type | stored as | not known |
| --- | --- | --- |
| int32 | int32 | -2^31 |
| float32 | float32 | NaN |
| category | int32, a place in the manifest's list of texts | -1 |
| id | int64, BLAKE2b of a text | 0 |
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field, model_validator

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import MAX_CATEGORIES, MAX_CATEGORY_BYTES, column_name
from megatron_synth.config.section import Section
from megatron_synth.data.shards.open_files import opened_whole, read_exactly

SUFFIX = ".columns"

StoredType = Literal["int32", "float32", "category", "id"]
Values = npt.NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "int32": np.dtype("<i4"),
    "float32": np.dtype("<f4"),
    "category": np.dtype("<i4"),
    "id": np.dtype("<i8"),
}
MISSING: dict[str, Any] = {"int32": -(2**31), "float32": np.nan, "category": -1, "id": 0}
"""By type, the value of a document that has none."""
_ALIGN = 8


class ColumnInfo(Section):
    """One column, as the manifest has it."""

    name: Annotated[str, AfterValidator(column_name)]
    type: StoredType
    parent: bool = False
    """Of type id: they are ids of the documents that these were made from."""
    categories: tuple[Annotated[str, Field(max_length=MAX_CATEGORY_BYTES)], ...] = Field((), max_length=MAX_CATEGORIES)
    """Of type category: the texts, sorted; values are places in this list."""

    @model_validator(mode="after")
    def _check(self) -> ColumnInfo:
        if self.type != "category" and self.categories:
            raise ValueError(f"{self.name}: only a column of type category has categories")
        if list(self.categories) != sorted(set(self.categories)):
            raise ValueError(f"{self.name}: its categories are not sorted, or name one twice")
        if self.parent and self.type != "id":
            raise ValueError(f"{self.name}: only a column of type id names parents")
        return self

    @property
    def dtype(self) -> np.dtype[Any]:
        """How values are stored."""
        return DTYPES[self.type]

    def is_missing(self, values: Values) -> npt.NDArray[np.bool_]:
        """[N] which documents have no value."""
        return np.isnan(values) if self.type == "float32" else values == MISSING[self.type]


def text_id(text: str) -> int:
    """What a column of type id holds of a text: int64, never 0."""
    found = int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little", signed=True)
    return found or 1


def layout(columns: Sequence[ColumnInfo], documents: int) -> tuple[list[int], int]:
    """Where each column begins in a file of so many documents, and the size of the file, in bytes."""
    begins, at = [], 0
    for column in columns:
        begins.append(at)
        at += -(-column.dtype.itemsize * documents // _ALIGN) * _ALIGN
    return begins, at


def record_fields(columns: Iterable[ColumnInfo]) -> list[tuple[str, np.dtype[Any]]]:
    """The columns as fields of a structured array."""
    return [(column.name, column.dtype) for column in columns]


def missing_values(columns: Sequence[ColumnInfo], count: int) -> Values:
    """Structured [count]: documents of which nothing is known."""
    values = np.empty(count, np.dtype(record_fields(columns)))
    for column in columns:
        values[column.name] = MISSING[column.type]
    return values


def file_content(columns: Sequence[ColumnInfo], values: Values) -> bytes:
    """The content of the file of a shard. values: structured [documents]."""
    begins, size = layout(columns, values.size)
    content = bytearray(size)
    for column, begin in zip(columns, begins, strict=True):
        data = np.ascontiguousarray(values[column.name], column.dtype).tobytes()
        content[begin : begin + len(data)] = data
    return bytes(content)


class ColumnFile:
    """The columns of one shard, read whole and compared with the manifest before anything of them is used."""

    def __init__(self, path: Path, columns: Sequence[ColumnInfo], documents: int, sha256: str, again: str):
        """again: what to do where it is damaged.

        Raises:
            UserError: it cannot be read, its size or checksum is not the manifest's, or a value has no category.
        """
        self._columns = {column.name: column for column in columns}
        begins, size = layout(columns, documents)
        self._documents, self._begins = documents, dict(zip(self._columns, begins, strict=True))
        with opened_whole(path, size, again) as file:
            content = np.empty(size, np.uint8)
            read_exactly(file, path, content.data, 0, again)
        if hashlib.sha256(content.data).hexdigest() != sha256:
            raise UserError(f"{path}: altered: its checksum is not the manifest's; {again}")
        self._content = content
        for column in columns:
            if column.type == "category" and documents:
                values = self.values(column.name)
                if int(values.min()) < -1 or int(values.max()) >= len(column.categories):
                    raise UserError(f"{path}: column {column.name!r} has values without a category; {again}")

    def values(self, name: str) -> Values:
        """[documents]: one column as it is stored."""
        begin, dtype = self._begins[name], self._columns[name].dtype
        return self._content[begin : begin + self._documents * dtype.itemsize].view(dtype)
