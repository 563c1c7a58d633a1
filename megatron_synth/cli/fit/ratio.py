"""`megatron-synth fit --law auto`: a law in the ratio, or none, chosen by how it predicts ratios that were left out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.cli.fit.jobs import AUTO, LAW_FILE, Job, about_job, fit_all, open_jobs, refuse_options, write_law
from megatron_synth.config.errors import EXIT_OK
from megatron_synth.core.log import human, say
from megatron_synth.core.log import table as text_table
from megatron_synth.study.fit.catalog import law_named
from megatron_synth.study.fit.laws import N_PARAMS, RATIO, TOKENS, Floats
from megatron_synth.study.fit.noise import best_measured, noise_floor
from megatron_synth.study.fit.ratio.choice import RatioChoice, choose

LEVEL = 90.0


def run(options: argparse.Namespace, argv: list[str], out: Path) -> int:
    """Choose a law for every group and loss column, and write law.json and fit.png of each.

    Raises:
        UserError: an option is none of this law, or the table cannot be used.
    """
    refused = ("holdout", "starts", "cluster", "fix", "drop_highest_loss")
    refuse_options(options, AUTO, *refused, instead="it leaves out ratios itself; for rows see --where")

    def chosen(job: Job) -> RatioChoice:
        draws = max(options.bootstraps, 2)
        return choose(job.columns, job.loss, bootstraps=draws, seed=options.seed, epochs=job.epochs)

    for job, choice in fit_all(open_jobs(options, law_named("mixture")), chosen):
        cells = cells_of(choice, job.columns, job.loss)
        folder = _write(out, job, choice, cells, about_job(job, options, argv))
        say(describe(choice, cells, job.name))
        say(f"  -> {folder / LAW_FILE}\n")
    return EXIT_OK


def cells_of(choice: RatioChoice, columns: dict[str, Floats], loss: Floats) -> list[dict[str, Any]]:
    """The best ratio at every size and budget: of the runs, between which ratios it lies, and by the law."""
    from megatron_synth.study.report.ratio import best_ratio_by, bracket

    names = [name for name in (N_PARAMS, TOKENS) if name in columns]
    ranges = {name: (float(columns[name].min()), float(columns[name].max())) for name in names}
    keys = np.stack([columns[name] for name in names], axis=1) if names else np.zeros((len(loss), 0))
    noise = noise_floor(list(map(tuple, np.column_stack([keys, columns[RATIO]]))), loss)
    cells = []
    for key in np.unique(keys, axis=0) if names else np.zeros((1, 0)):
        here = (keys == key).all(axis=1)
        ratios, losses = columns[RATIO][here], loss[here]
        tested = tuple(map(float, np.unique(ratios)))
        if len(tested) < 2:
            continue
        means = [float(losses[ratios == ratio].mean()) for ratio in tested]
        lowest = tested[int(np.argmin(means))]
        good = (lowest,) if noise is None else best_measured(ratios, losses, noise, level=LEVEL).band
        point = dict(zip(names, map(float, key), strict=True))
        answer = best_ratio_by(choice, point, ranges, noise=noise, level=LEVEL)
        law = None if answer is None else {"ratio": answer.ratio, "loss": answer.loss, "interval": list(answer.interval)}
        cells.append({"at": point, "best_run": lowest, "as_good": list(good), "between": bracket(tested, good), "by_law": law})
    return cells


def describe(choice: RatioChoice, cells: list[dict[str, Any]], name: str) -> str:
    """A choice for the console."""
    rows: list[tuple[str, ...]] = [("law", "error at ratios left out", "formula")]
    for law, one in sorted(choice.candidates.items(), key=lambda item: item[1].error):
        mark = "*" if choice.chosen is one else "=" if law in choice.near else " "
        rows.append((f"{mark} {law}", f"{one.error:.2%}", ", ".join(one.doubts) or one.formula))
    rows += [(f"  {plain}", f"{error:.2%}", "no law") for plain, error in choice.baselines.items()]
    lines = [f"{name + ': ' if name else ''}{choice.told()}", text_table(rows, words=True)]
    lines += [f"  {law}: not tried, {why}" for law, why in choice.skipped.items()]
    lines.append("  best ratio, by runs; where it lies if the loss has one minimum; and by the law")
    rows = [("N", "D", "best run", "between", f"by the law [{LEVEL:.0f} %]")]
    for cell in cells:
        at, law = cell["at"], cell["by_law"]
        said = "no law" if law is None else f"{law['ratio']:.2f} [{law['interval'][0]:.2f}, {law['interval'][1]:.2f}]"
        size, budget = (human(at[key]) if key in at else "" for key in (N_PARAMS, TOKENS))
        rows.append((size, budget, f"{cell['best_run']:.3g}", "{:.3g} to {:.3g}".format(*cell["between"]), said))
    return "\n".join([*lines, text_table(rows)])


def _write(out: Path, job: Job, choice: RatioChoice, cells: list[dict[str, Any]], about: dict[str, Any]) -> Path:
    from megatron_synth.study.report.figures.fit import write_figure

    content: dict[str, Any] = {"law": AUTO, **choice.to_json(), "best_ratio": cells}
    draw, chosen = None, choice.chosen
    if chosen is not None and chosen.fit is not None:
        fitted = chosen.fit
        title = job.name or Path(about["data"]["file"]).stem
        content["fit"] = fitted.to_json()
        draw = lambda path: write_figure(fitted, path, title)  # noqa: E731
    elif chosen is not None and chosen.over_shares is not None:
        content["fit"] = chosen.over_shares.fitted.to_json()
    return write_law(out, job.name, {**content, **about}, draw)
