"""report.png: one picture of a run, made from its directory alone.

Losses in training and validation, loss by source, the mixture that was asked for against the one that was delivered,
and the throughput. Sources keep one color in all panels; a validation domain named like a source shares it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_atomic
from megatron_synth.core.log import compact, human, one_line
from megatron_synth.train.record import metrics
from megatron_synth.train.record.metrics import Record, parts, read_metrics
from megatron_synth.train.record.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

INK, GREY, FAINT, ACCENT = "#22262b", "#6b737c", "#e3e6e9", "#c2372e"
PALETTE = ("#2f6fb0", "#e08a2e", "#3a9d6e", "#a14b9b", "#4aa6b8", "#8a6d3b", "#5a5fc4", "#9aa02c", "#d46a92", "#5f6b76")
STYLE: Any = {  # matplotlib types the keys one by one
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,  # names may hold dollar signs, and are no formulas
}


def write_report(run_dir: Path) -> Path:
    """Draw the run in `run_dir` to its report.png, 1600 x 1000 pixels, and return that path.

    UserError if it is no run directory, or no step has been recorded yet.
    """
    import matplotlib
    from matplotlib.figure import Figure

    run = RunDir.open(run_dir)
    records = read_metrics(run.metrics)
    if not records:
        raise UserError(f"{run.metrics}: no steps recorded yet; there is nothing to report")
    report = _Report(run, records)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 10), dpi=100)
        report.draw(figure)
        save(figure, run.report)
    return run.report


def save(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure as PNG, whole or not at all. options: of matplotlib's `savefig`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    write_atomic(path, buffer.getvalue())


class _Report:
    """The data of one run, and a method per panel."""

    def __init__(self, run: RunDir, records: list[Record]):
        self.run, self.records = run, records
        self.config, self.ledger = run.read_config(), run.read_ledger()
        self.evals = [record for record in records if metrics.has_eval(record)]
        sources = list(self.config["data"]["sources"])
        domains = [name for record in self.evals for name in parts(record, metrics.EVAL_DOMAIN_LOSS)]
        self.sources, self.domains = sources, list(dict.fromkeys(domains))
        names = dict.fromkeys([*sources, *domains])
        self.colors = {name: PALETTE[position % len(PALETTE)] for position, name in enumerate(names)}
        self.by_tokens = all(metrics.TOKENS in record for record in records)

    def draw(self, figure: Figure) -> None:
        """Header and six panels."""
        self._header(figure)
        grid = figure.add_gridspec(2, 3, left=0.045, right=0.91, top=0.825, bottom=0.07, wspace=0.46, hspace=0.42)
        panels = (self._loss, self._loss_by_source, self._validation, self._shares, self._table, self._throughput)
        for position, panel in enumerate(panels):
            panel(figure.add_subplot(grid[divmod(position, 3)]))

    def _header(self, figure: Figure) -> None:
        info, model, train = self.run.info, self.config["model"], self.config["train"]
        last = self.records[-1]
        steps = f"step {last[metrics.STEP]:,} of {train['steps']:,}"
        tokens = f"{human(last[metrics.TOKENS])} tokens" if self.by_tokens else ""
        heads = f"{model['num_attention_heads']} heads"
        if model.get("num_query_groups") not in (None, model["num_attention_heads"]):
            heads += f" in {model['num_query_groups']} groups"
        shape = f"{model['num_layers']} layers of {model['hidden_size']}, {heads}, sequence {train['sequence_length']}"
        ranks = info["world_size"]
        where = f"{info['layout']} on {ranks} x {info['device']}" if ranks > 1 else f"{info['layout']} on {info['device']}"
        seed = f"seed {train['seed']}, {self.config['precision']['dtype']}"
        commit = ""
        git = info["git"]
        if git is not None:
            commit = f"commit {git['commit'][:9]}{' + changes' if git['dirty'] else ''}"
        starts = len(info["starts"])
        started = f"{starts} starts" if starts > 1 else ""
        figure.text(0.045, 0.955, one_line(self.run.name), fontsize=22, fontweight="bold", va="center")
        first = [model["name"], shape, tokens, steps]
        second = [where, seed, f"run {self.run.id}, config {info['digest']}", commit, started, info["created"][:10]]
        for y, line, color in ((0.921, first, INK), (0.897, second, GREY)):
            figure.text(0.045, y, "  ·  ".join(part for part in line if part), fontsize=11, color=color, va="center")

    # ---- panels

    def _loss(self, ax: Axes) -> None:
        self._frame(ax, "Loss", "nats per token")
        x, y = self._series(metrics.LOSS)
        smooth = _smooth(y)
        labels = []
        if len(x):
            if smooth is not y:
                ax.plot(x, y, color=GREY, alpha=0.3, linewidth=0.8)
            _line(ax, x, smooth, INK)
            labels.append((smooth[-1], f"train {smooth[-1]:.3f}", INK))
        eval_x, eval_y = self._series(metrics.EVAL_LOSS)
        if len(eval_x):
            ax.plot(eval_x, eval_y, color=ACCENT, marker="o", markersize=5, markeredgecolor="white", linewidth=1.6)
            labels.append((eval_y[-1], f"validation\n{eval_y[-1]:.3f}", ACCENT))
        self._mark_resumes(ax)
        _limit_loss(ax, [smooth], [eval_y])
        label_ends(ax, labels)

    def _loss_by_source(self, ax: Axes) -> None:
        self._frame(ax, "Training loss by source", "nats per token")
        labels, curves = [], []
        for name in self.sources:
            x, y = self._series(metrics.SOURCE_LOSS + name)
            if len(x):
                curves.append(_smooth(y))
                _line(ax, x, curves[-1], self.colors[name])
                labels.append((curves[-1][-1], f"{_short(name)} {curves[-1][-1]:.3f}", self.colors[name]))
        if not curves:
            say_in(ax, "no loss by source was recorded")
            return
        _limit_loss(ax, curves, [])
        label_ends(ax, labels)

    def _validation(self, ax: Axes) -> None:
        if not self.evals:
            _title(ax, "Validation loss by domain")
            say_in(ax, "no evaluation yet")
            return
        if len(self.evals) > 1:
            self._frame(ax, "Validation loss by domain", "nats per token")
            labels = []
            for name in self.domains:
                x, y = self._series(metrics.EVAL_DOMAIN_LOSS + name)
                if len(x):
                    ax.plot(x, y, color=self.colors[name], marker="o", markersize=4.5, markeredgecolor="white")
                    labels.append((y[-1], f"{_short(name)} {y[-1]:.3f}", self.colors[name]))
            label_ends(ax, labels)
            return
        record = self.evals[0]
        _title(ax, "Validation loss by domain", f"nats per token, after step {record[metrics.STEP]:,}")
        losses = {name: value for name, value in parts(record, metrics.EVAL_DOMAIN_LOSS).items() if _finite(value)}
        names = sorted(losses, key=losses.__getitem__, reverse=True)  # the lowest loss on top
        colors = [self.colors[name] for name in names]
        ax.barh([_short(name) for name in names], [losses[name] for name in names], color=colors, height=0.6)
        for position, name in enumerate(names):
            bpb = record.get(metrics.EVAL_DOMAIN_BPB + name)
            text = f" {losses[name]:.3f}" + (f"\n {bpb:.3f} bits/byte" if bpb is not None else "")
            ax.text(losses[name], position, text, va="center", fontsize=9.5, fontweight="bold", color=colors[position])
        ax.set_ylim(-0.6, max(len(names), 3) - 0.4)
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0, labelcolor=INK, labelrotation=90)
        for label in ax.get_yticklabels():
            label.set_verticalalignment("center")

    def _shares(self, ax: Axes) -> None:
        self._frame(ax, "Share of the training tokens", "delivered (line), requested (dots)")
        series = {name: self._series(metrics.SHARE + name) for name in self.sources}
        if not any(len(x) for x, _ in series.values()):
            say_in(ax, "no shares were recorded")
            return
        labels, top = [], 0.0
        for name, (x, y) in series.items():
            # a mixture in phases has no one ratio: the dots are at its share of the whole run so far, which the ledger has
            phased = bool(self.config["data"].get("phases"))
            asked = self._asked_of_ledger(name) if phased else self.config["data"]["sources"][name].get("ratio")
            if asked is not None:
                requested = float(asked)
                ax.axhline(requested, color=INK, linestyle=(0, (1, 2.5)), linewidth=1.2, zorder=3)
                top = max(top, requested)
            top = max(top, *y, 0.0)
            if len(x):
                _line(ax, x, y, self.colors[name], linewidth=3.0, alpha=0.85)
                labels.append((y[-1], f"{_short(name)} {y[-1]:.2%}", self.colors[name]))
        if len(self.records) > 20:
            _log_axis(ax)  # what there is to see happens in the first steps
        ax.set_ylim(0, min(1.0, 1.15 * top) + 0.002)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        label_ends(ax, labels)

    def _asked_of_ledger(self, name: str) -> Fraction | None:
        found = None if self.ledger is None else self.ledger["sources"].get(name)
        return None if found is None else Fraction(found["ratio"])

    def _table(self, ax: Axes) -> None:
        if not self.ledger:
            _title(ax, "The mixture")
            say_in(ax, "no ledger yet")
            return
        ax.set_axis_off()
        _title(ax, "The mixture", f"{self.ledger['samples']:,} samples of {self.ledger['sequence_length']:,} tokens")
        samples, sources = self.ledger["samples"], self.ledger["sources"]
        heads = ("source", "requested", "delivered", "off by", "tokens", "epochs")
        right = (None, 0.52, 0.74, 0.9, 1.07, 1.24)
        rows = []
        for name, source in sources.items():
            off = float(source["samples"] - samples * Fraction(source["ratio"]))
            shares = (f"{float(Fraction(source['ratio'])):.3%}", f"{source['share']:.3%}", f"{off:+.2f}")
            rows.append((name, *shares, human(source["tokens"]), f"{source['epochs']:.2f}"))
        rows.append(("total", "", "", "", human(self.ledger["tokens"]), ""))
        pitch = min(0.12, 0.9 / (len(rows) + 1))
        size = 10 if pitch > 0.06 else 8
        for line, row in enumerate([heads, *rows]):
            y = 0.96 - line * pitch
            weight, color = "bold" if line == len(rows) else "normal", GREY if line == 0 else INK
            for x, text in zip(right, row, strict=True):
                place: dict[str, Any] = {"x": 0.045, "ha": "left"} if x is None else {"x": x, "ha": "right"}
                ax.text(y=y, s=_short(text), color=color, fontsize=size, va="center", fontweight=weight, **place)
            if 0 < line < len(rows):
                dot = self.colors.get(row[0], GREY)
                ax.plot(0.012, y, "o", color=dot, markersize=8, markeredgewidth=0, clip_on=False)
        for below in (0.5, len(rows) - 0.5):
            ax.plot([0, right[-1]], [0.96 - below * pitch] * 2, color=GREY, linewidth=0.8, clip_on=False)
        ax.text(
            0,
            0.93 - (len(rows) + 0.7) * pitch,
            "off by: delivered less requested, in samples",
            color=GREY,
            fontsize=9,
            va="center",
        )
        ax.set(xlim=(0, 1), ylim=(0, 1))

    def _throughput(self, ax: Axes) -> None:
        self._frame(ax, "Throughput", "tokens per second per device")
        x, y = self._series(metrics.TOKENS_PER_SEC)
        if not len(x):
            say_in(ax, "no throughput was recorded")
            return
        _line(ax, x, y, INK, linewidth=1.2)
        median = float(np.median(y))
        ax.axhline(median, color=ACCENT, linewidth=1.2, zorder=3)
        ax.set_ylim(0, 1.25 * max(median, float(np.quantile(y, 0.95))))
        ax.yaxis.set_major_formatter(lambda value, _: compact(value))
        facts = [f"median {human(median)}"]
        others = ((metrics.TFLOPS, "{:.3g} TFLOP/s"), (metrics.MFU, "mfu {:.1%}"), (metrics.DATA_PCT, "data {:.1f}%"))
        for name, form in others:
            values = self._series(name)[1]
            if len(values):
                facts.append(form.format(float(np.median(values))))
        label_ends(ax, [(median, "\n".join(facts), ACCENT)])
        self._mark_resumes(ax)

    # ---- helpers

    def _frame(self, ax: Axes, title: str, unit: str) -> None:
        _title(ax, title, unit)
        ax.set_xlabel("tokens" if self.by_tokens else "step", color=GREY)
        ax.xaxis.set_major_formatter(lambda value, _: compact(value))
        end = self.records[-1][metrics.TOKENS if self.by_tokens else metrics.STEP]
        ax.set_xlim(0, 1.01 * end)

    def _series(self, name: str) -> tuple[Floats, Floats]:
        """Where the metric has a finite value: tokens (or steps), and the value."""
        axis = metrics.TOKENS if self.by_tokens else metrics.STEP
        pairs = [(record[axis], record[name]) for record in self.records if _finite(record.get(name))]
        points = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return points[:, 0], points[:, 1]

    def _mark_resumes(self, ax: Axes) -> None:
        axis = metrics.TOKENS if self.by_tokens else metrics.STEP
        where = {record[metrics.STEP]: record[axis] for record in self.records}
        resumed = {start["resumed_from_step"] for start in self.run.info["starts"]}
        for step in sorted(step for step in where if step in resumed):
            ax.axvline(where[step], color=GREY, linestyle=(0, (4, 3)), linewidth=0.9, zorder=0.5)
            place: dict[str, Any] = {
                "xytext": (3, -3),
                "xycoords": ("data", "axes fraction"),
                "textcoords": "offset points",
            }
            ax.annotate("resumed", (where[step], 1), fontsize=8, color=GREY, rotation=90, va="top", **place)


def _title(ax: Axes, title: str, unit: str = "") -> None:
    ax.set_title(title, loc="left", fontweight="bold", fontsize=12.5, pad=22)
    ax.text(0, 1.03, unit, transform=ax.transAxes, fontsize=9.5, color=GREY)


def _line(ax: Axes, x: Floats, y: Floats, color: str, **style: Any) -> None:
    """A line, or a dot where there is only one point."""
    ax.plot(x, y, color=color, marker="o" if len(x) == 1 else "", **{"linewidth": 1.8, **style})


def _log_axis(ax: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    end = ax.get_xlim()[1]
    ax.set_xscale("log")
    ax.autoscale(axis="x")
    ax.set_xlim(ax.dataLim.intervalx[0], end)
    steps = (1.0,) if end / ax.dataLim.intervalx[0] > 1000 else (1.0, 2.0, 5.0)
    ax.xaxis.set_major_locator(LogLocator(subs=steps))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: compact(value))


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _smooth(values: Floats) -> Floats:
    """Trailing mean over a fiftieth of the points; short series as they are."""
    width = len(values) // 50
    if width < 2:
        return values
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - width, 0)
    result: Floats = (total[end] - total[begin]) / (end - begin)
    return result


def _limit_loss(ax: Axes, curves: Sequence[Floats], points: Sequence[Floats]) -> None:
    """Leave the fall of the first twentieth of a long run above the frame: it would flatten all that follows."""
    shown = [curve[len(curve) // 20 :] for curve in curves if len(curve) >= 40]
    if shown:
        values = np.concatenate([*shown, *points])
        low, high = float(values.min()), float(values.max())
        space = 0.06 * max(high - low, 1e-3)
        ax.set_ylim(low - space, high + space)


def frame_of_steps(ax: Axes, title: str, unit: str, records: Sequence[Record]) -> None:
    """A panel over the steps of `records`."""
    _title(ax, title, unit)
    ax.set_xlabel("step", color=GREY)
    ax.xaxis.set_major_formatter(lambda value, _: compact(value))
    ax.set_xlim(0, 1.01 * records[-1][metrics.STEP])


def label_ends(ax: Axes, labels: Iterable[tuple[float, str, Any]], *, relative: bool = False) -> None:
    """Name lines at the right edge, at the height of their last value, moved apart where they would overlap.

    relative: the heights are parts of the panel's, as they must be on a logarithmic axis.
    """
    low, high = (0.0, 1.0) if relative else ax.get_ylim()
    placed = sorted(((value - low) / (high - low), text, color) for value, text, color in labels)
    heights = _apart([height for height, _, _ in placed], [0.055 * (text.count("\n") + 1) for _, text, _ in placed])
    for height, (_, text, color) in zip(heights, placed, strict=True):
        ax.text(1.015, height, text, transform=ax.transAxes, color=color, va="center", fontsize=9.5, fontweight="bold")


def _apart(heights: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Ascending heights moved as little as needed for labels of these sizes not to overlap, all within [0, 1]."""
    result: list[float] = []
    for height, size in zip(heights, sizes, strict=True):
        floor = result[-1] + (sizes[len(result) - 1] + size) / 2 if result else 0.0
        result.append(max(min(height, 1.0), floor))
    ceiling = 1.0
    for position in range(len(result) - 1, -1, -1):
        result[position] = min(result[position], ceiling)
        if position:
            ceiling = result[position] - (sizes[position] + sizes[position - 1]) / 2
    return result


def say_in(ax: Axes, text: str) -> None:
    """Write in a panel why nothing is drawn there."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=GREY)


def _short(name: str) -> str:
    """A name that fits beside a panel: the middle of a long one left out."""
    return name if len(name) <= 11 else f"{name[:6]}…{name[-4:]}"
