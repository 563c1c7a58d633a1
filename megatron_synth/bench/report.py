"""`megatron-synth bench report FILES...`: tables of what `--json` wrote, and a verdict on `bench train` against a baseline.

A point is slower than its baseline when both hold: the median step takes longer by more than the tolerance (3 % by default),
and a one-sided Mann-Whitney U test over all single steps rejects at p < 0.01 that the steps are no slower. The first alone
would call a noisy machine a regression, the second alone a difference that nobody minds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.core.log import gib
from megatron_synth.core.records import read_text

SIGNIFICANCE = 0.01
MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, ArithmeticError, RecursionError)
"""What comes of reading a file that was not written by `--json`, or was altered since."""


@dataclass(frozen=True)
class Record:
    """One measured configuration."""

    model: str
    settings: str
    """Layout, format and sizes: what must be equal for two records to be compared."""
    device: str
    commit: str
    step_s: tuple[float, ...]
    tokens_per_s: float
    """Per rank."""
    tflops: float
    mfu: float | None
    peak_bytes: int | None

    @property
    def key(self) -> tuple[str, str, str]:
        """What two records must share to be compared."""
        return self.model, self.settings, self.device


@dataclass(frozen=True)
class Verdict:
    """A record against its baseline."""

    record: Record
    slowdown: float
    """Median step time over the baseline's, less 1."""
    p: float
    slower: bool


def read(path: Path) -> list[Record]:
    """The measurements in a file; points of a sweep without one are left out.

    Raises:
        UserError: the file is not one of ours.
    """
    try:
        records = list(_records(json.loads(read_text(path))))
    except MALFORMED as error:
        raise UserError(f"{path}: expected what `bench train --json` writes: {type(error).__name__}: {error}") from None
    if not records:
        raise UserError(f"{path}: holds no measurement")
    return records


def content(path: Path) -> dict[str, Any]:
    """What `--json` wrote; empty where the file cannot be read, which `read` explains."""
    try:
        found = json.loads(read_text(path))
    except (UserError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _records(content: dict[str, Any]) -> Iterator[Record]:
    for point in content.get("points", []):
        if point["result"] is not None:
            yield from _records(point["result"])
    for part in content.get("parts", {}).values():  # of bench gpu
        result = part.get("result")
        if isinstance(result, dict) and {"rows", "config"} <= set(result):  # the kernels have a table of their own
            yield from _records(part["result"])
    for row in content.get("rows", []):
        config = content["config"]
        train, model = config["train"], config["model"]
        recompute = "" if train.get("recompute", "none") == "none" else f", {train['recompute']} recompute"
        precision = ",".join(
            str(value) for value in config["precision"].values() if isinstance(value, str) and value not in ("off", "auto")
        )
        shape = f"S{train['sequence_length']} B{train['micro_batch_size']}/{train['global_batch_size']}"
        name = "" if row["name"] == "megatron-synth" else f"{row['name']}: "
        yield Record(
            model=f"{name}{model['name']}",
            settings=f"{precision} {shape}, {content['layout']}{recompute}, {content.get('data', 'random')} data",
            device=content["device"],
            commit=(content["git"] or {}).get("commit", "none")[:10],
            step_s=tuple(second for block in row["step_s"] for second in block),
            tokens_per_s=row["tokens_per_s_per_rank"],
            tflops=row["tflops_per_rank"],
            mfu=row["mfu"],
            peak_bytes=row["peak_bytes"],
        )


def table_rows(records: Sequence[Record]) -> list[list[str]]:
    """One row per record."""
    from megatron_synth.estimate.hardware import show_mfu

    rows = [["model", "settings", "device", "commit", "ms/step", "min to max", "tokens/s/rank", "TFLOP/s", "MFU", "peak GiB"]]
    for one in records:
        rows.append(
            [
                one.model,
                one.settings,
                one.device,
                one.commit,
                f"{1000 * statistics.median(one.step_s):.1f}",
                f"{1000 * min(one.step_s):.1f} to {1000 * max(one.step_s):.1f}",
                f"{one.tokens_per_s:,.0f}",
                f"{one.tflops:.3g}",
                show_mfu(one.mfu),
                "n/a" if one.peak_bytes is None else gib(one.peak_bytes),
            ]
        )
    return rows


def compare(records: Sequence[Record], baseline: Sequence[Record], tolerance: float) -> list[Verdict]:
    """Each record that the baseline has too, by the module's test."""
    from scipy.stats import mannwhitneyu

    before = {record.key: record for record in baseline}
    verdicts = []
    for record in records:
        if record.key not in before:
            continue
        old = before[record.key].step_s
        slowdown = statistics.median(record.step_s) / statistics.median(old) - 1
        p = float(mannwhitneyu(record.step_s, old, alternative="greater").pvalue)
        verdicts.append(Verdict(record, slowdown, p, slowdown > tolerance and p < SIGNIFICANCE))
    return verdicts


def verdict_rows(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """The table of verdicts, its head first."""
    rows = [["model", "settings", "step time", "p", "verdict"]]
    for one in verdicts:
        verdict = "SLOWER" if one.slower else "as fast"
        rows.append([one.record.model, one.record.settings, f"{100 * one.slowdown:+.1f} %", f"{one.p:.2g}", verdict])
    return rows


def draw(records: Sequence[Record], path: Path) -> None:
    """Tokens/s per rank as bars, with the spread of single steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from megatron_synth.train.record.figures.plot import save

    matplotlib.rcParams["text.parse_math"] = False  # names are no formulas
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.5 * len(records)), layout="constrained")
    names = [f"{record.model}, {record.settings}" for record in records]
    rates = [record.tokens_per_s for record in records]
    medians = [statistics.median(record.step_s) for record in records]
    low = [rate * (1 - middle / max(one.step_s)) for rate, middle, one in zip(rates, medians, records, strict=True)]
    high = [rate * (middle / min(one.step_s) - 1) for rate, middle, one in zip(rates, medians, records, strict=True)]
    places = range(len(records))
    axes.barh(places, rates, xerr=[low, high], color="#4477aa", ecolor="#222222", capsize=3)
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s per rank; whiskers: slowest and fastest step")
    save(figure, path, dpi=120)
    pyplot.close(figure)
