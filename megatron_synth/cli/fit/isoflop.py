"""`megatron-synth fit --law isoflop`: how the best size and the best number of tokens grow with compute, by two methods."""

from __future__ import annotations

import argparse
import hashlib
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import megatron_synth.cli.fit as verb
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.core.files import write_json
from megatron_synth.core.log import human, say
from megatron_synth.core.log import table as text_table
from megatron_synth.study.fit.catalog import law_named
from megatron_synth.study.fit.compute.isoflop import Exponent, Isoflop, isoflop, joint_exponent
from megatron_synth.study.fit.fit import Fit, fit
from megatron_synth.study.fit.table.runs_table import loss_columns, read_table
from megatron_synth.train.record.run_dir import git_state


def run(options: argparse.Namespace, argv: list[str], out: Path) -> int:
    """Fit every group and loss column by parabolas and by the joint law, and write law.json of each.

    Raises:
        UserError: the table has too few sizes at one compute, or cannot be read.
    """
    for name in ("holdout", "cluster"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} is no option of --law isoflop; see --law joint")
    if options.fix or options.drop_highest_loss:
        raise UserError("--fix and --drop-highest-loss are no options of --law isoflop; see --where")
    runs = read_table(options.runs)
    digest = hashlib.sha256(options.runs.read_bytes()).hexdigest()
    if options.where:
        runs = runs.where(options.where)
    groups = {"": runs} if options.group is None else runs.groups(options.group)
    jobs = verb.jobs_of(groups, loss_columns(runs, options.loss_column), options, law_named("joint"))
    found: dict[str, tuple[Isoflop, Exponent, Fit, dict[str, Any]]] = {}
    for name, rows, job in jobs:
        columns, loss = job["columns"], job["loss"]
        try:
            parabolas = isoflop(
                columns["n_params"], columns["tokens"], loss, draws=max(options.bootstraps, 100), seed=options.seed
            )
            joint = fit(
                "joint",
                columns,
                loss,
                bootstraps=options.bootstraps,
                seed=options.seed,
                starts=options.starts,
                delta=options.delta,
            )
            exponent = joint_exponent(joint)
        except UserError as error:
            raise UserError(f"{name}: {error}" if name else str(error)) from None
        about = {
            "data": {"file": str(options.runs), "sha256": digest, "rows": len(rows), "columns": job["read_from"]},
            "command": shlex.join(["megatron-synth", "fit", *argv]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {**verb.versions_used(), "git": git_state(Path(__file__).parent)},
        }
        found[name] = parabolas, exponent, joint, about
    for name, (parabolas, exponent, joint, about) in found.items():
        folder = out / verb.file_name(name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: {folder} cannot be made: {error.strerror}") from None
        curves = [
            {**{key: value for key, value in curve.__dict__.items() if key != "runs"}, "runs": len(curve.runs)}
            for curve in parabolas.curves
        ]
        warnings = [{"code": one.code, "message": one.message} for one in (*parabolas.warnings, *joint.warnings)]
        content = {
            "curves": curves,
            "parabolas": parabolas.exponent.to_json(),
            "joint": exponent.to_json(),
            "warnings": warnings,
        }
        write_json(folder / verb.LAW_FILE, {"law": verb.ISOFLOP, **content, **about})
        say(describe(parabolas, exponent, joint, name))
        say(f"  -> {folder / verb.LAW_FILE}\n")
    return EXIT_OK


def describe(parabolas: Isoflop, exponent: Exponent, joint: Fit, name: str) -> str:
    """Both methods for the console."""
    rows: list[tuple[str, ...]] = [("compute", "runs", "best N", "90 % interval", "best D", "")]
    for curve in parabolas.curves:
        low, high = curve.interval
        told = "" if curve.used else "minimum outside"
        span = f"{human(low)} to {human(high)}" if curve.used else ""
        size, budget = (human(value) if curve.used else "" for value in (curve.n_params, curve.tokens))
        rows.append((f"{curve.flops:.3g}", str(len(curve.runs)), size, span, budget, told))
    lines = [f"{name + ': ' if name else ''}the best size and tokens for a compute C = 6 N D", text_table(rows)]
    rows = [("method", "N* grows as C^", "90 % interval", "D* grows as C^", "90 % interval")]
    for one in (parabolas.exponent, exponent):
        spans = ["{:.3f} to {:.3f}".format(*ends["90"]) for ends in (one.n_interval, one.d_interval)]
        rows.append((one.method, f"{one.n_params:.3f}", spans[0], f"{one.tokens:.3f}", spans[1]))
    lines.append(text_table(rows))
    lines += [f"  warning: {doubt}" for doubt in parabolas.warnings]
    lines += [f"  warning of the joint law: {doubt}" for doubt in joint.warnings]
    return "\n".join(lines)
