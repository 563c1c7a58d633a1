"""`megatron-synth fit --law auto`: a law in the ratio, or none, chosen by how it predicts ratios that were left out."""

from __future__ import annotations

import argparse
import hashlib
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import megatron_synth.cli.fit as verb
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.core.files import write_json
from megatron_synth.core.log import human, say
from megatron_synth.core.log import table as text_table
from megatron_synth.study.fit.catalog import law_named
from megatron_synth.study.fit.laws import N_PARAMS, RATIO, TOKENS, Floats
from megatron_synth.study.fit.noise import best_measured, noise_floor
from megatron_synth.study.fit.ratio.choice import RatioChoice, choose
from megatron_synth.study.fit.table.runs_table import loss_columns, read_table
from megatron_synth.train.record.run_dir import git_state

LEVEL = 90.0


def run(options: argparse.Namespace, argv: list[str], out: Path) -> int:
    """Choose a law for every group and loss column, and write law.json and fit.png of each.

    Raises:
        UserError: an option is none of this law, or the table cannot be used.
    """
    for name in ("holdout", "starts", "cluster"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} is no option of --law auto, which leaves out ratios itself")
    if options.drop_highest_loss or options.fix:
        raise UserError("--drop-highest-loss and --fix are no options of --law auto; see --where")
    runs = read_table(options.runs)
    digest = hashlib.sha256(options.runs.read_bytes()).hexdigest()
    if options.where:
        runs = runs.where(options.where)
    groups = {"": runs} if options.group is None else runs.groups(options.group)
    jobs = verb.jobs_of(groups, loss_columns(runs, options.loss_column), options, law_named("mixture"))
    found: dict[str, tuple[RatioChoice, list[dict[str, Any]], dict[str, Any]]] = {}
    for name, rows, job in jobs:  # every choice before any file
        try:
            choice = choose(
                job["columns"], job["loss"], bootstraps=max(options.bootstraps, 2), seed=options.seed, epochs=job["epochs"]
            )
        except UserError as error:
            raise UserError(f"{name}: {error}" if name else str(error)) from None
        about = {
            "data": {
                "file": str(options.runs),
                "sha256": digest,
                "rows": len(rows),
                "where": options.where,
                "columns": {**job["read_from"], "loss": job["named"]},
            },
            "command": shlex.join(["megatron-synth", "fit", *argv]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {**verb.versions_used(), "git": git_state(Path(__file__).parent)},
        }
        found[name] = choice, cells_of(choice, job["columns"], job["loss"]), about
    for name, (choice, cells, about) in found.items():
        folder = out / verb.file_name(name)
        _write(folder, choice, cells, about, name)
        say(describe(choice, cells, name))
        say(f"  -> {folder}/law.json\n")
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


def _write(folder: Path, choice: RatioChoice, cells: list[dict[str, Any]], about: dict[str, Any], name: str) -> None:
    from megatron_synth.study.report.fit_figure import write_figure

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be made: {error.strerror}") from None
    content: dict[str, Any] = {"law": verb.AUTO, **choice.to_json(), "best_ratio": cells}
    chosen = choice.chosen
    if chosen is not None and chosen.fit is not None:
        write_figure(chosen.fit, folder / verb.FIGURE_FILE, name or Path(about["data"]["file"]).stem)
        content["fit"] = chosen.fit.to_json()
    elif chosen is not None and chosen.over_shares is not None:
        content["fit"] = chosen.over_shares.fitted.to_json()
    write_json(folder / verb.LAW_FILE, {**content, **about})
