"""What the cells of the report's page hold: numbers with their intervals, shares, places, and the tables around them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from markupsafe import Markup

from megatron_synth.core import html as pages
from megatron_synth.core.html import html
from megatron_synth.core.log import compact
from megatron_synth.study.fit.contrast import Estimate
from megatron_synth.study.report.collect import Row
from megatron_synth.study.report.figures.drawing import Drawn
from megatron_synth.study.report.findings import percent

_MOST = 10.0
"""A relative change that is above this, or an end of its interval, is no number that the runs know."""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], anchors: Sequence[str] = ()) -> Markup:
    """A table whose rows are named by their first cell."""
    return pages.table(heads, rows, anchors, row_heads=True)


def titled(title: str, note: Markup, table: Markup) -> Markup:
    """A table under a title, with a note between them."""
    return html("<h3>{}</h3>{}{}", title, note, table)


def figure_of(figure: Drawn) -> Markup:
    """A figure with its question, caption and data."""
    return html(
        '<figure id="figure-{}">{}<h3>{}</h3><div class="wide-figure">{}</div><figcaption>{}</figcaption>{}</figure>',
        figure.name,
        html('<p class="question">{}</p>', figure.question) if figure.question else "",
        figure.title,
        Markup(figure.svg),
        figure.caption,
        html('<details class="data"><summary>Data</summary><pre>{}</pre></details>', figure.data) if figure.data else "",
    )


def comparison(one: Any) -> tuple[str, str, str]:
    """Loss, difference from the baseline, and whether the two are told apart."""
    if math.isnan(one.difference_interval[0]) or one.difference == 0:
        change = "the baseline" if one.difference == 0 else percent(one.difference)
        return f"{one.loss:.4f} {bounds_of(one.interval, '.3f')}", change, ""
    change = f"{100 * one.difference:+.2f} % {bounds_of(tuple(100 * bound for bound in one.difference_interval), '+.2f')}"
    return f"{one.loss:.4f} {bounds_of(one.interval, '.3f')}", change, "distinct" if one.distinct else "not distinct"


def in_percent(one: Estimate) -> str:
    """A relative change with its interval."""
    if abs(one.value) > _MOST:  # a floor that the runs do not know
        return "not known"
    low, high = (_percent(bound) for bound in one.interval)
    return f"{100 * one.value:+.2f} % [{low}, {high}]"


def _percent(value: float) -> str:
    return f"{100 * value:+.2f}" if abs(value) <= _MOST else "∞" if value > 0 else "-∞"


def parts_of(row: Row, prefix: str) -> list[tuple[str, float]]:
    """(domain or source, value) of the columns of a run whose names begin with `prefix`."""
    return [(name.removeprefix(prefix), value) for name, value in row.others.items() if name.startswith(prefix)]


def at_budget(part: str) -> str:
    """A number of tokens in short; any other text as it is."""
    return f"{compact(int(part))} tokens" if part.isdecimal() else part


def at_cell(text: str) -> str:
    """A cell's name, `SIZE, TOKENS`, with the tokens in short."""
    size, _, tokens = text.partition(", ")
    return f"{size}, {compact(int(tokens))} tokens"


def simple_fraction(value: float) -> str:
    """A share as a fraction of small numbers where it is one, such as 1/3."""
    near = Fraction(value).limit_denominator(12)
    return str(near) if abs(float(near) - value) < 1e-9 else f"{value:.3g}"


def bounds_of(bounds: Iterable[float], form: str) -> str:
    """An interval in brackets; empty where it is not known."""
    low, high = bounds
    shown = [("∞" if math.isinf(value) else format(value, form)) for value in (low, high)]
    return "" if math.isnan(low) or math.isnan(high) else f"[{shown[0]}, {shown[1]}]"


def p_value(value: float) -> str:
    """A p-value with three digits."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
