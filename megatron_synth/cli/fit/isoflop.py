"""`megatron-synth fit --law isoflop`: how the best size and the best number of tokens grow with compute, by two methods."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_synth.cli.fit.jobs import ISOFLOP, LAW_FILE, Job, about_job, fit_all, open_jobs, refuse_options, write_law
from megatron_synth.config.errors import EXIT_OK
from megatron_synth.core.log import human, say
from megatron_synth.core.log import table as text_table
from megatron_synth.study.fit.catalog import law_named
from megatron_synth.study.fit.compute.isoflop import Exponent, Isoflop, isoflop, joint_exponent
from megatron_synth.study.fit.fit import Fit, fit


def run(options: argparse.Namespace, argv: list[str], out: Path) -> int:
    """Fit every group and loss column by parabolas and by the joint law, and write law.json of each.

    Raises:
        UserError: the table has too few sizes at one compute, or cannot be read.
    """
    refuse_options(options, ISOFLOP, "holdout", "cluster", "fix", "drop_highest_loss", instead="see --law joint, and --where")

    def both(job: Job) -> tuple[Isoflop, Exponent, Fit]:
        sizes, tokens, draws = job.columns["n_params"], job.columns["tokens"], max(options.bootstraps, 100)
        parabolas = isoflop(sizes, tokens, job.loss, draws=draws, seed=options.seed)
        settings = {name: getattr(options, name) for name in ("bootstraps", "seed", "starts", "delta")}
        joint = fit("joint", job.columns, job.loss, **settings)
        return parabolas, joint_exponent(joint), joint

    for job, (parabolas, exponent, joint) in fit_all(open_jobs(options, law_named("joint")), both):
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
        folder = write_law(out, job.name, {"law": ISOFLOP, **content, **about_job(job, options, argv)})
        say(describe(parabolas, exponent, joint, job.name))
        say(f"  -> {folder / LAW_FILE}\n")
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
