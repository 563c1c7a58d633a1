"""How the figures of a report are drawn: as SVG that takes its colors from the page, readable on light and on dark."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import unescape
from typing import TYPE_CHECKING

from markupsafe import escape

from megatron_synth.core.log import compact
from megatron_synth.study.report.analysis import Analysis, Fitted
from megatron_synth.train.record.figures.plot import FAINT, GREY, INK, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = "#fffffe"  # stands for the page's background
_VARIABLES = {INK: "--ink", GREY: "--gray", FAINT: "--faint", PAPER: "--paper"}
HUES = ("#3d7cc9", "#d9822b", "#2f9e6e", "#a35bb5", "#c2503f", "#3fa3b5")
_MARKERS: dict[str, str] = {
    **{"s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "<": "◀", ">": "▶", "p": "⬟", "*": "★", "h": "⬢"},
    **{"d": "⬧", "8": "⯃", "H": "⬣"},
}
"""Of arms, with the character that stands for each in the text; the baseline has the circle."""
BASELINE_MARKER = "o"
_HATCHES = ("", "//", "||", "xx", "\\\\", "--", "++")
_COLUMNS = 3
MOST_PANELS = 12
"""Of a figure; maps have all cells."""


@dataclass(frozen=True)
class Drawn:
    """A figure of the page.

    question: what it is about. title: its answer, as far as the runs give one.
    svg: to stand inside the page, in its colors. file: the same alone, on white. data: its numbers, as CSV.
    """

    name: str
    title: str
    caption: str
    svg: str
    png: bytes
    question: str = ""
    file: str = ""
    data: str = ""


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, in every figure alike: no two have one marker, as colors alone are not told apart by everybody."""

    color: str
    marker: str
    hatch: str = ""

    @property
    def sign(self) -> str:
        """The marker as a character."""
        return _MARKERS.get(self.marker, "●")


def looks(analysis: Analysis) -> dict[str, Look]:
    """The baseline in the color of the text, a hue per family, lighter for the smaller shares."""
    study = analysis.study
    families = list(dict.fromkeys(study.family(arm) for arm in study.arms if study.family(arm)))
    result: dict[str, Look] = {}
    markers = list(_MARKERS)
    for number, family in enumerate(families):
        arms = sorted((arm for arm in study.arms if study.family(arm) == family), key=study.share)
        for place, arm in enumerate(arms):
            tint = 0.0 if len(arms) == 1 else 0.45 - 0.6 * place / (len(arms) - 1)
            count = len(result)
            color = _tinted(HUES[number % len(HUES)], tint)
            result[arm] = Look(color, markers[count % len(markers)], _HATCHES[count % len(_HATCHES)])
    for arm in study.arms:
        result.setdefault(arm, Look(INK, BASELINE_MARKER))
    return result


def _tinted(color: str, tint: float) -> str:
    """Towards white for a positive tint, towards black for a negative one."""
    target, weight = (255, tint) if tint > 0 else (0, -tint)
    parts = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(part + (target - part) * weight):02x}" for part in parts)


def render_figure(
    name: str,
    title: str,
    caption: str,
    size: tuple[float, float],
    draw: Callable[[Figure], None],
    told: str,
    *,
    question: str = "",
    data: Sequence[Sequence[object]] = (),
) -> Drawn:
    """Draw a figure.

    Args:
        name: of its file.
        title: the answer that it gives.
        caption: how to read it.
        size: in inches.
        draw: what draws it.
        told: in words what it shows, for those who do not see it.
        question: what it answers.
        data: its numbers, the names of the columns first.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style = {**STYLE, "svg.fonttype": "none", "svg.hashsalt": name, "figure.facecolor": "none", "axes.facecolor": "none"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, dpi=100, layout="constrained")
        draw(figure)
        vector, raster = io.BytesIO(), io.BytesIO()
        figure.savefig(vector, format="svg", metadata={"Date": None})
        figure.set_layout_engine("none")  # places are found once, which takes as long as to draw
        figure.savefig(raster, format="png", facecolor="white", dpi=110)
    svg = _compact(vector.getvalue().decode(), name)
    inline = _inline(svg, name, f"{question} {title}. {told}".strip())
    return Drawn(name, title, caption, inline, raster.getvalue(), question, svg.replace(PAPER, "#ffffff"), csv_of(data))


def csv_of(rows: Sequence[Sequence[object]]) -> str:
    """Rows as CSV. Text that a spreadsheet would run as a formula is quoted for it, numbers have six digits."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([[_cell(value) for value in row] for row in rows])
    return buffer.getvalue()


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    text = str(value)
    return f"'{text}" if text[:1] in "=+-@\t\r" and isinstance(value, str) and text else text


_GEOMETRY = re.compile(r'\b(d|x|y|x1|x2|y1|y2|cx|cy|transform|points|width|height)="([^"]*)"')
_LONG = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
_MANY, _WORDY = 3, 16
"""Styles that stand so often, and are so long, become classes."""


def _short(number: re.Match[str]) -> str:
    """A tenth of a point; what is smaller, as a scale may be, keeps three digits."""
    value = float(number[0])
    return f"{value:.3g}" if abs(value) < 0.1 else f"{round(value, 1):g}"


def _compact(svg: str, name: str) -> str:
    """The same drawing in a third of the bytes.

    A tenth of a point is enough, names that nothing refers to go and others are short, groups that say nothing go, and styles
    that stand often become classes of the figure.
    """
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)

    def shorter(match: re.Match[str]) -> str:
        values = _LONG.sub(_short, match[2])
        values = " ".join(values.split())
        return f'{match[1]}="{values}"'

    svg = _GEOMETRY.sub(shorter, svg)
    wanted = list(dict.fromkeys(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)))
    short = {long: f"i{place}" for place, long in enumerate(wanted)}
    svg = re.sub(r' id="([^"]+)"', lambda match: f' id="{short[match[1]]}"' if match[1] in short else "", svg)
    svg = re.sub(r'(url\(#|href="#)([^)"]+)', lambda match: f"{match[1]}{short[match[2]]}", svg)
    styles = Counter(re.findall(r' style="([^"]*)"', svg))
    often = [style for style, count in styles.items() if count >= _MANY and len(style) >= _WORDY]
    classes = {style: f"{name}-{place}" for place, style in enumerate(often)}
    svg = re.sub(r' style="([^"]*)"', lambda match: f' class="{classes[match[1]]}"' if match[1] in classes else match[0], svg)
    rules = "".join(f".{label}{{{unescape(style)}}}" for style, label in classes.items())
    svg = svg.replace("</style>", f"{rules}</style>", 1)
    return re.sub(r"\n\s*", "\n", _without_bare_groups(svg))


def _without_bare_groups(svg: str) -> str:
    kept: list[bool] = []
    parts: list[str] = []
    for part in re.split(r"(<g\b[^>]*>|</g>)", svg):
        if part == "</g>":
            if kept.pop():
                parts.append(part)
            continue
        if part.startswith("<g") and part[2:3] in (">", " ", "\n"):
            kept.append(part != "<g>")
            if part == "<g>":
                continue
        parts.append(part)
    return "".join(parts)


def _inline(svg: str, name: str, told: str) -> str:
    """SVG to stand inside a page: its own ids, the page's colors, scaled to the column."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    head = re.sub(r' (?:width|height)="[^"]*"', "", svg[: svg.index(">")])
    return f'{head} role="img" aria-label="{escape(told)}"' + svg[svg.index(">") :]


def marked(arm: str, *fits: Fitted | None) -> str:
    """The arm's name, with a dagger where a law that is drawn carries doubts."""
    return f"{arm} †" if any(fitted is not None and fitted.doubts for fitted in fits) else arm


DOUBTED = " † A law with doubts, named in the table of laws."


def panels_of(figure: Figure, count: int, columns: int = _COLUMNS) -> list[Axes]:
    """The first `count` panels of a grid; the others are left empty."""
    columns = min(columns, count)
    rows = -(-count // columns)
    axes = figure.subplots(rows, columns, squeeze=False)
    flat = [ax for row in axes for ax in row]
    for ax in flat[count:]:
        ax.set_axis_off()
    return flat[:count]


def figure_size(count: int, columns: int = _COLUMNS, height: float = 3.6) -> tuple[float, float]:
    """The figure is as wide as the page's column, however few panels it has."""
    return 11.5, 0.35 + height * -(-count // min(columns, count))


def panel_title(ax: Axes, text: str) -> None:
    """Write the title of a panel."""
    ax.set_title(text, loc="left", fontweight="bold", fontsize=11)


def log_ticks(ax: Axes, form: Callable[[float], str] = compact) -> None:
    """Name the steps of a logarithmic axis of x; matplotlib's own names are formulas."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = ax.get_xlim()
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0, 3.0) if high / low < 3000 else (1.0,)
    ax.xaxis.set_major_locator(LogLocator(subs=subs))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: form(value))
    ax.set_xlim(low, high)
