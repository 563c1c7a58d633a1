"""What every law of `megatron-synth fit` does alike: reads the table, names its fits, and writes law.json of each."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_json
from megatron_synth.study.fit.catalog import AnyLaw
from megatron_synth.study.fit.laws import N_PARAMS, RATIO, TOKENS, UNIQUE_TOKENS, Floats
from megatron_synth.study.fit.table.domains import aggregate
from megatron_synth.study.fit.table.runs_table import (
    FLOPS,
    Table,
    epochs_of,
    find_column,
    law_columns,
    loss_columns,
    read_table,
)
from megatron_synth.train.record.run_dir import git_state, versions

LAW_FILE, FIGURE_FILE = "law.json", "fit.png"
SHARES, AUTO, ISOFLOP = "shares", "auto", "isoflop"
"""Values of `--law` that are none of the catalog's laws."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """One fit: the rows of a group, and one loss column or an aggregate of several.

    name: of the group and the loss, as a path; empty where there is one fit. columns: what the law asks for. read_from: the
    table's column of each. named: the loss as law.json names it. extra: every column of the table. epochs: of each row, if the
    table tells. cluster: which rows depend on each other, if `--cluster` tells.
    """

    name: str
    rows: Table
    columns: dict[str, Floats]
    read_from: dict[str, str]
    loss: Floats
    named: str
    extra: dict[str, Floats | list[str]]
    epochs: Floats | None
    cluster: Sequence[str] | None


def open_jobs(options: argparse.Namespace, law: AnyLaw) -> list[Job]:
    """Every fit that the command asks for, all cells read.

    Raises:
        UserError: the table cannot be read, or lacks what the law or an option asks for.
    """
    runs = read_table(options.runs)
    if options.where:
        runs = runs.where(options.where)
    if options.cluster is not None:
        find_column(runs, "cluster", options.cluster, "--cluster")
    groups = {"": runs} if options.group is None else runs.groups(options.group)
    losses = loss_columns(runs, options.loss_column)
    asked = {
        N_PARAMS: options.n_column,
        TOKENS: options.tokens_column,
        FLOPS: options.flops_column,
        RATIO: options.ratio_column,
        UNIQUE_TOKENS: options.unique_column,
    }
    jobs = []
    for group, rows in groups.items():
        columns, read_from = law_columns(rows, law, asked)
        values = {name: rows.numbers(name) for name in losses}
        if options.aggregate:
            named = f"{options.aggregate} of {', '.join(losses)}"
            targets = {options.aggregate: (one_loss(values, options.aggregate), named)}
        else:
            targets = {name if len(losses) > 1 else "": (array, name) for name, array in values.items()}
        for target, (loss, named) in targets.items():
            name = "/".join(part for part in (group, target) if part)
            cluster = None if options.cluster is None else rows.texts[options.cluster]
            jobs.append(Job(name, rows, columns, read_from, loss, named, rows.values(), epochs_of(rows), cluster))
    return jobs


def one_loss(values: Mapping[str, Floats], how: str) -> Floats:
    """An aggregate of several loss columns.

    Raises:
        UserError: there is one column.
    """
    if len(values) < 2:
        (name,) = values
        raise UserError(f"--aggregate {how}: needs several loss columns, got {name}; give --loss-column 'loss/*'")
    return aggregate(values, how)


def fit_all(jobs: Sequence[Job], fit: Callable[[Job], Result]) -> list[tuple[Job, Result]]:
    """Every fit, before any file is written.

    Raises:
        UserError: what `fit` raises, with the name of the fit before it.
    """
    found = []
    for job in jobs:
        try:
            found.append((job, fit(job)))
        except UserError as error:
            raise UserError(f"{job.name}: {error}" if job.name else str(error)) from None
    return found


def about_job(job: Job, options: argparse.Namespace, argv: Sequence[str], **more: Any) -> dict[str, Any]:
    """Where a fit comes from, as law.json tells it.

    more: what else to tell of the data.
    """
    data = {
        "file": str(options.runs),
        "sha256": digest_of(options.runs),
        "group": None if options.group is None else {options.group: job.rows.texts[options.group][0]},
        "rows": len(job.rows),
        "where": options.where,
        "columns": {**job.read_from, "loss": job.named},
    }
    return {"data": {**data, **more}, **about_command(argv)}


def about_command(argv: Sequence[str]) -> dict[str, Any]:
    """The command, the date and the versions, as law.json tells them."""
    found = versions()
    used = {key: found[key] for key in ("python", "megatron-synth", "numpy")}
    return {
        "command": shlex.join(["megatron-synth", "fit", *argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {**used, "scipy": importlib.metadata.version("scipy"), "git": git_state(Path(__file__).parent)},
    }


def digest_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_law(out: Path, name: str, content: Mapping[str, Any], figure: Callable[[Path], None] | None = None) -> Path:
    """law.json and, where there is one to draw, fit.png, in the folder of one fit.

    Returns:
        The folder.

    Raises:
        UserError: it cannot be made.
    """
    folder = out / re.sub(r"[^A-Za-z0-9._+-]+", "_", name).strip(".")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be made: {error.strerror}") from None
    if figure is not None:
        figure(folder / FIGURE_FILE)
    write_json(folder / LAW_FILE, dict(content))
    return folder


def refuse_options(options: argparse.Namespace, law: str, *names: str, instead: str) -> None:
    """Refuse options that a law has no use for.

    Args:
        options: of the command.
        law: as `--law` names it.
        names: as `options` names them; each is refused when it is given.
        instead: what to do instead, a part of the message.

    Raises:
        UserError: one of them is given.
    """
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) not in (None, 0, [])]
    if given:
        are = "is no option" if len(given) == 1 else "are no options"
        raise UserError(f"{' and '.join(given)} {are} of --law {law}; {instead}")
