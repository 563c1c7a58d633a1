"""From results to tables: runs.csv, and the pair that olmix reads (ratios.csv, metrics.csv, joined on `run`).

runs.csv has one row per finished run. Columns: `run`, `id`, `arm`, `family`, `share` (exact), `ratio` (the same as a
number), `size`, `n_params` (non-embedding), `budget`, `tokens`, `seed`, `steps`, `flops`, `loss` (the study's aggregate),
`train_loss`, `train_seconds`, `device`, `lr` (peak), `sweep` (1: a run of `rates.sweep`), `trunk` (id of the run that it
shares its first steps with), then `loss/<domain>`,
`bpb/<domain>`, `eval_tokens/<domain>`, `tokens/<source>`, `epochs/<source>`, and `tasks/<task>/<metric>` of runs that were
evaluated on tasks.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.config.section import parse_ratio
from megatron_synth.core.files import write_atomic
from megatron_synth.core.records import LARGEST
from megatron_synth.study.execute.folder import Folder
from megatron_synth.study.execute.shapes import Result
from megatron_synth.study.fit.table.domains import aggregate
from megatron_synth.study.fit.table.runs_table import read_table
from megatron_synth.study.plan.runs import Run
from megatron_synth.study.plan.study_file import Study
from megatron_synth.train.record import tasks

_TEXT = ("run", "id", "arm", "family", "share", "size", "device")
_TRUNK = "trunk"
"""Not in tables of older versions."""
_WHOLE = ("n_params", "budget", "tokens", "seed", "steps")
_NUMBERS = ("ratio", "flops", "loss", "train_loss", "train_seconds")
_ORDER = (
    *("run", "id", "arm", "family", "share", "ratio", "size", "n_params", "budget", "tokens", "seed", "steps"),
    *("flops", "loss", "train_loss", "train_seconds", "device"),
)
_BY_DOMAIN = ("loss/", "bpb/", "eval_tokens/")
_BY_SOURCE = ("tokens/", "epochs/")


@dataclass(frozen=True)
class Row:
    """A finished run, as in runs.csv. Its fields have the names of the columns."""

    run: str
    id: str
    arm: str
    family: str
    share: str
    ratio: float
    size: str
    n_params: int
    budget: int
    tokens: int
    seed: int
    steps: int
    flops: float
    loss: float
    train_loss: float | None
    """None where the last step had none that is finite."""
    train_seconds: float
    device: str
    trunk: str = ""
    """Id of the trunk of its family: results of one trunk are not independent. Empty for a run on its own."""
    domains: dict[str, float] = field(default_factory=dict)
    """Loss by validation domain."""
    others: dict[str, float] = field(default_factory=dict)
    """The remaining columns, by their names."""

    @property
    def epochs(self) -> float:
        """How often it saw the source that it repeated most; at least 1."""
        return max([1.0, *(value for name, value in self.others.items() if name.startswith("epochs/"))])

    @property
    def swept(self) -> bool:
        """Whether it is a run of `rates.sweep`, which takes no part in the laws."""
        return bool(self.others.get("sweep"))

    @property
    def lr(self) -> float | None:
        """Peak learning rate; None in tables of earlier versions."""
        return self.others.get("lr")

    @property
    def cell(self) -> tuple[str, str, int]:
        """What runs that differ in the seed alone share."""
        return self.arm, self.size, self.tokens


@dataclass(frozen=True)
class Collected:
    """The finished runs of a study, and those that are missing."""

    rows: list[Row]
    missing: list[Run]


def collect(study: Study, runs: Sequence[Run], folder: Folder) -> Collected:
    """Read the results of all runs.

    Raises:
        UserError: none is finished, a result is damaged, or runs saw different versions of the text.
    """
    rows, missing = [], []
    data: dict[tuple[str, int, int, str], tuple[str, str]] = {}
    for run in runs:
        result = folder.result(run)
        if result is None:
            missing.append(run)
            continue
        row = _row(study, run, result)
        row.others.update(tasks.of_run(folder.run(run)))
        rows.append(row)
        # the digest covers order and content of the text: equal for runs of one arm, seed and length of a batch
        key = (run.arm, run.seed, run.config.train.sequence_length, str(run.config.data.phases))
        other, digest = data.setdefault(key, (run.name, result["data_digest"]))
        if digest != result["data_digest"]:
            raise UserError(
                f"{folder.run(run)}: was trained on other text than {other}, though both are of arm {run.arm}: a source was "
                "prepared again between them; delete the run directories of one of the two, and submit again"
            )
    if not rows:
        raise UserError(f"{folder.path}: no run is finished yet; `megatron-synth study status` shows how far they are")
    return Collected(rows, missing)


def _row(study: Study, run: Run, result: Result) -> Row:
    losses = {name: loss for name, loss in result["loss"].items() if loss is not None}
    absent = [name for name in study.validation if name not in losses]  # null: no label of it counted
    if absent:
        raise UserError(f"{result['run']}: result.json has no loss of domain {', '.join(absent)}")
    others: dict[str, float] = {"lr": run.config.optim.lr}
    if run.sweep:
        others["sweep"] = 1
    others |= {f"bpb/{name}": value for name, value in result["bpb"].items() if value is not None}
    others |= {f"eval_tokens/{name}": count for name, count in result["tokens_evaluated"].items()}
    for name, source in result["sources"].items():
        others[f"tokens/{name}"], others[f"epochs/{name}"] = source["tokens"], source["epochs"]
    domains = {name: losses[name] for name in study.validation}
    share = study.share(run.arm)
    return Row(
        run=result["run"],
        id=run.id,
        arm=run.arm,
        family=study.family(run.arm),
        share=str(share),
        ratio=float(share),
        size=run.size,
        n_params=run.parameters,
        budget=run.budget,
        tokens=result["tokens"],
        seed=run.seed,
        steps=result["steps"],
        flops=result["flops"],
        loss=_aggregate(study, domains, others),
        train_loss=result["train_loss"],
        train_seconds=result["train_seconds"],
        device=result["device"],
        trunk=result.get("trunk", ""),
        domains=domains,
        others=others,
    )


def _aggregate(study: Study, domains: Mapping[str, float], others: Mapping[str, float]) -> float:
    how = study.report.aggregate
    columns = {name: [loss] for name, loss in domains.items()}
    if isinstance(how, tuple):
        return float(aggregate(columns, "macro", domains=how)[0])
    counts = {name: others.get(f"eval_tokens/{name}", 0.0) for name in domains}
    return float(aggregate(columns, how, tokens=counts)[0])


def aggregate_name(study: Study) -> str:
    """The loss that a study is about, as forecasts name it."""
    how = study.report.aggregate
    return f"{how} of {', '.join(study.validation)}" if isinstance(how, str) else f"macro of {', '.join(how)}"


# ---- CSV


def runs_csv(rows: Sequence[Row]) -> str:
    """The content of runs.csv."""
    flat = [_flat(row) for row in rows]
    extra = sorted({name for row in flat for name in row if name not in (*_ORDER, _TRUNK)}, key=_place)
    return _csv([*_ORDER, _TRUNK, *extra], flat)


def _flat(row: Row) -> dict[str, Any]:
    fixed = {name: getattr(row, name) for name in (*_ORDER, _TRUNK)}
    return {**fixed, **{f"loss/{name}": loss for name, loss in row.domains.items()}, **row.others}


def _place(name: str) -> tuple[int, str]:
    prefixes = (*_BY_DOMAIN, *_BY_SOURCE)
    return next((1 + position for position, prefix in enumerate(prefixes) if name.startswith(prefix)), 0), name


def read_runs_csv(path: Path) -> list[Row]:
    """The rows of a runs.csv.

    Raises:
        UserError: it cannot be read, or a column or value is missing.
    """
    table = read_table(path)
    missing = [name for name in _ORDER if name not in table.texts]
    if missing:
        raise UserError(f"{path}: no column '{missing[0]}'; expected a runs.csv that `study report` wrote")
    rows = []
    for place, line in enumerate(table.lines.tolist()):
        cells = {name: texts[place] for name, texts in table.texts.items()}
        values: dict[str, Any] = {name: cells[name] for name in _TEXT}
        where = f"{path}, line {line}"
        values |= {name: _whole(cells[name], name, where) for name in _WHOLE}
        values |= {name: _finite(cells[name], name, where) for name in _NUMBERS if name != "train_loss"}
        values["train_loss"] = _finite(cells["train_loss"], "train_loss", where) if cells["train_loss"] else None
        _check(values, where)
        values[_TRUNK] = cells.get(_TRUNK, "")
        known = (*_ORDER, _TRUNK)
        rest = {name: _finite(text, name, where) for name, text in cells.items() if name not in known and text}
        domains = {name.removeprefix("loss/"): value for name, value in rest.items() if name.startswith("loss/")}
        others = {name: value for name, value in rest.items() if not name.startswith("loss/")}
        rows.append(Row(**values, domains=domains, others=others))
    twice = [name for name, number in Counter(row.run for row in rows).items() if number > 1]
    if twice:
        raise UserError(f"{path}: run {twice[0]} stands there more than once")
    by_domains = {tuple(row.domains): row.run for row in rows}
    if len(by_domains) > 1:
        first, second = list(by_domains.values())[:2]
        raise UserError(f"{path}: runs {first} and {second} have losses of different domains; a report needs those of all")
    return rows


def _finite(text: str, column: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: column '{column}' holds {text[:60]!a}, expected a number")
    return value


def _whole(text: str, column: str, where: str) -> int:
    value = _finite(text, column, where)
    if not value.is_integer() or abs(value) > LARGEST:
        raise UserError(f"{where}: column '{column}' holds {text[:60]!a}, expected a whole number")
    return int(text) if text.strip().lstrip("+-").isdecimal() else int(value)


def _check(values: Mapping[str, Any], where: str) -> None:
    """What a runs.csv holds lies in a range; UserError otherwise."""
    for name in ("n_params", "tokens", "steps", "flops", "loss"):
        if values[name] <= 0:
            raise UserError(f"{where}: column '{name}' holds {values[name]}, expected more than 0")
    if not 0 <= values["ratio"] <= 1:
        raise UserError(f"{where}: column 'ratio' holds {values['ratio']}, expected 0 to 1")
    try:
        parse_ratio(values["share"])
    except ValueError as error:
        raise UserError(f"{where}: column 'share': {error}") from None


def ratios_csv(study: Study, rows: Sequence[Row]) -> str:
    """Share of each source in each run, in olmix's shape: `run`, then a column per source; each row sums to 1."""
    content = []
    for row in rows:
        shares = {name: float(Fraction(share.ratio)) for name, share in study.arms[row.arm].items()}
        content.append({"run": row.run, **{source: shares.get(source, 0.0) for source in study.sources}})
    return _csv(["run", *study.sources], content)


def metrics_csv(rows: Sequence[Row]) -> str:
    """Bits per byte, or loss where bytes are not known, of each domain in each run, in olmix's shape."""
    domains = list(rows[0].domains)
    by_bytes = all(f"bpb/{name}" in row.others for row in rows for name in domains)
    content: list[dict[str, Any]] = []
    for row in rows:
        values = {f"{name}_bpb": row.others[f"bpb/{name}"] for name in domains} if by_bytes else {}
        values = values or {f"{name}_loss": row.domains[name] for name in domains}
        content.append({"run": row.run, **values})
    return _csv(list(content[0]), content)


def write_tables(study: Study, rows: Sequence[Row], out: Path) -> None:
    """Write runs.csv, ratios.csv and metrics.csv."""
    write_atomic(out / "runs.csv", runs_csv(rows))
    write_atomic(out / "ratios.csv", ratios_csv(study, rows))
    write_atomic(out / "metrics.csv", metrics_csv(rows))


def _csv(heads: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=heads, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
