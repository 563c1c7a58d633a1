"""The mixtures to run next in a study: caps from its sources, what was measured so far, and new arms in a study file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_atomic
from megatron_synth.core.log import compact, human, table
from megatron_synth.data.mixing.mixture import windows_in
from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.noise import noise_floor
from megatron_synth.study.fit.shares.fit import ShareFit, fit_shares
from megatron_synth.study.fit.shares.parametric import FittedParametric
from megatron_synth.study.fit.shares.points import Mixtures
from megatron_synth.study.fit.table.domains import aggregate
from megatron_synth.study.plan.costs import Sources
from megatron_synth.study.plan.runs import Run
from megatron_synth.study.plan.study_file import Study
from megatron_synth.study.report.collect import Row
from megatron_synth.study.search.optimum import Optimum, minimize, objective_of
from megatron_synth.study.search.sequential import DESIGNS, d_optimal, expected_improvement
from megatron_synth.study.search.space import Space, make_space, space_filling

PARTS = 1000
"""Proposed shares are whole thousandths, so that ratios are exact and sum to 1."""
FEWEST = 5
"""Measured mixtures from which a law is fitted."""


@dataclass(frozen=True)
class Measured:
    """The runs of one size and budget.

    points: mixtures [M]. loss: [M] the target. arms: [M].
    """

    size: str
    tokens: int
    points: Mixtures
    loss: Floats
    arms: tuple[str, ...]


@dataclass(frozen=True)
class Proposal:
    """New arms.

    arms: exact shares by source, by name of the arm.
    design: how they were chosen. measured: what they follow; None where nothing was measured.
    best: the mixture of lowest predicted loss. fit: the law behind it. noise: relative, behind its neighbors.
    """

    space: Space
    arms: dict[str, dict[str, Fraction]]
    design: str
    measured: Measured | None
    best: Optimum | None = None
    fit: ShareFit | None = None
    noise: float = 0.0


def space_of(
    study: Study, runs: Sequence[Run], sources: Sources, bounds: Mapping[str, tuple[float, float]], tokens: float | None
) -> Space:
    """The mixtures that the sources of a study allow at its largest budget, or at `tokens`.

    Raises:
        UserError: no mixture is possible.
    """
    budget = float(max(run.tokens for run in runs)) if tokens is None else tokens
    length = runs[0].config.window_length
    caps: dict[str, tuple[float, str]] = {}
    for name, entry in study.sources.items():
        opened = sources.opened.get(name)
        sizes = [size for size in (opened.num_tokens if opened else entry.tokens, entry.unique_tokens) if size is not None]
        if not sizes or not np.isfinite(entry.max_epochs):
            continue
        windows = windows_in(int(min(sizes)), length, shifted=entry.shift_windows)
        most = math.floor(entry.max_epochs * windows) * length / budget
        if most < 1:
            told = f"has {human(min(sizes))} tokens, {entry.max_epochs:g} epochs of which are {most:.1%} of {human(budget)}"
            caps[name] = (most, told)
    return make_space(tuple(study.sources), bounds=bounds, caps=caps)


def measured_of(
    study: Study, rows: Sequence[Row], target: str, *, size: str | None = None, tokens: int | None = None
) -> Measured:
    """The runs of one size and budget: those asked for, else where most mixtures were run, of these the largest.

    target: `loss` (the study's aggregate), `worst`, a domain, or weights such as `web=0.7,code=0.3`.

    Raises:
        UserError: there are none, or the target names no domain.
    """
    cells: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if (size is None or row.size == size) and (tokens is None or row.budget == tokens):
            cells.setdefault((row.size, row.budget), []).append(row)
    if not cells:
        raise UserError(f"no run of size {size or 'any'} and {'any budget' if tokens is None else human(tokens)} is finished")
    (name, budget), chosen = max(
        cells.items(), key=lambda cell: (len({row.arm for row in cell[1]}), cell[1][0].n_params * cell[1][0].tokens)
    )
    order = list(study.sources)
    shares = np.array([[float(_share(study, row.arm, source)) for source in order] for row in chosen])
    losses = {domain: np.array([row.domains[domain] for row in chosen]) for domain in chosen[0].domains}
    return Measured(
        name, budget, Mixtures(tuple(order), shares), _target(chosen, losses, target), tuple(row.arm for row in chosen)
    )


def _share(study: Study, arm: str, source: str) -> Fraction:
    if arm not in study.arms:
        raise UserError(f"the runs have an arm '{arm}' that is not in the study")
    share = study.arms[arm].get(source)
    return Fraction(0) if share is None else share.ratio


def _target(rows: Sequence[Row], losses: Mapping[str, Floats], target: str) -> Floats:
    if target == "loss":
        return np.array([row.loss for row in rows])
    if target == "worst":
        return aggregate(losses, "worst")
    weights: dict[str, float] = {}
    for part in target.split(","):
        name, _, value = part.partition("=")
        try:
            weights[name.strip()] = float(value or 1)
        except ValueError:
            raise UserError(f"--target '{target}': '{value}' is no weight") from None
    unknown = [name for name in weights if name not in losses]
    if unknown:
        raise UserError(f"--target: no validation domain '{unknown[0]}'; one of: loss, worst, {', '.join(losses)}")
    if min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise UserError(f"--target '{target}': weights are 0 or more, and one is above 0")
    return np.asarray(sum(weight * losses[name] for name, weight in weights.items()) / sum(weights.values()))


def propose(
    study: Study, space: Space, count: int, *, design: str | None = None, measured: Measured | None = None, seed: int = 0
) -> Proposal:
    """Choose new arms.

    Args:
        study: with the arms that there are.
        space: the mixtures that are possible.
        count: how many.
        design: one of `DESIGNS`; default expected improvement where enough is measured, else space-filling.
        measured: runs to follow.
        seed: of candidates.

    Raises:
        UserError: the design needs more runs than there are.
    """
    if design is not None and design not in DESIGNS:
        raise UserError(f"unknown design '{design}'; one of: {', '.join(DESIGNS)}")
    order = list(study.sources)
    taken = np.array([[float(_share(study, arm, source)) for source in order] for arm in study.arms])
    mixtures = 0 if measured is None else len(np.unique(np.round(measured.points.shares, 9), axis=0))
    chosen = design or ("expected-improvement" if mixtures >= FEWEST else "space-filling")
    if chosen == "expected-improvement" and mixtures < FEWEST:
        raise UserError(f"design expected-improvement needs {FEWEST} measured mixtures at one size and budget, got {mixtures}")
    best, fit, noise = None, None, 0.0
    if measured is not None and mixtures >= FEWEST:
        fit = fit_shares(measured.points, measured.loss, law="gaussian-process", seed=seed)
        floor = noise_floor(list(measured.points.settings), measured.loss)
        noise = fit.chosen.error if floor is None else floor.relative
        best = minimize(space, objective_of({"target": fit}), noise=noise, seed=seed)
    if chosen == "expected-improvement":
        assert measured is not None
        shares = expected_improvement(space, measured.points, measured.loss, count, seed=seed)
    elif chosen == "d-optimal":
        fitted = None
        if measured is not None and mixtures >= FEWEST:
            fitted = fit_shares(measured.points, measured.loss, law="exponential", seed=seed).fitted
        assert fitted is None or isinstance(fitted, FittedParametric)
        shares = d_optimal(space, count, taken=taken, fitted=fitted, seed=seed)
    else:
        shares = space_filling(space, count, taken=taken[space.contains(taken)], seed=seed)
    return Proposal(space, _named(study, space, shares), chosen, measured, best, fit, noise)


def _named(study: Study, space: Space, shares: Floats) -> dict[str, dict[str, Fraction]]:
    """Exact arms with names that are free; mixtures that the study has already are left out."""
    known = {tuple(_share(study, arm, source) for source in study.sources) for arm in study.arms}
    number = 1
    result: dict[str, dict[str, Fraction]] = {}
    for row in shares:
        exact = rounded(space, row)
        if exact in known:
            continue
        known.add(exact)
        while f"mix-{number:03d}" in study.arms or f"mix-{number:03d}" in result:
            number += 1
        result[f"mix-{number:03d}"] = {source: share for source, share in zip(space.sources, exact, strict=True) if share}
    if not result:
        raise UserError("every mixture that could be proposed is an arm of the study already")
    return result


def rounded(space: Space, shares: Floats) -> tuple[Fraction, ...]:
    """A mixture [K] in whole thousandths that sum to 1, inside the bounds; by largest remainders."""
    low = np.ceil(space.lower * PARTS - 1e-9).astype(int)
    high = np.floor(space.upper * PARTS + 1e-9).astype(int)
    if low.sum() > PARTS or high.sum() < PARTS:
        raise UserError(f"bounds leave no mixture in whole parts of {PARTS}; widen them")
    parts = np.clip(np.floor(shares * PARTS + 1e-9).astype(int), low, high)
    remainders = shares * PARTS - parts
    while parts.sum() != PARTS:
        missing = PARTS - parts.sum()
        open_ = parts < high if missing > 0 else parts > low
        place = int(np.where(open_, remainders * np.sign(missing), -np.inf).argmax())
        parts[place] += np.sign(missing)
        remainders[place] -= np.sign(missing)
    return tuple(Fraction(int(part), PARTS) for part in parts)


def study_text(base: Path, proposal: Proposal, command: str) -> str:
    """A study file: the given one with the new arms."""
    lines = [f"# {len(proposal.arms)} arms proposed ({proposal.design}) by", f"#   {command}", f"base: {base}", "", "arms:"]
    for name, arm in proposal.arms.items():
        shares = ", ".join(f"{source}: {float(share):g}" for source, share in arm.items())
        lines.append(f"  {name}: {{{shares}}}")
    return "\n".join(lines) + "\n"


def write_study(path: Path, base: Path, proposal: Proposal, command: str) -> None:
    """Write the study file with the new arms; it is never written over another.

    Raises:
        UserError: there is one, or it cannot be written.
    """
    if path.exists():
        raise UserError(f"{path}: is there already; give another name with --out")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    try:
        beside = Path(os.path.relpath(base.resolve(), path.parent.resolve()))
        write_atomic(path, study_text(beside, proposal, command))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def proposal_text(proposal: Proposal, budget: float) -> str:
    """A proposal for the console."""
    space = proposal.space
    lines = [f"shares that are possible at {human(budget)} tokens"]
    rows: list[tuple[str, ...]] = [("source", "from", "to", "because")]
    for place, name in enumerate(space.sources):
        rows.append((name, f"{space.lower[place]:.3f}", f"{space.upper[place]:.3f}", space.why.get(name, "")))
    lines += [table(rows, words=True), ""]
    predict = None
    measured, best, fit = proposal.measured, proposal.best, proposal.fit
    if measured is not None and best is not None and fit is not None:
        predict = objective_of({"target": fit})
        lowest = int(measured.loss.argmin())
        rank = "n/a" if fit.chosen.rank is None else f"{fit.chosen.rank:.2f}"
        lines += [
            f"measured: {len(measured.loss)} runs of size {measured.size} at {compact(measured.tokens)} tokens; unseen "
            f"mixtures are missed by {fit.chosen.error:.2%}, rank correlation {rank}",
            f"lowest measured: {measured.arms[lowest]}, {measured.loss[lowest]:.4f}",
            f"lowest predicted: {best.loss:.4f} at {_mixture(space, best.shares)}",
            f"not told from it, within {proposal.noise:.2%}: "
            + ", ".join(f"{name} {low:.2f} to {high:.2f}" for name, (low, high) in best.near.items()),
            *(f"{name} is at its highest share: {why}" for name, why in best.at_bound.items()),
            *(f"warning: {doubt}" for doubt in fit.warnings),
            "",
        ]
    rows = [("arm", *space.sources, *(["predicted"] if predict else []))]
    for name, arm in proposal.arms.items():
        shares = [float(arm.get(source, 0)) for source in space.sources]
        predicted = [f"{predict(np.array([shares]))[0]:.4f}"] if predict else []
        rows.append((name, *(f"{share:.3f}" for share in shares), *predicted))
    lines += [f"proposed ({proposal.design})", table(rows)]
    return "\n".join(lines)


def _mixture(space: Space, shares: Floats) -> str:
    return ", ".join(f"{name} {share:.3f}" for name, share in zip(space.sources, shares, strict=True) if share >= 5e-4)
