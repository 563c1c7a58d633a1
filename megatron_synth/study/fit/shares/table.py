"""Mixtures of runs in tables as they are published: RegMix's and olmix's pairs of files, and ours.

A table of mixtures has a column per source: shares, or amounts such as `tokens/SOURCE` of our runs.csv. Losses stand in the
same table, or in a second one that is joined to it by a column of names that both have (`index` of RegMix, `run_id` of olmix).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.laws import FLOPS_PER_PARAMETER_AND_TOKEN, N_PARAMS, TOKENS
from megatron_synth.study.fit.shares.points import Mixtures, normalized
from megatron_synth.study.fit.table.runs_table import FLOPS, Table, find_column, read_table

KEYS = ("run_id", "run", "index", "id", "name")
"""Columns that name a run; the first that both tables have is taken. None of them is a source."""


@dataclass(frozen=True)
class MixtureTable:
    """The runs of a table, or of two that were joined.

    table: all columns. offered: columns that may be sources. left_out: rows that only one of the two tables has.
    """

    table: Table
    offered: tuple[str, ...]
    left_out: int = 0

    def where(self, rule: str) -> MixtureTable:
        """The rows that a rule chooses."""
        return replace(self, table=self.table.where(rule))


def read_mixtures(mixtures: Path, losses: Path | None = None, key: str | None = None) -> MixtureTable:
    """The runs in a file, or in two that are joined."""
    table = read_table(mixtures)
    if losses is not None:
        return joined(table, read_table(losses), key)
    return MixtureTable(table, tuple(name for name in table.texts if name not in KEYS))


def joined(mixtures: Table, losses: Table, key: str | None = None) -> MixtureTable:
    """The rows that both tables have, by a column that names the run; lines are those of the mixtures.

    Raises:
        UserError: no such column, a run twice in one of them, or no run in both.
    """
    by = key or next((name for name in KEYS if name in mixtures.texts and name in losses.texts), None)
    if by is None or by not in mixtures.texts or by not in losses.texts:
        tried = f"'{by}'" if by else " or ".join(KEYS)
        raise UserError(f"{mixtures.path} and {losses.path}: no column {tried} in both, by which to join rows; see --key")
    for table in (mixtures, losses):
        names = table.texts[by]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{table.path}: {by} '{twice}' stands there twice")
    places = {name: place for place, name in enumerate(losses.texts[by])}
    common = np.array([name in places for name in mixtures.texts[by]])
    if not common.any():
        raise UserError(f"{mixtures.path} and {losses.path}: no {by} stands in both")
    both = sorted(name for name in losses.texts if name not in KEYS and name != by and name in mixtures.texts)
    if both:
        raise UserError(f"{mixtures.path} and {losses.path}: both have a column '{both[0]}'; rename one")
    kept = mixtures.rows(common, f"the runs of {losses.path}")
    order = [places[name] for name in kept.texts[by]]
    taken = [name for name in losses.texts if name not in (*KEYS, by)]
    added = {name: [losses.texts[name][place] for place in order] for name in taken}
    offered = tuple(name for name in mixtures.texts if name not in (*KEYS, by))
    left_out = len(mixtures) + len(losses) - 2 * len(kept)
    return MixtureTable(Table(kept.path, kept.lines, {**kept.texts, **added}), offered, left_out)


def source_columns(runs: MixtureTable, patterns: Sequence[str]) -> dict[str, str]:
    """The columns of sources by the name of the source, which is what `*` stands for; `*` alone: all but names of runs.

    Raises:
        UserError: a pattern matches nothing, or fewer than two columns are found.
    """
    table = runs.table
    found: dict[str, str] = {}
    for pattern in patterns:
        matches = [name for name in runs.offered if name == pattern or fnmatchcase(name, pattern)]
        if not matches:
            raise UserError(f"{table.path}: --sources '{pattern}' matches no column; columns: {', '.join(table.texts)}")
        prefix, star, suffix = pattern.partition("*")
        cut = star and not any(sign in prefix + suffix for sign in "*?[")
        for name in matches:
            source = name[len(prefix) : len(name) - len(suffix)] if cut and name != pattern else name
            if found.setdefault(source, name) != name:
                raise UserError(f"{table.path}: --sources names both '{found[source]}' and '{name}' as source '{source}'")
    if len(found) < 2:
        raise UserError(f"{table.path}: --sources finds {len(found)} column; a mixture has at least two")
    return found


def mixtures_of(runs: MixtureTable, patterns: Sequence[str], asked: dict[str, str | None] | None = None) -> Mixtures:
    """The mixtures of a table, with sizes and tokens where it has them.

    Args:
        runs: a row per run.
        patterns: of the columns of sources.
        asked: names of the columns `n_params`, `tokens`, `flops`; None to guess, as for other laws.
    """
    table, columns = runs.table, source_columns(runs, patterns)
    amounts = np.column_stack([table.numbers(name) for name in columns.values()])
    where = f"{table.path}, columns {', '.join(list(columns.values())[:2])}, ..."
    named = asked or {}
    options = {N_PARAMS: "--n-column", TOKENS: "--tokens-column", FLOPS: "--flops-column"}
    rest = Table(table.path, table.lines, {name: cells for name, cells in table.texts.items() if name not in columns.values()})
    found = {name: find_column(rest, name, named.get(name), option) for name, option in options.items()}
    size, tokens, compute = found[N_PARAMS], found[TOKENS], found[FLOPS]
    n_params = None if size is None else table.numbers(size)
    trained = None if tokens is None else table.numbers(tokens)
    if trained is None and compute is not None and n_params is not None:
        trained = table.numbers(compute) / (FLOPS_PER_PARAMETER_AND_TOKEN * n_params)
    for name, values in ((size, n_params), (tokens or compute, trained)):
        if values is not None and not (values > 0).all():
            raise UserError(f"{table.path}: column '{name}' holds {values.min():g}, expected more than 0")
    return Mixtures(tuple(columns), normalized(amounts, where, table.lines), n_params, trained)
