"""A CSV of runs, read with its columns as they are, and the columns that a law needs found in it."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_synth.config.errors import UserError
from megatron_synth.core.records import read_text
from megatron_synth.study.fit.catalog import AnyLaw
from megatron_synth.study.fit.laws import FLOPS_PER_PARAMETER_AND_TOKEN, N_PARAMS, RATIO, TOKENS, UNIQUE_TOKENS, Floats
from megatron_synth.study.fit.table.row_filter import matching, number

FLOPS, LOSS, EPOCHS = "flops", "loss", "epochs"
EMPTY = ("", "nan", "na", "n/a", "null", "none")
"""Cells, in lower case, that hold no number where the others of their column do."""
MAX_BYTES = 2**28
"""Of a table of runs."""

# names that a column may have, compared without case, spaces and punctuation; the first that is there is taken
GUESSES = {
    N_PARAMS: ("nparams", "nonembeddingparameters", "nonembeddingparams", "parameters", "params", "modelsize", "size", "n"),
    TOKENS: ("tokens", "trainingtokens", "traintokens", "ntokens", "d"),
    FLOPS: ("flops", "flop", "trainingflops", "trainingflop", "trainflops", "compute", "c"),
    UNIQUE_TOKENS: ("uniquetokens", "unique", "uniquetrainingtokens", "nuniquetokens", "u"),
    EPOCHS: ("epochs", "epoch", "nepochs", "repetitions"),
    RATIO: ("ratio", "share", "syntheticratio", "syntheticshare", "r"),
    LOSS: ("loss", "validationloss", "valloss", "evalloss", "finalloss", "testloss"),
}


@dataclass(frozen=True)
class Table:
    """Rows of a CSV. `lines` [M] are their lines in the file; `texts` the cells [M] by column, as they stand there."""

    path: Path
    lines: NDArray[np.int64]
    texts: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.lines)

    def numbers(self, column: str) -> Floats:
        """A column as numbers [M].

        Raises:
            UserError: a cell is none; its line is named.
        """
        values = np.empty(len(self))
        for row, text in enumerate(self.texts[column]):
            value = number(text)
            if value is None:
                rule = f"{column}>0" if text.lower() in EMPTY else f"{column}!={text}"
                raise UserError(
                    f"{self.path}, line {self.lines[row]}: column '{column}' holds '{text}', expected a number; "
                    f"choose rows with --where '{rule}'"
                )
            values[row] = value
        return values

    def values(self) -> dict[str, Floats | list[str]]:
        """Every column, as numbers [M] where all its cells are numbers or empty (then nan), and as text otherwise."""
        result: dict[str, Floats | list[str]] = {}
        for name, texts in self.texts.items():
            found = [math.nan if text.lower() in EMPTY else number(text) for text in texts]
            numeric = None not in found and not all(text.lower() in EMPTY for text in texts)
            result[name] = np.array(found, dtype=np.float64) if numeric else texts
        return result

    def where(self, rule: str) -> Table:
        """The rows that a rule chooses (`expressions.matching`); UserError if there is none."""
        return self.rows(matching(rule, self.values(), len(self)), f"--where '{rule}'")

    def rows(self, chosen: NDArray[np.bool_], why: str) -> Table:
        """The chosen rows; UserError if there is none."""
        if not chosen.any():
            raise UserError(f"{self.path}: {why} chooses none of the {len(self)} rows")
        places = np.flatnonzero(chosen)
        return Table(self.path, self.lines[places], {name: [texts[i] for i in places] for name, texts in self.texts.items()})

    def groups(self, column: str) -> dict[str, Table]:
        """The rows by the values of a column, in order of appearance."""
        if column not in self.texts:
            raise UserError(f"{self.path}: there is no column '{column}'; columns: {', '.join(self.texts)}")
        texts = np.array(self.texts[column])
        return {str(value): self.rows(texts == value, f"{column} = {value}") for value in dict.fromkeys(self.texts[column])}


def read_table(path: Path) -> Table:
    """Read a CSV with a head.

    Raises:
        UserError: no such file, no rows, two columns of one name, or a row of another length than the head.
    """
    reader = csv.reader(read_text(path, MAX_BYTES).splitlines())
    rows = _rows(reader, path)
    head = [name.strip() for name in next(rows, [])]
    twice = sorted({name for name in head if head.count(name) > 1})
    if not head or twice:
        raise UserError(f"{path}: " + (f"column '{twice[0]}' stands in the head more than once" if twice else "is empty"))
    cells, lines = [], []
    for row in rows:
        if not row:
            continue
        if len(row) != len(head):
            raise UserError(f"{path}, line {reader.line_num}: {len(row)} cells, expected {len(head)} as in the head")
        cells.append([cell.strip() for cell in row])
        lines.append(reader.line_num)
    if not cells:
        raise UserError(f"{path}: has a head and no rows")
    return Table(path, np.array(lines), {name: [row[i] for row in cells] for i, name in enumerate(head)})


def _rows(reader: Any, path: Path) -> Iterator[list[str]]:
    """The rows of a CSV; UserError if the format is broken, or a cell is longer than any that a table of runs has."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not a row of a CSV ({error})") from None


def find_column(table: Table, what: str, asked: str | None, option: str) -> str | None:
    """The name of the column for `what`: the one asked for, else the best guess, else None.

    Raises:
        UserError: the one asked for is not there.
    """
    if asked is not None:
        if asked not in table.texts:
            raise UserError(f"{table.path}: {option} '{asked}' is no column; columns: {', '.join(table.texts)}")
        return asked
    plain = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in reversed(table.texts)}
    return next((plain[guess] for guess in GUESSES[what] if guess in plain), None)


def loss_columns(table: Table, asked: Sequence[str]) -> list[str]:
    """The loss columns: those that match what was asked for (`*` and `?` allowed), else the best guess.

    Raises:
        UserError: one matches nothing, or nothing was asked for and there is no column to guess.
    """
    if not asked:
        guessed = find_column(table, LOSS, None, "--loss-column")
        if guessed is None:
            raise UserError(
                f"{table.path}: no column of losses found; name it with --loss-column; columns: {', '.join(table.texts)}"
            )
        return [guessed]
    found: dict[str, None] = {}
    for pattern in asked:
        matches = [name for name in table.texts if name == pattern or fnmatchcase(name, pattern)]
        if not matches:
            raise UserError(f"{table.path}: --loss-column '{pattern}' matches no column; columns: {', '.join(table.texts)}")
        found.update(dict.fromkeys(matches))
    return list(found)


def epochs_of(table: Table) -> Floats | None:
    """How often each run saw its text: the highest [M] over columns `epochs` and `epochs/SOURCE`; None without any.

    Cells that are no number count as one epoch: our runs.csv leaves them empty where an arm has not the source.
    """
    names = [name for name in table.texts if name == "epochs" or name.startswith("epochs/")]
    if not names:
        return None
    cells = [[number(text) or 1.0 for text in table.texts[name]] for name in names]
    return np.asarray(np.max(np.array(cells, dtype=np.float64), axis=0))


def law_columns(table: Table, law: AnyLaw, asked: dict[str, str | None]) -> tuple[dict[str, Floats], dict[str, str]]:
    """The columns [M] that the law takes, and what each was read from.

    Tokens come from their column, or from compute: D = C / (6 N). Unique tokens come from theirs, or are tokens / epochs.

    Args:
        table: the runs.
        law: columns that it may leave out are taken where they are there.
        asked: names of columns by `n_params`, `tokens`, `unique_tokens`, `flops`, `ratio`; None to guess.
    """
    short = {N_PARAMS: "n", UNIQUE_TOKENS: "unique"}
    options = {name: f"--{short.get(name, name)}-column" for name in (N_PARAMS, TOKENS, FLOPS, RATIO, UNIQUE_TOKENS, EPOCHS)}
    found = {name: find_column(table, name, asked.get(name), option) for name, option in options.items()}
    if asked.get(FLOPS) is not None and asked.get(TOKENS) is None:
        found[TOKENS] = None  # whoever names one of the two means it
    values: dict[str, Floats] = {}
    read_from: dict[str, str] = {}
    for name in law.columns:
        source, compute, size, epochs = found[name], found[FLOPS], found[N_PARAMS], found[EPOCHS]
        if source is not None:
            values[name], read_from[name] = table.numbers(source), source
        elif name == TOKENS and compute is not None and size is not None:
            values[name] = table.numbers(compute) / (FLOPS_PER_PARAMETER_AND_TOKEN * table.numbers(size))
            read_from[name] = f"{compute} / (6 x {size})"
        elif name == UNIQUE_TOKENS and epochs is not None:
            values[name] = values[TOKENS] / np.maximum(table.numbers(epochs), 1)
            read_from[name] = f"{read_from[TOKENS]} / {epochs}"
        elif name not in law.optional:
            hint = f" (or compute with {options[FLOPS]} and sizes with {options[N_PARAMS]})" if name == TOKENS else ""
            raise UserError(
                f"{table.path}: no column for {name}, which the law '{law.name}' needs; name it with {options[name]}{hint}; "
                f"columns: {', '.join(table.texts)}"
            )
    return values, read_from
