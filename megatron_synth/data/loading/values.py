"""Of each label the value that its document has in columns of the source: by these losses are told apart (`log.loss_by`).

The most frequent values of each column, counted in documents over all sources and domains, have a number each, the rest share
one, and so do documents without a value. Sources that do not have a column count nowhere in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_synth.config.errors import UserError
from megatron_synth.core.log import one_line
from megatron_synth.data.shards.columns import ColumnInfo
from megatron_synth.data.shards.selection import SelectedSource
from megatron_synth.data.shards.source import Source

MAX_VALUES = 16
"""Values of a column that have a number of their own."""
OTHER, NONE = "other", "(none)"
NOWHERE = 255
"""The number of a label whose source has no such column."""
_NAME_CHARACTERS = 64

Numbers = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Values:
    """The values of some columns, of a set of sources."""

    names: tuple[str, ...]
    """Of each number: `column/value`."""
    columns: int
    """How many columns there are."""
    of_documents: Mapping[Source, Numbers]
    """Of each source and domain, uint8 [columns, documents] the number of each document."""

    def of(self, source: Source) -> SourceValues:
        """Those of one source."""
        return SourceValues(source, self.of_documents[source])


class SourceValues:
    """The values of one source's documents."""

    def __init__(self, source: Source, numbers: Numbers):
        self._source, self._numbers = source, numbers

    def of_labels(self, begins: Int64, length: int, offsets: Int64, counts: Int64) -> Numbers:
        """uint8 [columns, N, L]: the number of each label of N windows of L inputs.

        begins: [N] first token of each in the stream; its labels are the L tokens after that. offsets, counts: where documents
        start in each, as `document_starts_of` gives them.
        """
        rows = np.repeat(np.arange(len(begins)), counts)
        inner = offsets > 1  # a document that starts with the first label or before it is the first stretch
        rows, places = rows[inner], offsets[inner] - 1
        # a stretch for each row, and one for each document that starts within
        first = np.arange(len(begins)) + np.searchsorted(rows, np.arange(len(begins)))
        starts = np.zeros(len(begins) + len(rows), np.int64)
        others = np.ones(len(starts), np.bool_)
        others[first] = False
        starts[first], starts[others] = np.arange(len(begins)) * length, rows * length + places
        tokens = np.empty_like(starts)
        tokens[first], tokens[others] = begins + 1, begins[rows] + 1 + places
        lengths = np.diff(starts, append=len(begins) * length)
        found = self._numbers[:, self._source.documents_of(tokens)]
        return np.repeat(found, lengths, axis=1).reshape(-1, len(begins), length)


def values_of(names: Sequence[str], training: Iterable[Source], domains: Iterable[Source]) -> Values:
    """Number the values of columns.

    Raises:
        UserError: no source has a column of this name, or one whose values are no categories.
    """
    sources = [*training, *domains]
    found: list[str] = []
    of_documents = {source: np.full((len(names), source.num_documents), NOWHERE, np.uint8) for source in sources}
    for place, name in enumerate(names):
        check_column(name, sources)
        having = [(source, *_read(source, name)) for source in sources if _column(source, name) is not None]
        counted: Counter[str] = Counter()
        for _, column, values in having:
            for number, count in enumerate(np.bincount(values + 1, minlength=len(column.categories) + 1).tolist()):
                counted[_text(column, number - 1)] += count
        frequent = sorted((text for text, count in counted.items() if count), key=lambda text: (-counted[text], text))
        shown, rest = frequent[:MAX_VALUES], frequent[MAX_VALUES:]
        number_of = {text: len(found) + number for number, text in enumerate(shown)}
        found += [f"{name}/{text}" for text in shown]
        if rest:
            other = number_of.setdefault(OTHER, len(found))
            if other == len(found):
                found.append(f"{name}/{OTHER}")
            number_of |= dict.fromkeys(rest, other)
        for source, column, values in having:
            table = [number_of.get(_text(column, number), NOWHERE) for number in range(-1, len(column.categories))]
            of_documents[source][place] = np.array(table, np.uint8)[values + 1]
    return Values(tuple(found), len(names), of_documents)


def check_column(name: str, sources: Sequence[Source]) -> None:
    """Refuse (UserError) a name that no source has a column of categories by."""
    columns = [column for source in sources if (column := _column(source, name)) is not None]
    if not columns:
        known = sorted({column.name for source in sources for column in source.columns if column.type == "category"})
        raise UserError(
            f"log.loss_by: no source has a column {name!r}; columns of categories are: {', '.join(known) or 'none'}"
        )
    wrong = next((column for column in columns if column.type != "category"), None)
    if wrong is not None:
        raise UserError(f"log.loss_by: column {name!r} is of type {wrong.type}, expected category; prepare the source with one")


def _column(source: Source, name: str) -> ColumnInfo | None:
    return next((column for column in source.columns if column.name == name), None)


def _text(column: ColumnInfo, number: int) -> str:
    """What a value is called: a line, and no long one."""
    return NONE if number < 0 else one_line(column.categories[number])[:_NAME_CHARACTERS]


def _read(source: Source, name: str) -> tuple[ColumnInfo, npt.NDArray[np.int32]]:
    """A column, and its value of each document of the stream."""
    files = source.base if isinstance(source, SelectedSource) else source
    column, by_shard = files.column(name)
    values = np.concatenate(by_shard)
    return column, values[source.document_numbers()] if isinstance(source, SelectedSource) else values
