"""Forecasts as they were written down: forecasts.jsonl in the study's folder, one a line, never changed.

Each line has a digest of its content and of the digest before it, so a line that was changed, put between others or taken out
is seen. What is cut from the end, or a file that was written anew, is seen by the results of runs that were finished since:
each holds the last digest of its time. `study forecast` also prints it, to be kept elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import with_config
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from megatron_synth import __version__
from megatron_synth.config.errors import UserError
from megatron_synth.core.files import append_line
from megatron_synth.core.lock import Lock
from megatron_synth.core.records import OPEN, Amount, Number, Positive, Reader, parse_json, read_bytes
from megatron_synth.study.execute.folder import NO_FORECAST
from megatron_synth.study.forecast.predict import LEVEL, Measured, Prediction, Target

FORMAT_VERSION = 1


@with_config(OPEN)
class Forecast(TypedDict):
    """A line of forecasts.jsonl."""

    format_version: Literal[1]
    arm: str
    size: str
    n_params: Positive
    tokens: Positive
    runs: Positive
    """Seeds whose mean loss is predicted."""
    aggregate: str
    """The loss that it is about."""
    loss: Number
    low: Number
    high: Number
    """Interval of the mean of the runs."""
    law_low: Number
    law_high: Number
    """Interval of the law's value."""
    level: Amount
    law: str
    params: dict[str, Number]
    doubts: list[str]
    noise: Amount
    noise_from: str
    beyond: dict[str, Number]
    from_runs: list[str]
    """Ids of the runs that the law was fitted to."""
    data_digest: str
    """Of these runs' ids and losses."""
    hindsight: bool
    """Whether a run that it predicts had begun already."""
    made: str
    version: str
    previous: str
    digest: str


FORECAST: Reader[Forecast] = Reader(Forecast, "forecasts are never changed once they are written; restore the file")


@dataclass(frozen=True)
class Ledger:
    """The forecasts of a study.

    forecasts: in their order, also those that are damaged.
    changed: of the place of a line that is not as it was written, what is wrong with it.
    """

    forecasts: tuple[Forecast, ...]
    changed: dict[int, str]

    @property
    def head(self) -> str:
        """The last digest."""
        return self.forecasts[-1]["digest"] if self.forecasts else NO_FORECAST

    def place_of(self, digest: str) -> int | None:
        """Where the line with a digest stands: -1 for that before the first; None if there is none."""
        if digest == NO_FORECAST:
            return -1
        return next((place for place, one in enumerate(self.forecasts) if one["digest"] == digest), None)


def digest_of(content: Mapping[str, Any]) -> str:
    """16 hexadecimal characters of a forecast without its own digest."""
    kept = {name: value for name, value in content.items() if name != "digest"}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def data_digest(rows: Iterable[Measured]) -> str:
    """16 hexadecimal characters of runs' ids and losses, in any order."""
    pairs = sorted((row.id, repr(float(row.loss))) for row in rows)
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def read_ledger(path: Path) -> Ledger:
    """The forecasts in a file; none if there is no file.

    Raises:
        UserError: a line is no forecast. One that is, but was changed, is named in `changed`.
    """
    if not path.exists():
        return Ledger((), {})
    found: list[Forecast] = []
    changed: dict[int, str] = {}
    for number, line in enumerate(read_bytes(path).removesuffix(b"\n").split(b"\n"), start=1):
        place = f"{path}, line {number}"
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UserError(f"{place}: damaged: not valid JSON ({error}); {FORECAST.remedy}") from None
        one = FORECAST.check(value, place)
        before = found[-1]["digest"] if found else NO_FORECAST
        if digest_of(value) != one["digest"]:
            changed[len(found)] = "its content is not what its digest says: it was changed after it was written"
        elif one["previous"] != before:
            changed[len(found)] = "it does not follow the line before it: lines were taken out, added or moved"
        found.append(one)
    return Ledger(tuple(found), changed)


def write_down(
    path: Path, predictions: Sequence[Prediction], rows: Sequence[Measured], *, aggregate: str, hindsight: Sequence[bool]
) -> list[Forecast]:
    """Append predictions to a file of forecasts.

    Args:
        path: forecasts.jsonl; made with its folder if it is not there.
        predictions: what to write.
        rows: the runs that they come from, among others.
        aggregate: the loss that they are about.
        hindsight: of each prediction, whether a run that it predicts had begun.

    Raises:
        UserError: the file cannot be written, another program writes to it, or it was changed.
    """
    by_id = {row.id: row for row in rows}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with Lock(path.with_suffix(".lock"), "study forecast"):
            ledger = read_ledger(path)
            if ledger.changed:
                place, why = next(iter(ledger.changed.items()))
                raise UserError(f"{path}, line {place + 1}: {why}; {FORECAST.remedy}")
            written: list[Forecast] = []
            previous = ledger.head
            for prediction, late in zip(predictions, hindsight, strict=True):
                content = _content(prediction, [by_id[name] for name in prediction.ids], aggregate, late, previous)
                content["digest"] = previous = digest_of(content)
                one = FORECAST.check(content, str(path))
                append_line(path, json.dumps(one, ensure_ascii=True, allow_nan=False))
                written.append(one)
    except OSError as error:
        raise UserError(f"{path}: the forecasts cannot be written ({error.strerror or error})") from error
    return written


def _content(one: Prediction, used: Sequence[Measured], aggregate: str, hindsight: bool, previous: str) -> dict[str, Any]:
    target = one.target
    return {
        "format_version": FORMAT_VERSION,
        "arm": target.arm,
        "size": target.size,
        "n_params": target.n_params,
        "tokens": target.tokens,
        "runs": target.runs,
        "aggregate": aggregate,
        "loss": one.loss,
        "low": one.interval[0],
        "high": one.interval[1],
        "law_low": one.law_interval[0],
        "law_high": one.law_interval[1],
        "level": LEVEL,
        "law": one.law.law.name,
        "params": {name: float(value) for name, value in one.law.params.items()},
        "doubts": list(one.doubts),
        "noise": one.noise,
        "noise_from": one.noise_from,
        "beyond": one.beyond,
        "from_runs": list(one.ids),
        "data_digest": data_digest(used),
        "hindsight": hindsight,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "previous": previous,
    }


def target_of(one: Forecast) -> Target:
    """What a forecast is about."""
    return Target(one["arm"], one["size"], one["n_params"], one["tokens"], one["runs"])
