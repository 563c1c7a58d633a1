"""`megatron-synth bench report FILES...`: tables of what `--json` wrote, and a verdict against a baseline."""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

from megatron_synth.bench.report import MALFORMED, compare, content, draw, read, table_rows, verdict_rows
from megatron_synth.bench.tables import markdown_table
from megatron_synth.bench.train.ablations_table import render as render_ablations
from megatron_synth.cli.options.types import on_disk
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.core.files import write_atomic
from megatron_synth.core.log import say

EXIT_SLOWER = 1


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth bench report", description="Tables of `bench train --json` files, and a check against a baseline."
    )
    parser.add_argument("files", nargs="+", type=Path, help="what --json wrote: bench train, a sweep, bench gpu")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="exit with 1 when a point of it is slower here")
    parser.add_argument("--tolerance", type=float, default=0.03, help="slowdown of the median that is let pass; default 0.03")
    parser.add_argument("--csv", type=on_disk, metavar="FILE", help="write the table as CSV")
    parser.add_argument("--png", type=on_disk, metavar="FILE", help="draw tokens/s per point")
    return parser


def main(argv: list[str]) -> int:
    """Tables on the console or in files; exit code 1 when something became slower."""
    options = parser().parse_args(argv)
    for what, file in (("--csv", options.csv), ("--png", options.png)):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{what}: {file.parent} is not a folder")
    if any("loaders" in content(file) for file in options.files):
        raise UserError("files of `python -m benchmarks loader` are read by `python -m benchmarks loader-report`")
    ablations = content(options.files[0])
    if "levers" in ablations:
        if len(options.files) > 1 or options.baseline or options.csv or options.png:
            raise UserError("a file of --ablations is a table of its own: without other files, --baseline, --csv and --png")
        try:
            shown = render_ablations(ablations)
        except MALFORMED as error:
            expected = "expected what `bench train --ablations --json` writes"
            raise UserError(f"{options.files[0]}: {expected}: {type(error).__name__}: {error}") from None
        say(shown)
        return EXIT_OK
    records = [record for file in options.files for record in read(file)]
    verdicts = compare(records, read(options.baseline), options.tolerance) if options.baseline else []
    rows = table_rows(records)
    say("\n".join(markdown_table(rows)))
    if options.csv is not None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_atomic(options.csv, text.getvalue())
    if options.png is not None:
        draw(records, options.png)
    if options.baseline is None:
        return EXIT_OK
    if not verdicts:
        raise UserError(f"--baseline {options.baseline}: no point of it has the model, settings and device of one here")
    say("\n" + "\n".join(markdown_table(verdict_rows(verdicts))))
    return EXIT_SLOWER if any(verdict.slower for verdict in verdicts) else EXIT_OK
