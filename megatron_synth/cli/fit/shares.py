"""`megatron-synth fit --law shares`: laws over the shares of several sources."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.cli.fit.jobs import (
    FIGURE_FILE,
    LAW_FILE,
    SHARES,
    about_command,
    digest_of,
    one_loss,
    refuse_options,
    write_law,
)
from megatron_synth.cli.fit.predictions import FEWEST_RUNS, describe_scores, read_asked, write_predictions
from megatron_synth.cli.options.share_bounds import bounds_of
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.core.log import human, say
from megatron_synth.core.log import table as text_table
from megatron_synth.study.fit.fit import holdout_mask
from megatron_synth.study.fit.laws import N_PARAMS, TOKENS
from megatron_synth.study.fit.noise import noise_floor
from megatron_synth.study.fit.shares.fit import ShareFit, fit_shares
from megatron_synth.study.fit.shares.laws import AUTO, share_law_named
from megatron_synth.study.fit.shares.table import mixtures_of, read_mixtures
from megatron_synth.study.fit.shares.transfer import transfers
from megatron_synth.study.fit.shares.trees import BoostedTrees
from megatron_synth.study.fit.table.runs_table import FLOPS, Table, epochs_of, loss_columns
from megatron_synth.study.search.optimum import minimize, objective_of
from megatron_synth.study.search.space import make_space

SHOWN = 0.005
"""Sources that no mixture near the best has more of are left out on the console."""


def run(options: argparse.Namespace, argv: list[str], out: Path) -> int:
    """Fit what `options` of the verb `fit` say, and write a folder per loss column into `out`."""
    if not options.sources:
        raise UserError("--law shares needs --sources, the columns of the sources: --sources 'share/*'")
    if options.method != AUTO:
        share_law_named(options.method)
    refuse_options(options, SHARES, "starts", "ratio_column", "group", instead="see the options of shares in --help")
    refuse_options(options, SHARES, "drop_highest_loss", instead="it is robust against single runs; see --where")
    runs = read_mixtures(options.runs, options.losses, options.key)
    if runs.left_out:
        say(f"{runs.left_out} rows stand in {options.runs} or {options.losses} alone and are left out")
    if options.where:
        runs = runs.where(options.where)
    asked = {N_PARAMS: options.n_column, TOKENS: options.tokens_column, FLOPS: options.flops_column}
    points = mixtures_of(runs, options.sources, asked)
    table = runs.table
    targets = _targets(table, options)
    held = None if options.holdout is None else holdout_mask(options.holdout, table.values(), len(table))
    files = [options.runs, *([options.losses] if options.losses else [])]
    about = {
        "data": {
            "files": {str(path): digest_of(path) for path in files},
            "rows": len(table),
            "where": options.where,
        },
        **about_command(argv),
    }
    bounds = bounds_of(options.bounds)
    make_space(points.sources, bounds=bounds)  # what is wrong with them, before any fit
    asked_for = read_asked(options, points.sources)
    found: dict[str, ShareFit] = {}
    refused = None
    for name, losses in targets.items():  # every fit before any file
        try:
            found[name] = fit_shares(
                points,
                losses,
                law=options.method,
                holdout=held,
                rule=options.holdout or "",
                epochs=epochs_of(table),
                seed=options.seed,
                progress=_progress(name) if sys.stderr.isatty() else None,
            )
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    for name, result in found.items():
        lowest = None if result.no_law and options.method == AUTO else lowest_of(result, bounds, options.seed)
        moved = transfers(points, targets[name], seed=options.seed)
        content = {**about, "loss": name, "lowest": lowest, "rank_transfer": [one.to_json() for one in moved]}
        folder = write_law(out, name if len(found) > 1 else "", {**result.to_json(), **content}, _drawn(result, name))
        say(describe(result, name))
        for one in moved:
            smaller, larger = (", ".join(human(value) for value in cell.values()) for cell in (one.proxy, one.target))
            say(f"  order of mixtures from {smaller} to {larger}: rank correlation {one.rank}")
        if lowest is not None:
            say(describe_lowest(lowest))
        say(f"  -> {folder / LAW_FILE}, {FIGURE_FILE}\n")
    lawless = [name for name, result in found.items() if result.no_law and options.method == AUTO]
    if asked_for is not None and lawless:
        refused = (
            f"--predict: no law of {', '.join(lawless)} is better than a prediction without one, so nothing was predicted; "
            "--method NAME predicts by that law all the same"
        )
    elif asked_for is not None:
        write_predictions(out / "predictions.csv", asked_for, found)
        say(f"{len(asked_for.points)} mixtures predicted -> {out / 'predictions.csv'}")
        say(f"{describe_scores(asked_for, found)}\n")
    if len(found) > 1:
        say(summary(found))
    if refused is not None:
        raise UserError(refused)
    return EXIT_OK


def _targets(runs: Table, options: argparse.Namespace) -> dict[str, Any]:
    values = {name: runs.numbers(name) for name in loss_columns(runs, options.loss_column)}
    if not options.aggregate:
        return values
    return {options.aggregate: one_loss(values, options.aggregate)}


def lowest_of(result: ShareFit, bounds: Mapping[str, tuple[float, float]], seed: int) -> dict[str, Any]:
    """The mixture of lowest predicted loss, with no source above the most that was run, at the largest size and budget.

    Returns:
        As law.json holds it: `shares`, `loss`, the `interval` of a run at 90 %, `near` (what each share may be without a loss
        above the lowest by more than the `noise`), `at` (N and D), and the shares that are `at_bound`.
    """
    points = result.points
    highest = dict(zip(points.sources, map(float, points.shares.max(axis=0)), strict=True))
    at = {name: float(np.exp(logs.max())) for name, logs in points.scales.items()}
    floor = noise_floor(list(points.settings), result.loss)
    noise = result.chosen.error if floor is None else floor.relative
    caps = {name: (share, "the most that was run") for name, share in highest.items()}
    space = make_space(points.sources, bounds=bounds, caps=caps)
    smooth = result.law.name != BoostedTrees().name
    best = minimize(space, objective_of({"loss": result}, **at), noise=noise, smooth=smooth, seed=seed)  # type: ignore[arg-type]
    interval = None
    if len(result.loss) >= FEWEST_RUNS:
        interval = [float(bound[0]) for bound in result.predict_interval(points.at(best.shares, **at))]
    return {
        "shares": dict(zip(points.sources, map(float, best.shares), strict=True)),
        "loss": best.loss,
        "interval": interval,
        "noise": noise,
        "near": {name: list(ends) for name, ends in best.near.items()},
        "at": at,
        "at_bound": best.at_bound,
    }


def describe_lowest(lowest: Mapping[str, Any]) -> str:
    """It, for the console: sources with a share, and what their shares may be."""
    at = ", ".join(f"{name} {human(value)}" for name, value in lowest["at"].items())
    span = "" if lowest["interval"] is None else " ({:.4f} to {:.4f})".format(*lowest["interval"])
    lines = [
        f"  lowest predicted loss{f' at {at}' if at else ''}: {lowest['loss']:.4f}{span}; not told from it, within "
        f"{lowest['noise']:.2%}:"
    ]
    rows: list[tuple[str, ...]] = [("source", "share", "from", "to", "")]
    for name, share in lowest["shares"].items():
        low, high = lowest["near"][name]
        if high >= SHOWN:
            rows.append((name, f"{share:.3f}", f"{low:.3f}", f"{high:.3f}", lowest["at_bound"].get(name, "")))
    return "\n".join([*lines, text_table(rows)])


def describe(result: ShareFit, name: str) -> str:
    """A fit for the console: every law with its error, the one that was chosen, the hold-out, and the doubts."""
    rows: list[tuple[str, ...]] = [("law", "error of unseen mixtures", "rank correlation", "parameters")]
    for law, one in sorted(result.compared.items(), key=lambda item: item[1].error):
        count = len(one.law.parameters(result.points))
        mark = "*" if law == result.law.name and not result.no_law else " "
        rows.append((f"{mark} {law}", f"{one.error:.2%}", _rank(one.rank), str(count) if count else ""))
    rows += [(f"  {plain}", f"{error:.2%}", "", "") for plain, error in result.baselines.items()]
    lines = [
        f"{name}: {len(result.loss)} runs of {len(result.points.sources)} sources; cross-validated in "
        f"{len(result.chosen.folds)} folds",
        text_table(rows),
        f"  no law: {result.no_law}" if result.no_law else f"  * {result.law.name}: {result.law.formula}",
    ]
    lines += [f"  {law}: not tried, {why}" for law, why in result.skipped.items()]
    held = result.holdout
    if held is not None:
        span = "" if held.rank_interval is None else " [{:.3f}, {:.3f}]".format(*held.rank_interval)
        inside = "" if held.covered is None else f", {held.covered} of {held.points} in their 90 % intervals"
        lines.append(
            f"  hold-out {held.rule}: {held.points} runs, mean absolute relative error "
            f"{held.mean_absolute_relative_error:.2%}, worst {held.worst:.2%}, rank correlation "
            f"{_rank(held.rank)}{span}{inside}"
        )
    return "\n".join([*lines, *(f"  warning: {caveat}" for caveat in result.warnings)])


def summary(found: dict[str, ShareFit]) -> str:
    """A line per loss, and their means."""
    rows: list[tuple[str, ...]] = [("loss", "law", "error", "rank correlation")]
    for name, result in found.items():
        rows.append(
            (
                name,
                f"no law ({result.law.name})" if result.no_law else result.law.name,
                f"{result.chosen.error:.2%}",
                _rank(result.chosen.rank),
            )
        )
    ranks = [result.chosen.rank for result in found.values() if result.chosen.rank is not None]
    mean = float(np.mean([result.chosen.error for result in found.values()]))
    rows.append(("mean", "", f"{mean:.2%}", _rank(float(np.mean(ranks)) if ranks else None)))
    return text_table(rows)


def _rank(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _progress(name: str) -> Any:
    def show(law: str) -> None:
        print(f"\r  {name}: {law:<20}", end="\r", file=sys.stderr, flush=True)

    return show


def _drawn(result: ShareFit, name: str) -> Callable[[Path], None]:
    from megatron_synth.study.report.figures.shares import write_shares_figure

    return lambda path: write_shares_figure(result, path, name)
