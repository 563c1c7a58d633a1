"""`--predict` of `fit --law shares`: losses of other mixtures as a table."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_atomic
from megatron_synth.core.log import table as text_table
from megatron_synth.study.fit.laws import N_PARAMS, TOKENS, Floats
from megatron_synth.study.fit.shares.fit import ShareFit
from megatron_synth.study.fit.shares.points import Mixtures
from megatron_synth.study.fit.shares.table import KEYS, mixtures_of, read_mixtures
from megatron_synth.study.fit.shares.transfer import rank_of
from megatron_synth.study.fit.table.domains import aggregate
from megatron_synth.study.fit.table.runs_table import FLOPS

FEWEST_RUNS = 9
"""From which an interval of 90 % is known."""


@dataclass(frozen=True)
class Asked:
    """Mixtures to predict.

    names: [C] what the table calls them, by column. points: [C], sources in the order of the runs fitted to.
    """

    path: Path
    names: dict[str, list[str]]
    points: Mixtures
    measured: dict[str, Floats]
    """Losses [C] that these mixtures had, by column; of those alone that the table, or that of `--measured`, has."""


def read_asked(options: argparse.Namespace, sources: tuple[str, ...]) -> Asked | None:
    """The mixtures of `--predict`; None where it is not given.

    Raises:
        UserError: the table has other sources than the runs fitted to.
    """
    if options.predict is None:
        if options.measured is not None:
            raise UserError("--measured needs --predict, the mixtures that it is of")
        return None
    runs = read_mixtures(options.predict, options.measured, options.key if options.measured else None)
    asked = {N_PARAMS: options.n_column, TOKENS: options.tokens_column, FLOPS: options.flops_column}
    points = mixtures_of(runs, options.sources, asked)
    other = sorted(set(points.sources) ^ set(sources))
    if other:
        raise UserError(f"--predict {options.predict}: source '{other[0]}' stands in one of the two tables only")
    order = [points.sources.index(name) for name in sources]
    names = {name: runs.table.texts[name] for name in KEYS if name in runs.table.texts}
    names = names or {"line": [str(line) for line in runs.table.lines]}
    measured = {}
    for pattern in options.loss_column:
        for name in (name for name in runs.table.texts if name == pattern or fnmatchcase(name, pattern)):
            measured[name] = runs.table.numbers(name)
    if options.measured is not None and not measured:
        raise UserError(f"--measured {options.measured}: no loss column like those fitted to; give --loss-column")
    if options.aggregate and len(measured) > 1:
        measured = {options.aggregate: aggregate(measured, options.aggregate)}
    mixtures = Mixtures(sources, points.shares[:, order], points.n_params, points.tokens)
    return Asked(options.predict, names, mixtures, measured)


def points_for(asked: Asked, fit: ShareFit) -> Mixtures:
    """The mixtures with the sizes and tokens that a law knows.

    Raises:
        UserError: the law knows sizes or tokens, and the table has none.
    """
    columns: list[Floats | None] = []
    for name, known, own in (
        (N_PARAMS, fit.points.n_params, asked.points.n_params),
        (TOKENS, fit.points.tokens, asked.points.tokens),
    ):
        if known is not None and own is None:
            raise UserError(f"--predict {asked.path}: no column for {name}, which varies in the runs fitted to")
        columns.append(None if known is None else own)
    return Mixtures(asked.points.sources, asked.points.shares, *columns)


def write_predictions(path: Path, asked: Asked, fits: Mapping[str, ShareFit]) -> None:
    """Write a row per mixture: its names, then per loss the prediction and the interval of 90 % of a run."""
    columns: dict[str, list[str]] = dict(asked.names)
    for name, fit in fits.items():
        points = points_for(asked, fit)
        columns[name] = _texts(fit.predict(points))
        if len(fit.loss) >= FEWEST_RUNS:
            low, high = fit.predict_interval(points)
            columns[f"{name}/low"], columns[f"{name}/high"] = _texts(low), _texts(high)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_atomic(path, buffer.getvalue())


def describe_scores(asked: Asked, fits: Mapping[str, ShareFit]) -> str:
    """How the predictions rank what was measured, a line for each loss; empty where nothing was.

    At another size all losses are lower: ranks say how well a proxy chooses, and the error says so where sizes are the same.
    """
    rows: list[tuple[str, ...]] = [("loss", "rank correlation", "90 % interval", "error", "in their 90 % intervals")]
    values = []
    for name, fit in fits.items():
        measured = asked.measured.get(name)
        if measured is None:
            continue
        points = points_for(asked, fit)
        predicted = fit.predict(points)
        rank = rank_of(predicted, measured)
        if rank is None:
            continue
        inside = ""
        if len(fit.loss) >= FEWEST_RUNS:
            low, high = fit.predict_interval(points)
            inside = f"{np.mean((measured >= low) & (measured <= high)):.1%}"
        values.append(rank.value)
        span = "{:.3f} to {:.3f}".format(*rank.interval)
        rows.append((name, f"{rank.value:.4f}", span, f"{np.mean(np.abs(predicted / measured - 1)):.2%}", inside))
    if not values:
        return ""
    if len(values) > 1:
        rows.append(("mean", f"{np.mean(values):.4f}", "", "", ""))
    return f"against what {len(asked.points)} mixtures measured\n{text_table(rows)}"


def _texts(values: Floats) -> list[str]:
    return [f"{value:.6g}" for value in np.asarray(values)]
