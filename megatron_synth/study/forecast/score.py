"""Forecasts held against the runs that they were about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.core.log import compact, table
from megatron_synth.study.forecast.ledger import Forecast, Ledger, data_digest, target_of
from megatron_synth.study.forecast.predict import Measured


@dataclass(frozen=True)
class Finished:
    """What the record of a finished run says of forecasts: when it ended, and the last digest of that time."""

    at: str
    head: str | None
    """None: the record is of an earlier version, which did not note it."""


@dataclass(frozen=True)
class Score:
    """A forecast and what came of it.

    changed: what is wrong with its line; such a forecast is not scored.
    measured: mean loss of the runs that are finished; None while there is none.
    rows: these runs.
    error: predicted / measured - 1.
    inside: whether the measured mean is in the interval.
    before: whether it was made before the runs: it says so itself, and no record of theirs says otherwise.
    remarks: what else is to be known.
    """

    forecast: Forecast
    changed: str
    measured: float | None
    rows: tuple[Measured, ...]
    error: float | None
    inside: bool | None
    before: bool
    remarks: tuple[str, ...]

    @property
    def name(self) -> str:
        """Arm, size and budget."""
        return target_of(self.forecast).name


def score(
    ledger: Ledger, rows: Sequence[Measured], aggregate: str, finished: Mapping[str, Finished] | None = None
) -> list[Score]:
    """Score every forecast whose runs are finished.

    Args:
        ledger: the forecasts.
        rows: the finished runs.
        aggregate: the loss that the rows have.
        finished: of the runs' ids what their records say; empty where runs come from a table.
    """
    known = finished or {}
    return [_score(ledger, place, rows, aggregate, known) for place in range(len(ledger.forecasts))]


def _score(ledger: Ledger, place: int, rows: Sequence[Measured], aggregate: str, finished: Mapping[str, Finished]) -> Score:
    one = ledger.forecasts[place]
    target = target_of(one)
    found = tuple(row for row in rows if target.holds(row))
    changed = ledger.changed.get(place, "")
    if changed:
        return Score(one, changed, None, found, None, None, False, ())
    remarks = []
    before = not one["hindsight"]
    if not before:
        remarks.append("made when a run of it had begun")
    late = [row.id for row in found if row.id in finished and _after(one["made"], finished[row.id].at)]
    if late:
        before = False
        remarks.append(f"its date is after the end of run {late[0]}")
    for row in found:
        head = finished[row.id].head if row.id in finished else None
        noted = None if head is None else ledger.place_of(head)
        if head is not None and noted is None:
            before = False
            remarks.append(f"run {row.id} noted forecasts that are no longer in the file")
            break
        if noted is not None and noted < place:
            before = False
            remarks.append(f"it was not in the file when run {row.id} ended")
            break
    used = [row for row in rows if row.id in set(one["from_runs"])]
    if len(used) < len(one["from_runs"]):
        remarks.append("not all runs that it comes from are here")
    elif one["aggregate"] == aggregate and data_digest(used) != one["data_digest"]:
        remarks.append("the runs that it comes from have other losses now")
    if one["aggregate"] != aggregate:
        remarks.append(f"about another loss ({one['aggregate']})")
        return Score(one, "", None, found, None, None, before, tuple(remarks))
    if not found:
        return Score(one, "", None, found, None, None, before, tuple(remarks))
    if len(found) < one["runs"]:
        remarks.append(f"{len(found)} of {one['runs']} runs are finished")
    measured = float(np.exp(np.mean(np.log([row.loss for row in found]))))
    inside = one["low"] <= measured <= one["high"]
    return Score(one, "", measured, found, one["loss"] / measured - 1, inside, before, tuple(remarks))


def lost(ledger: Ledger, finished: Mapping[str, Finished]) -> str:
    """What is wrong with the file as a whole, by the records of runs; empty where nothing is."""
    heads = {one.head: name for name, one in finished.items() if one.head is not None}
    missing = [name for head, name in heads.items() if ledger.place_of(head) is None]
    if not missing:
        return ""
    return f"run {missing[0]} noted a forecast that the file no longer has: lines were taken out, or it was written anew"


def _after(made: str, ended: str) -> bool:
    try:
        return datetime.fromisoformat(made) > datetime.fromisoformat(ended)
    except (ValueError, TypeError):
        raise UserError(f"'{made[:40]}' or '{ended[:40]}' is no date with a time zone") from None


def score_text(scores: Sequence[Score]) -> str:
    """A table for the terminal, and a sentence."""
    lines: list[tuple[str, ...]] = [("made", "of", "law", "predicted", "90 % interval", "measured", "error", "inside", "")]
    for one in scores:
        made, name, law = one.forecast["made"][:16], one.name, one.forecast["law"]
        if one.changed:
            lines.append((made, name, law, "", "", "", "", "", f"CHANGED: {one.changed}"))
            continue
        predicted = f"{one.forecast['loss']:.4f}"
        bounds = f"{one.forecast['low']:.4f} to {one.forecast['high']:.4f}"
        scored = ("not yet", "", "")
        if one.measured is not None and one.error is not None:
            scored = (f"{one.measured:.4f}", f"{one.error:+.2%}", "yes" if one.inside else "no")
        lines.append((made, name, law, predicted, bounds, *scored, "; ".join(one.remarks)))
    return f"{table(lines)}\n\n{summary(scores)}"


def summary(scores: Sequence[Score]) -> str:
    """What came of the forecasts, in a sentence."""
    before = [one for one in scores if one.before and one.error is not None]
    after = [one for one in scores if not one.before and one.error is not None]
    waiting = sum(one.error is None and not one.changed for one in scores)
    changed = sum(bool(one.changed) for one in scores)
    parts = []
    for chosen, words in ((before, "made before their runs"), (after, "made in hindsight")):
        if chosen:
            mean = float(np.mean([abs(one.error) for one in chosen if one.error is not None]))
            worst = max(chosen, key=lambda one: abs(one.error or 0.0))
            parts.append(
                f"of {len(chosen)} forecasts {words}, {sum(bool(one.inside) for one in chosen)} held in their 90 % intervals, "
                f"with a mean absolute error of {mean:.2%} (worst: {worst.name}, {abs(worst.error or 0.0):.2%})"
            )
    if waiting:
        parts.append(f"{waiting} wait for their runs")
    if changed:
        parts.append(f"{changed} were changed after they were written, and are not scored")
    text = "; ".join(parts) or "no forecast was written"
    return f"{text[0].upper()}{text[1:]}."


def forecast_text(forecasts: Sequence[Forecast]) -> str:
    """What was written down, as a table."""
    lines: list[tuple[str, ...]] = [("of", "seeds", "law", "predicted", "90 % interval", "beyond", "doubts")]
    for one in forecasts:
        beyond = ", ".join(f"{value:.1f}x {'D' if name == 'tokens' else 'N'}" for name, value in one["beyond"].items())
        bounds = f"{one['low']:.4f} to {one['high']:.4f}"
        where = f"{one['arm']}, {one['size']}, {compact(one['tokens'])}"
        doubts = ", ".join(one["doubts"]) or "none"
        lines.append((where, str(one["runs"]), one["law"], f"{one['loss']:.4f}", bounds, beyond, doubts))
    return table(lines)
