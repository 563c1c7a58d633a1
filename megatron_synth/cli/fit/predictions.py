"""`--predict` of `fit --law shares`: losses of other mixtures as a table."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_atomic
from megatron_synth.study.fit.laws import N_PARAMS, TOKENS, Floats
from megatron_synth.study.fit.shares.fit import ShareFit
from megatron_synth.study.fit.shares.points import Mixtures
from megatron_synth.study.fit.shares.table import KEYS, mixtures_of, read_mixtures
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


def read_asked(options: argparse.Namespace, sources: tuple[str, ...]) -> Asked | None:
    """The mixtures of `--predict`; None where it is not given.

    Raises:
        UserError: the table has other sources than the runs fitted to.
    """
    if options.predict is None:
        return None
    runs = read_mixtures(options.predict)
    asked = {N_PARAMS: options.n_column, TOKENS: options.tokens_column, FLOPS: options.flops_column}
    points = mixtures_of(runs, options.sources, asked)
    other = sorted(set(points.sources) ^ set(sources))
    if other:
        raise UserError(f"--predict {options.predict}: source '{other[0]}' stands in one of the two tables only")
    order = [points.sources.index(name) for name in sources]
    names = {name: runs.table.texts[name] for name in KEYS if name in runs.table.texts}
    names = names or {"line": [str(line) for line in runs.table.lines]}
    return Asked(options.predict, names, Mixtures(sources, points.shares[:, order], points.n_params, points.tokens))


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


def _texts(values: Floats) -> list[str]:
    return [f"{value:.6g}" for value in np.asarray(values)]
