"""`--share` and `--pool` of `megatron-synth fit`: the laws of all groups as one fit."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_synth.cli.fit.jobs import Job
from megatron_synth.config.errors import UserError
from megatron_synth.core.log import table
from megatron_synth.study.fit.arms.pooled import Pooled, fit_arms
from megatron_synth.study.fit.catalog import AnyLaw


def fit_pooled(law: AnyLaw, jobs: Sequence[Job], options: argparse.Namespace) -> Pooled:
    """The laws of all groups, with the parameters shared and pooled that `options` name.

    Raises:
        UserError: there are no groups, several losses, or options that go with single fits alone.
    """
    if options.group is None:
        raise UserError("--share and --pool need --group, the column of the arms")
    if len({job.name.split("/")[0] for job in jobs}) < len(jobs):
        raise UserError("--share and --pool take one loss: give one --loss-column, or --aggregate")
    for name in ("holdout", "cluster"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} does not go with --share and --pool; choose rows with --where")
    if options.fix or options.drop_highest_loss:
        raise UserError("--fix and --drop-highest-loss do not go with --share and --pool")
    shared, pooled = _names(options.share), _names(options.pool)
    columns = {job.name: job.columns for job in jobs}
    loss = {job.name: job.loss for job in jobs}
    return fit_arms(law.name, columns, loss, shared=shared, pooled=pooled)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def describe_pooled(found: Pooled) -> str:
    """It, for the console."""
    rows: list[tuple[str, ...]] = [("arm", "parameter", "value", "90 % interval", "alone")]
    for arm, parameters in found.arms.items():
        for name, one in parameters.items():
            low, high = one.interval
            rows.append((arm, name, f"{one.value:.5g}", f"{low:.5g} to {high:.5g}", f"{one.own:.5g}"))
    lines = [f"all groups at once, law {found.law.name}; one scatter of {found.scatter:.2%}", table(rows)]
    for name, test in found.tests.items():
        said = "they do not" if test.differ else "nothing says that they do not"
        lines.append(
            f"  do groups share {name}? {said} (F{test.freedom}, p = {test.p:.2g}); the shared one is {test.value:.4g}"
        )
    for name, tau in found.tau.items():
        lines.append(f"  {name} differs between groups by {tau:.2g} (standard deviation, of logarithms for factors)")
    if found.tau:
        lines.append("  priors: their mean is free, that deviation half-normal with scale 0.1")
    return "\n".join(lines)
