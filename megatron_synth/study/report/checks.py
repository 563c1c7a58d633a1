"""What speaks for and against carrying a study's answers to a larger scale: decisions, forecasts, rates, published answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_synth.core.log import compact, human
from megatron_synth.study.execute.folder import Folder
from megatron_synth.study.fit.diagnostics import Diagnostic
from megatron_synth.study.fit.noise import noise_floor
from megatron_synth.study.forecast.decisions import Decision, decisions, too_small
from megatron_synth.study.forecast.score import summary
from megatron_synth.study.plan.references import Reference, references
from megatron_synth.study.plan.study_file import Study
from megatron_synth.study.rates.mis_set import EXPONENT, Bend, Off, bends, fixed_rates, off_rates
from megatron_synth.study.rates.rule import Point, Ratio, Rule, fit_rule
from megatron_synth.study.report.analysis import Analysis
from megatron_synth.study.report.collect import Row
from megatron_synth.study.report.forecasts import Scored, scored

_ENOUGH_FREEDOM = 4
MIS_SET, DEPENDENT = "rate-mis-set", "dependent-rows"


@dataclass(frozen=True)
class Rated:
    """What is known of the learning rates.

    rule: fitted to the sweep; None without one. points: the runs that it was fitted to, among others.
    fixed: of each size with one rate over a wide span of budgets the factor by which it is off at the ends, about.
    """

    rule: Rule | None = None
    points: tuple[Point, ...] = ()
    off: tuple[Off, ...] = ()
    bends: tuple[Bend, ...] = ()
    fixed: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Beside:
    """A published answer beside the study's own: family, the answer, and the best share that was run at most compute."""

    family: str
    reference: Reference
    size: str
    tokens: int
    share: float
    band: tuple[float, ...]


@dataclass(frozen=True)
class Checks:
    """All of it."""

    decisions: tuple[Decision, ...] = ()
    small: str = ""
    """A warning that the models are too small to rank mixtures; empty where they are not."""
    forecasts: Scored = field(default_factory=Scored)
    rates: Rated = field(default_factory=Rated)
    beside: tuple[Beside, ...] = ()
    trunks: int = 0
    """Trunks whose branches are budgets of their own."""


def check_study(study: Study, analysis: Analysis, swept: Sequence[Row], folder: Folder, *, from_table: bool) -> Checks:
    """Check what the answers rest on, and put what is found wrong with rates and trunks among the doubts of the laws.

    Args:
        study: the study.
        analysis: of its runs; doubts are added to its laws.
        swept: the runs of `rates.sweep`.
        folder: of the study, for forecasts.
        from_table: the runs come from a table.
    """
    rows = analysis.rows
    size_of = {row.n_params: row.size for row in rows}
    noise = None if analysis.noise is None else analysis.noise.relative
    rates = _rates(study, analysis, swept)
    _doubt(analysis, rates)
    return Checks(
        decisions=tuple(decisions(rows, size_of, noise)),
        small=too_small(rows, size_of),
        forecasts=scored(study, rows, folder, from_table=from_table),
        rates=rates,
        beside=tuple(_beside(study, analysis)),
        trunks=len({row.trunk for row in rows if row.trunk}),
    )


# ---- rates


def _rates(study: Study, analysis: Analysis, swept: Sequence[Row]) -> Rated:
    rows = analysis.rows
    points: list[Point] = []
    rule, off = None, []
    if swept:
        for row in (*rows, *swept):
            if row.lr is not None:
                batch = row.tokens / row.steps
                cell = (row.arm, row.size, row.budget, round(batch))
                points.append(Point(cell, row.n_params, row.budget, batch, row.lr, row.loss))
        rule = fit_rule(points)
        used: dict[tuple[float, float, float], float] = {
            (row.n_params, row.budget, row.tokens / row.steps): row.lr for row in rows if row.lr is not None
        }
        off = off_rates(points, used)
    fits = {key: fitted.fit for key, fitted in analysis.data.items() if fitted.fit is not None}
    noises = {}
    for size in dict.fromkeys(size for _, size in fits):
        own = [row for row in rows if row.size == size]
        found = noise_floor([row.cell for row in own], [row.loss for row in own])
        noises[size] = found if found is not None and found.freedom >= _ENOUGH_FREEDOM else analysis.noise
    spans: dict[str, tuple[float, float]] = {}
    if not study.rates.tokens_exponent:
        for size in dict.fromkeys(row.size for row in rows):
            budgets = [row.tokens for row in rows if row.size == size]
            rates = {row.lr for row in rows if row.size == size and row.lr is not None}
            if len(rates) < 2:
                spans[size] = float(min(budgets)), float(max(budgets))
    return Rated(rule, tuple(points), tuple(off), tuple(bends(fits, noises)), fixed_rates(spans))


def _doubt(analysis: Analysis, rates: Rated) -> None:
    """Add doubts to the laws of sizes whose rates are off, and of rows that share a trunk."""
    wrong: dict[str, list[str]] = {}
    for bend in rates.bends:
        if bend.found:
            wrong.setdefault(bend.size, []).append(_bend(bend))
    sizes = {row.n_params: row.size for row in analysis.rows}
    for one in rates.off:
        if one.found and one.n_params in sizes:
            wrong.setdefault(sizes[int(one.n_params)], []).append(_off(one))
    for laws in (analysis.data, analysis.model, analysis.joint, analysis.mixture):
        for key, fitted in laws.items():
            own = {row.size for row in fitted.rows}
            reasons = [f"{size}: {why}" for size, each in wrong.items() if size in own for why in each]
            found = [Diagnostic(MIS_SET, text) for text in reasons]
            trunks = [row.trunk for row in fitted.rows if row.trunk]
            if len(set(trunks)) < len(trunks):
                found.append(Diagnostic(DEPENDENT, _TRUNK))
            if found and fitted.fit is not None:
                laws[key] = replace(fitted, held_doubts=(*fitted.held_doubts, *found))  # type: ignore[index]


_TRUNK = (
    "budgets are branches of one trunk: they share its seed and the order of its text, so they scatter together; intervals "
    "are of whole trunks, and wide where these are few"
)


def _bend(one: Bend) -> str:
    low, high = one.interval
    return (
        f"at {compact(one.tokens)} tokens the losses of {'all' if len(one.arms) > 1 else 'the'} {len(one.arms)} "
        f"arm{'s' * (len(one.arms) > 1)} lie {one.lift:.2%} [{low:.2%}, {high:.2%}] above what the smaller budgets say "
        f"(p = {one.p:.2g}), as when the learning rate is off for that budget; a source that repeats, or a schedule "
        f"that was cut, "
        "does the same"
    )


def _off(one: Off) -> str:
    factor, low, high = one.factor
    return (
        f"at {compact(one.tokens)} tokens and {human(one.batch)} per step the rate {one.used:.3g} is {factor:.2g} "
        f"[{low:.2g}, {high:.2g}] times the best of its sweep, which costs {one.cost:.2%} of the loss (p = {one.p:.2g})"
    )


# ---- published answers


def _beside(study: Study, analysis: Analysis) -> Iterator[Beside]:
    known = references()
    for family in dict.fromkeys(best.family for best in analysis.best):
        source = study.sources.get(family)
        if source is None or source.reference is None:
            continue
        largest = max((best for best in analysis.best if best.family == family), key=lambda best: best.rows[0].flops)
        band = () if largest.measured is None else largest.measured.band
        for reference in known[source.reference]:
            yield Beside(family, reference, largest.size, largest.tokens, largest.lowest[0], band)


# ---- in sentences


def sentences(checks: Checks) -> Iterator[str]:
    """The findings, beside those of the analysis."""
    yield from _rate_sentences(checks.rates)
    yield from _decision_sentences(checks)
    if checks.forecasts.scores:
        yield f"Forecasts: {summary(checks.forecasts.scores)}"
    if checks.forecasts.lost:
        yield f"Forecasts: {checks.forecasts.lost}."
    if checks.trunks:
        yield f"Budgets are branches of {checks.trunks} trunks: those of one trunk are no independent runs."


def _rate_sentences(rates: Rated) -> Iterator[str]:
    rule = rates.rule
    if rule is not None and rule.lr.bounded:
        parts = [f"{axis}^{_shown(ratio)}" for axis, ratio in rule.exponents.items()]
        powers = f", and goes as {' '.join(parts)}" if parts else ""
        at = f"{human(rule.center[0])} parameters, {compact(rule.center[1])} tokens and {human(rule.center[2])} per step"
        doubt = "" if not rule.doubtful else f"; single cells do not follow it (p = {rule.misses:.2g})"
        best = f"{rule.lr.value:.3g} [{rule.lr.low:.3g}, {rule.lr.high:.3g}]"
        yield f"Rates: the best is {best} at {at}{powers}{doubt}."
    elif rule is not None:
        yield "Rates: the sweep shows no curvature that the noise could not make, so no best rate is known."
    if rule is not None and rule.edges:
        named = ", ".join(f"{human(cell.n_params)} at {compact(cell.tokens)} ({cell.edge} end)" for cell in rule.edges[:4])
        more = f" and {len(rule.edges) - 4} more" if len(rule.edges) > 4 else ""
        counted = f"{len(rule.edges)} of {len(rule.cells)} cells ({named}{more})"
        yield f"Rates: the best lies at the edge of its sweep in {counted}: widen it there."
    wrong = [one for one in rates.off if one.found]
    for one in wrong:
        yield f"A learning rate is off: for {human(one.n_params)} parameters {_off(one)}."
    for bend in rates.bends:
        if bend.found:
            yield f"A learning rate may be off: for {bend.size} {_bend(bend)}."
    if rates.off and not wrong:
        yield f"Rates: none of the {len(rates.off)} that were swept is shown to be off."
    if rates.fixed:
        worst = max(rates.fixed, key=lambda size: rates.fixed[size])
        swept = {one.n_params for one in rates.off}
        checked = "" if swept else "; no sweep shows it, and a law cannot"
        yield (
            f"One learning rate serves all budgets of {', '.join(rates.fixed)}. The best one falls with the budget, about as "
            f"D^{EXPONENT:g}, so one that is right in the middle is off by a factor of {rates.fixed[worst]:.1f} at the ends of "
            f"{worst}: laws in D bend with it{checked}."
        )


def _shown(ratio: Ratio) -> str:
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio.bounded else f"{ratio.value:.2f} [no interval]"


def _decision_sentences(checks: Checks) -> Iterator[str]:
    if checks.small:
        yield checks.small
    if not checks.decisions:
        return
    first = checks.decisions[0]
    target = f"{first.target_size} and {compact(first.target_tokens)} tokens"
    for one in (first, *checks.decisions[1:][-1:]):
        low, high = one.interval
        law = "" if one.by_law is None else f"; by laws {one.by_law:.0%}"
        yield (
            f"Ranked at {one.size} and {compact(one.tokens)} tokens, {one.accuracy:.0%} of {one.pairs} pairs of arms "
            f"keep their "
            f"order at {target} [{low:.0%}, {high:.0%}]{law}."
        )
    both = [(one.accuracy, one.by_law) for one in checks.decisions if one.by_law is not None]
    if len(both) > 1:
        plain, by_law = np.mean(both, axis=0)
        verb = "beat" if by_law > plain else "do not beat"
        yield f"Laws {verb} plain ranking: {by_law:.0%} of pairs to {plain:.0%}, over {len(both)} cells that have both."
