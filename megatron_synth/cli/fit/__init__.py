"""`megatron-synth fit`: a law fitted to a table of runs, as law.json and a figure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_synth.cli.fit.jobs import (
    AUTO,
    FIGURE_FILE,
    ISOFLOP,
    LAW_FILE,
    SHARES,
    Job,
    about_job,
    fit_all,
    open_jobs,
    write_law,
)
from megatron_synth.cli.interrupts import interruptible
from megatron_synth.cli.options.types import count, count_or_zero, on_disk
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.core.files import write_json
from megatron_synth.core.log import say, table
from megatron_synth.study.fit.catalog import ALL_LAWS, AnyLaw, law_named
from megatron_synth.study.fit.diagnostics import Diagnostic, dependent_rows, seeds_together
from megatron_synth.study.fit.fit import DELTA, Fit, Progress, fit
from megatron_synth.study.fit.shares.laws import SHARE_LAWS
from megatron_synth.study.fit.table.row_filter import number
from megatron_synth.study.fit.table.runs_table import Table

RUN_COLUMNS = ("run", "run_id", "run_name", "run id", "run name")
SEED = "seed"
CLI_AGGREGATES = ("macro", "worst")
MOST_BOOTSTRAPS = 10**6


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    result = argparse.ArgumentParser(
        prog="megatron-synth fit",
        description="Fit a scaling law to a CSV of runs, one row per run.",
        epilog="laws: "
        + "; ".join(f"{law.name}: {law.formula}" for law in ALL_LAWS.values())
        + f"; {AUTO}: a law in the ratio, or none, chosen by cross-validation"
        + f"; {ISOFLOP}: how the best N and D grow with compute, by parabolas and by the joint law"
        + f"; {SHARES}: laws over the shares of several sources, chosen by cross-validation",
    )
    add = result.add_argument
    add("runs", type=Path, metavar="RUNS.csv", help="a table with a head")
    add("--law", required=True, metavar="LAW", help=" | ".join((*ALL_LAWS, AUTO, ISOFLOP, SHARES)))
    add("--holdout", metavar="RULE", help="predict these rows, do not fit them: 'tokens>100e9', 'n_params>2B and arm!=web'")
    add(
        "--drop-highest-loss",
        type=count_or_zero,
        default=0,
        metavar="K",
        help="leave out the K rows of highest loss; default %(default)s",
    )
    add("--where", metavar="RULE", help="use only these rows")
    add("--group", metavar="COLUMN", help="one fit per value of this column, such as arm")
    add("--cluster", metavar="COLUMN", help="rows of one value depend on each other, such as checkpoints of one run")
    add("--n-column", metavar="NAME", help="model sizes; guessed by default, as are the following")
    add("--tokens-column", metavar="NAME", help="training tokens")
    add(
        "--unique-column",
        metavar="NAME",
        help="different tokens among those trained; default tokens / epochs",
    )
    add("--flops-column", metavar="NAME", help="training FLOPs, from which tokens = FLOPs / (6 N)")
    add("--ratio-column", metavar="NAME", help="share of the synthetic source, 0 to 1 (mixture laws)")
    add(
        "--loss-column",
        action="append",
        default=[],
        metavar="NAME",
        help="losses; may have * and be given again: a fit for each",
    )
    add("--aggregate", choices=CLI_AGGREGATES, help="one fit, to this aggregate of the loss columns")
    add(
        "--fix",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="hold a parameter at a value, such as E=1.8; may be given again",
    )
    for name, what in (("share", "have one value for all groups"), ("pool", "are partially pooled over the groups")):
        add(f"--{name}", metavar="NAMES", help=f"parameters that {what}, such as E,beta; with --group")
    add("--delta", type=float, default=DELTA, help="of Huber's loss on log residuals; default %(default)s")
    add("--starts", type=count, metavar="N", help="only N of the law's grid of starts")
    add(
        "--bootstraps", type=count_or_zero, default=1000, metavar="N", help="for the intervals; 0 for none; default %(default)s"
    )
    add("--seed", type=count_or_zero, default=0, help="of the bootstraps; default %(default)s")
    shares = result.add_argument_group(f"with --law {SHARES}")
    shares.add_argument(
        "--sources",
        action="append",
        default=[],
        metavar="NAME",
        help="columns of the sources' shares, or of their tokens; may have * and be given again",
    )
    shares.add_argument("--losses", type=Path, metavar="LOSSES.csv", help="losses in a table of their own")
    shares.add_argument("--key", metavar="COLUMN", help="column that names a run in both; default run, index, id or name")
    shares.add_argument(
        "--bounds",
        action="append",
        default=[],
        metavar="SOURCE=LOW:HIGH",
        help="bounds of a share in the search for the lowest loss; may be given again",
    )
    shares.add_argument("--predict", type=Path, metavar="MIXTURES.csv", help="predict these mixtures, too: predictions.csv")
    shares.add_argument(
        "--measured",
        type=Path,
        metavar="LOSSES.csv",
        help="what the mixtures of --predict measured, at any size",
    )
    shares.add_argument("--method", default="auto", metavar="NAME", help=f"auto | {' | '.join(SHARE_LAWS)}")
    add("--out", type=on_disk, metavar="DIR", help="default fits/RUNS-LAW; with several fits, a folder in it for each")
    return result


def main(argv: list[str]) -> int:
    """Run the verb."""
    options = parser().parse_args(argv)
    written: list[Path] = []

    def kept() -> str:
        return f"{len(written)} of the fits are written, {written[-1]} the last" if written else "no file was written"

    with interruptible(lambda: f"{kept()}; the same command starts again"):
        return _main(options, argv, written)


def _main(options: argparse.Namespace, argv: list[str], written: list[Path]) -> int:
    if not 0 < options.delta < float("inf"):
        raise UserError(f"--delta: expected a number above 0, got {options.delta}")
    if options.bootstraps == 1 or options.bootstraps > MOST_BOOTSTRAPS:
        raise UserError(f"--bootstraps: expected 0, or a number from 2 to {MOST_BOOTSTRAPS}, got {options.bootstraps}")
    if options.law == SHARES:
        from megatron_synth.cli.fit.shares import run

        return run(options, argv, options.out or Path("fits") / f"{options.runs.stem}-{SHARES}")
    if options.law == AUTO:
        from megatron_synth.cli.fit.ratio import run as choose_law

        return choose_law(options, argv, options.out or Path("fits") / f"{options.runs.stem}-{AUTO}")
    if options.law == ISOFLOP:
        from megatron_synth.cli.fit.isoflop import run as fit_isoflop

        return fit_isoflop(options, argv, options.out or Path("fits") / f"{options.runs.stem}-{ISOFLOP}")
    law = law_named(options.law)
    jobs = open_jobs(options, law)
    out = options.out or Path("fits") / f"{options.runs.stem}-{law.name}"
    fitted = []
    for job, result in fit_all(jobs, lambda job: _fit(law, job, options)):
        if options.cluster is None:
            result = replace(result, warnings=(*result.warnings, *_dependent(job.rows, result)))
        lines = {
            "dropped_lines": [int(job.rows.lines[index]) for index in result.dropped],
            "repeated_lines": [int(job.rows.lines[index]) for index in result.repeated],
        }
        fitted.append((job, result, about_job(job, options, argv, **lines, cluster=options.cluster)))
    pooled = None
    if options.share or options.pool:
        from megatron_synth.cli.fit.arms import fit_pooled

        pooled = fit_pooled(law, jobs, options)  # before any file
    for job, result, about in fitted:
        folder = write_law(out, job.name, {**result.to_json(), **about}, _drawn(result, job.name or options.runs.stem))
        written.append(folder)
        say(describe(result, job.name))
        say(f"  -> {folder / LAW_FILE}, {folder / FIGURE_FILE}\n")
    if pooled is not None:
        from megatron_synth.cli.fit.arms import describe_pooled

        write_json(out / "pooled.json", {**pooled.to_json(), **fitted[0][2]})
        say(f"{describe_pooled(pooled)}\n  -> {out / 'pooled.json'}\n")
    return EXIT_OK


def _dependent(rows: Table, result: Fit) -> list[Diagnostic]:
    """The warnings that a column which names runs has a value more than once, and that runs of one seed are off together."""
    for column, texts in rows.texts.items():
        if column.lower() in RUN_COLUMNS and len(set(texts)) < len(texts):
            return [dependent_rows(column, len(texts), len(set(texts)))]
    return [one for column, texts in rows.texts.items() if column.lower() == SEED for one in seeds_together(result, texts)]


def _fit(law: AnyLaw, job: Job, options: argparse.Namespace) -> Fit:
    return fit(
        law,
        job.columns,
        job.loss,
        fixed=_fixed(options.fix),
        delta=options.delta,
        starts=options.starts,
        drop_highest_loss=options.drop_highest_loss,
        holdout=options.holdout,
        bootstraps=options.bootstraps,
        seed=options.seed,
        cluster=job.cluster,
        epochs=job.epochs,
        extra={name: values for name, values in job.extra.items() if name not in job.columns},
        progress=_progress() if sys.stderr.isatty() else None,
    )


def _fixed(given: Sequence[str]) -> dict[str, float]:
    """Values by parameter of `--fix NAME=VALUE`."""
    fixed = {}
    for text in given:
        name, _, value = text.partition("=")
        held = number(value)
        if held is None:
            raise UserError(f"--fix '{text}': expected a parameter and a number, such as E=1.8")
        fixed[name.strip()] = held
    return fixed


def _progress() -> Progress:
    def show(what: str, done: int, total: int) -> None:
        end = "\n" if done >= total else ""
        print(f"\r  {what} {done:,} of {total:,}", end=end, file=sys.stderr, flush=True)

    return show


def describe(result: Fit, name: str = "") -> str:
    """A fit for the console: parameters with intervals, what was left out, the hold-out, and the diagnostics."""
    lines = [f"{name + ': ' if name else ''}{result.law.name}: {result.law.formula}"]
    rows: list[tuple[str, ...]] = [("", "value", "std. error", "90 % interval", "95 % interval")]
    for parameter, value in result.params.items():
        if parameter not in result.law.parameters:
            rows.append((parameter, f"{value:.6g}", "held fixed", "", ""))
            continue
        bounds = [result.intervals[level][parameter] for level in result.intervals if parameter in result.intervals[level]]
        spans = [f"{low:.5g} to {high:.5g}" for low, high in bounds] or ["", ""]
        error = f"{result.standard_errors[parameter]:.3g}" if parameter in result.standard_errors else ""
        if parameter in result.undetermined:
            error = "not determined"
        error += " *" if parameter in result.tails else ""
        rows.append((parameter, f"{value:.6g}", error, *spans))
    lines.append(table(rows))
    if result.tails:
        lines.append("  * half the central 68 % of the bootstraps: a few draws far out would rule the standard deviation")
    lines.append(
        f"  objective {result.objective:.10f} on {len(result.points)} points ({len(result.dropped)} dropped), mean absolute "
        f"relative error {result.mean_absolute_relative_error:.3%}; {result.starts.at_best} of {result.starts.total} starts "
        "ended there"
    )
    if result.holdout is not None:
        held = result.holdout
        lines.append(
            f"  hold-out {held.rule}: {held.points} points, mean absolute relative error "
            f"{held.mean_absolute_relative_error:.3%}, worst {held.worst:.3%}"
        )
    lines += [f"  warning: {diagnostic}" for diagnostic in result.warnings]
    return "\n".join(lines)


def _drawn(result: Fit, title: str) -> Callable[[Path], None]:
    from megatron_synth.study.report.figures.fit import write_figure

    return lambda path: write_figure(result, path, title)
