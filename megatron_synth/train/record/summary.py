"""A run in a few lines of text, from its records alone."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import open_regular
from megatron_synth.core.log import human, table
from megatron_synth.train.checkpoint import branch
from megatron_synth.train.record import metrics, nodes, samples
from megatron_synth.train.record.anomalies import STANDS_OUT
from megatron_synth.train.record.run_dir import RunDir
from megatron_synth.train.record.shapes import LedgerInfo

_RECENT = 20
"""Steps over which loss and speed are taken, as single ones vary."""


def summary(path: Path) -> str:
    """How far the run in `path` is, its losses, what its sources delivered, and its speed.

    Raises:
        UserError: it is no run directory, has recorded no step, or is damaged.
    """
    run = RunDir.open(path)
    records = metrics.read_metrics(run.metrics)
    if not records:
        raise UserError(f"{run.metrics}: no steps recorded yet; there is nothing to report")
    config, ledger, last = run.read_config(), run.read_ledger(), records[-1]
    info, recent = run.info, records[-_RECENT:]
    done = f"step {last[metrics.STEP]:,} of {config['train']['steps']:,}"
    tokens = f", {last[metrics.TOKENS]:,} tokens" if metrics.TOKENS in last else ""
    lines = [f"run {run.id} in {run.path}: {done}{tokens}; {info['layout']} on {info['device']}"]
    trunk = branch.kept(run.path)
    if trunk is not None:
        of_trunk = trunk.samples * ledger["sequence_length"] if ledger is not None else None
        parts = "" if of_trunk is None else f": {of_trunk:,} tokens are the trunk's"
        lines.append(f"branch of {trunk.name}{parts}, and its loss is not independent of other branches'")
    for name, text, form in (
        (metrics.LOSS, "training loss {}, the mean of the last {} steps", "{:.4f}".format),
        (metrics.TOKENS_PER_SEC, "{} tokens/s per rank, the median of the last {} steps", human),
    ):
        values = [record[name] for record in recent if record.get(name) is not None]
        if values:
            value = statistics.fmean(values) if name == metrics.LOSS else statistics.median(values)
            lines.append(text.format(form(value), len(values)))
    if last.get(metrics.SKIPPED):
        lines.append(f"{last[metrics.SKIPPED]} steps were skipped, as they were not finite; events.log tells which")
    lines += _odd_rows(run.path)
    nodes_text = nodes.told(nodes.read_nodes(run.path))
    lines += [nodes_text] if nodes_text else []
    evaluated = next((record for record in reversed(records) if metrics.has_eval(record)), None)
    return "\n".join([*lines, table(_rows(ledger, last, evaluated)), *samples.excerpt(run.path)])


def _odd_rows(run: Path) -> list[str]:
    """The first note on rows that stand out, and how many there are."""
    file = run / "events.log"
    if not file.is_file():
        return []
    with os.fdopen(open_regular(file), "rb") as opened:
        notes = [line.decode(errors="replace").strip() for line in opened if STANDS_OUT.encode() in line]
    if not notes:
        return []
    counted = f"the first of {len(notes)} notes in events.log" if len(notes) > 1 else "noted in events.log"
    return [f"rows that may be damaged, {counted}: {notes[0].partition('warning: ')[2]}"]


def _rows(ledger: LedgerInfo | None, last: metrics.Record, evaluated: metrics.Record | None) -> list[tuple[str, ...]]:
    """A row per source and domain, as far as they are known."""
    step = "" if evaluated is None else f", step {evaluated[metrics.STEP]:,}"
    rows: list[tuple[str, ...]] = [("source or domain", "tokens", "share", "epochs", "loss", f"validation{step}", "bits/byte")]
    sources = {} if ledger is None else ledger["sources"]
    losses = metrics.parts(last, metrics.SOURCE_LOSS)
    domains = {} if evaluated is None else metrics.parts(evaluated, metrics.EVAL_DOMAIN_LOSS)
    bits = {} if evaluated is None else metrics.parts(evaluated, metrics.EVAL_DOMAIN_BPB)
    for name in dict.fromkeys([*sources, *domains]):
        source = sources.get(name)
        counted = ("", "", "")
        if source is not None:
            counted = (f"{source['tokens']:,}", _number(source.get("share")), _number(source.get("epochs")))
        rows.append((name, *counted, _number(losses.get(name)), _number(domains.get(name)), _number(bits.get(name))))
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
