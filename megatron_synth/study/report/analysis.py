"""What the runs say: every fit and answer of a report, as numbers beside the runs that they come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.contrast import Contrast, contrast
from megatron_synth.study.fit.diagnostics import Diagnostic, seeds_together
from megatron_synth.study.fit.fit import Fit, Holdout, fit
from megatron_synth.study.fit.noise import MeasuredBest, Noise, Trend, best_measured, holm, noise_floor, trend
from megatron_synth.study.fit.ratio.choice import FEWEST_RATIOS, RATIO_LAWS, RatioChoice, choose
from megatron_synth.study.plan.generation import Generation, generation_of
from megatron_synth.study.plan.study_file import Study
from megatron_synth.study.report.answers import (
    BestRatio,
    Comparison,
    CostInTokens,
    SpeedUp,
    compare_at_compute,
    compare_at_tokens,
    speed_up,
)
from megatron_synth.study.report.collect import Row
from megatron_synth.study.report.ratio import best_ratio_by, bracket

LEVEL = 90.0
_STARTS = 600
"""Of the grid of a law at most; only the joint law's is larger."""
_FINISH = {"mixture": 128, "mixture-additive": 128}
_FINISH_OTHERS = 24
"""Of these, so many are followed to their end; laws in the ratio have several optima."""
_REJECTED = ("law-rejected", "wild-between-ratios", "holdout-missed")
_ENOUGH_FREEDOM = 4
"""Degrees of freedom from which the scatter of some runs is their own."""
_ENOUGH = 3
"""Different budgets (sizes, ratios) from which a law in them is tried."""


@dataclass(frozen=True)
class Fitted:
    """A law fitted to some runs, or why it could not be."""

    key: tuple[str, ...]
    """What it is of: law, arm or family, then size or budget, then the domain if it is not the aggregate."""
    rows: tuple[Row, ...]
    fit: Fit | None
    problem: str = ""
    holdout: Holdout | None = None
    """How the same law, fitted to the smaller budgets or sizes alone, predicts the largest."""
    held_doubts: tuple[Diagnostic, ...] = ()
    """What that second fit says of its hold-out."""

    @property
    def doubts(self) -> tuple[Diagnostic, ...]:
        """All that speaks against the law, its hold-out included."""
        return () if self.fit is None else (*self.fit.warnings, *self.held_doubts)

    @property
    def rejected(self) -> tuple[str, ...]:
        """Codes of the doubts for which the law answers nothing."""
        return tuple(dict.fromkeys(doubt.code for doubt in self.doubts if doubt.code in _REJECTED))

    @property
    def name(self) -> str:
        """Name of its file."""
        return "-".join(self.key)

    def to_json(self) -> dict[str, Any]:
        """As law.json holds it, with the runs it comes from."""
        content: dict[str, Any] = {"law": self.key[0], "of": list(self.key[1:])}
        if self.fit is None:
            content["problem"] = self.problem
        else:
            content |= self.fit.to_json()
            content["holdout"] = None if self.holdout is None else self.holdout.to_json()
            content["holdout_warnings"] = [{"code": doubt.code, "message": doubt.message} for doubt in self.held_doubts]
        return {**content, "runs": [row.run for row in self.rows]}


@dataclass(frozen=True)
class BestAt:
    """The best ratio of a family at one size and budget: among those that were run, and by the law that was chosen."""

    family: str
    size: str
    tokens: int
    rows: tuple[Row, ...]
    lowest: tuple[float, float]
    """The ratio of lowest mean loss among those that were run, and that loss."""
    measured: MeasuredBest | None
    fitted: BestRatio | None
    refused: str = ""
    """Why the law's best ratio is no answer; empty where it is one."""
    between: tuple[float, float] = (0.0, 1.0)
    """Where the best ratio lies if the loss has one minimum: the neighbors of those as good as the best (`bracket`)."""


@dataclass(frozen=True)
class Behind:
    """Does an arm fall behind the baseline as budgets grow (`contrast`)?"""

    arm: str
    size: str
    rows: tuple[Row, ...]
    contrast: Contrast
    p: float
    """Of no collapse: that of the floor's contrast, or of the gap's where laws could not be fitted; corrected (Holm)."""

    @property
    def collapses(self) -> bool:
        """Whether the runs show it, at one side of the level."""
        return self.p < (100 - LEVEL) / 200


@dataclass(frozen=True)
class Collapse:
    """Does the loss stop falling, or rise, with the budget (of an arm) or with the share (of a family)?"""

    what: str
    """`budget` or `share`."""
    of: str
    at: str
    rows: tuple[Row, ...]
    trend: Trend
    p_rises: float
    """Corrected for the number of tests of the study (Holm)."""
    p_falls: float


@dataclass
class Analysis:
    """All of it."""

    study: Study
    rows: list[Row]
    noise: Noise | None
    data: dict[tuple[str, str], Fitted] = field(default_factory=dict)
    """L(D) by arm and size."""
    model: dict[tuple[str, int], Fitted] = field(default_factory=dict)
    """L(N) by arm and budget."""
    joint: dict[str, Fitted] = field(default_factory=dict)
    """L(N, D) by arm."""
    mixture: dict[str, Fitted] = field(default_factory=dict)
    """The law in N, D and the ratio by family: `mixture` or `mixture-additive`."""
    ratio: dict[str, RatioChoice] = field(default_factory=dict)
    """By family, which law answers for the ratio, if any."""
    domains: list[Fitted] = field(default_factory=list)
    """Laws of single validation domains."""
    generation: dict[str, Generation] = field(default_factory=dict)
    """What the text of each arm took to generate, where that is counted; empty where it is not."""
    speed: dict[tuple[str, str], SpeedUp] = field(default_factory=dict)
    """By arm and size."""
    best: list[BestAt] = field(default_factory=list)
    equal_tokens: dict[str, list[Comparison]] = field(default_factory=dict)
    """By size, at its largest budget."""
    equal_compute: list[Comparison] = field(default_factory=list)
    """At the largest compute that was run; empty where a joint law is missing."""
    compute: float | None = None
    """FLOPs of `equal_compute`."""
    no_best_size: bool = False
    """Whether a joint law, or a bootstrap of one, does not fall in N or in D, so that there is no `equal_compute`."""
    collapse: list[Collapse] = field(default_factory=list)
    behind: list[Behind] = field(default_factory=list)

    @property
    def fits(self) -> list[Fitted]:
        """Every law of the aggregate."""
        return [*self.data.values(), *self.model.values(), *self.joint.values(), *self.mixture.values()]

    def behind_best(self, family: str) -> Fitted | None:
        """The law in the table of laws that a family's best ratio comes from; None where it is of another kind."""
        choice, law = self.ratio.get(family), self.mixture.get(family)
        if choice is None or choice.chosen is None or law is None or choice.chosen.name != law.key[0]:
            return None
        return law


def analyze(study: Study, rows: Sequence[Row], tell: Callable[[str], object]) -> Analysis:
    """Fit and answer what the runs allow.

    tell: called with what is being done.
    """
    result = Analysis(study, list(rows), noise_floor([row.cell for row in rows], [row.loss for row in rows]))
    arms = [arm for arm in study.arms if any(row.arm == arm for row in rows)]
    tell("laws per arm")
    for arm in arms:
        _laws_of_arm(result, arm)
    tell("laws in the ratio")
    for family in _families(result):
        members = _of_family(result, family)
        if len({row.ratio for row in members}) >= _ENOUGH:
            _laws_of_family(result, family, members)
    tell("laws per domain")
    _domains(result, arms)
    tell("answers")
    if study.report.count_generation:
        result.generation = generation_of(study)
    _speed(result)
    _best(result)
    _comparisons(result)
    _collapse(result)
    _behind(result)
    return result


def _laws_of_family(result: Analysis, family: str, members: Sequence[Row]) -> None:
    """Laws in the ratio: what cross-validation says of them, and the best of those in N, D and the ratio for the table."""
    study, columns = result.study, _columns(members, "n_params", "tokens", "ratio")
    ratios = len({row.ratio for row in members})
    fitted = {
        name: _fitted(study, (name, family), name, members, columns)
        for name in RATIO_LAWS
        if name == "mixture" or ratios >= FEWEST_RATIOS[name]
    }
    doubts = {id(one.fit): one.rejected for one in fitted.values() if one.fit is not None}
    choice = choose(
        columns,
        [row.loss for row in members],
        bootstraps=study.report.bootstraps,
        seed=study.report.seed,
        fits={name: one.fit for name, one in fitted.items() if one.fit is not None},
        rejected=lambda found: doubts.get(id(found), ()),
    )
    result.ratio[family] = choice
    judged = [name for name in fitted if name in choice.candidates]
    result.mixture[family] = fitted[min(judged, key=lambda name: choice.candidates[name].error) if judged else "mixture"]


def _families(result: Analysis) -> list[str]:
    """Of the arms that are compared by their share; those of loops are compared by round."""
    of_rounds = {arm for loop in result.study.rounds.values() for arm in loop.arms or ()}
    return list(dict.fromkeys(row.family for row in result.rows if row.family and row.arm not in of_rounds))


def _of_family(result: Analysis, family: str) -> list[Row]:
    """Runs of the family's arms, and of the baseline, whose share is 0."""
    baseline = result.study.baseline_arm
    return [row for row in result.rows if row.family == family or row.arm == baseline]


def _columns(rows: Sequence[Row], *names: str) -> dict[str, Any]:
    return {name: np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in names}


def _laws_of_arm(result: Analysis, arm: str) -> None:
    study, rows = result.study, [row for row in result.rows if row.arm == arm]
    for size in dict.fromkeys(row.size for row in rows):
        members = [row for row in rows if row.size == size]
        if len({row.tokens for row in members}) >= _ENOUGH:
            key = ("data", arm, size)
            result.data[arm, size] = _fitted(study, key, "data", members, _columns(members, "tokens"))
    for tokens in sorted({row.tokens for row in rows}):
        members = [row for row in rows if row.tokens == tokens]
        if len({row.n_params for row in members}) >= _ENOUGH:
            key = ("model", arm, str(tokens))
            result.model[arm, tokens] = _fitted(study, key, "model", members, _columns(members, "n_params"))
    if len({row.tokens for row in rows}) >= _ENOUGH and len({row.n_params for row in rows}) >= _ENOUGH:
        result.joint[arm] = _fitted(study, ("joint", arm), "joint", rows, _columns(rows, "n_params", "tokens"))


def _fitted(
    study: Study,
    key: tuple[str, ...],
    law: str,
    rows: Sequence[Row],
    columns: dict[str, Any],
    *,
    domain: str | None = None,
    bootstraps: int | None = None,
) -> Fitted:
    loss = np.array([row.loss if domain is None else row.domains[domain] for row in rows])
    epochs = np.array([row.epochs for row in rows])
    finish = _FINISH.get(law, _FINISH_OTHERS)
    options: dict[str, Any] = {"finish": finish, "seed": study.report.seed, "starts": _STARTS, "epochs": epochs}
    if any(row.trunk for row in rows):
        options["cluster"] = [row.trunk or row.id for row in rows]
    try:
        found = fit(law, columns, loss, bootstraps=study.report.bootstraps if bootstraps is None else bootstraps, **options)
    except UserError as error:
        return Fitted(key, tuple(rows), None, str(error))
    if domain is None:
        found = replace(found, warnings=(*found.warnings, *seeds_together(found, [row.seed for row in rows])))
    held: Holdout | None = None
    held_doubts: tuple[Diagnostic, ...] = ()
    out = _held_out(study, columns)
    if out is not None and domain is None:
        try:
            second = fit(law, columns, loss, holdout=out, bootstraps=0, **options)
            held = second.holdout
            held_doubts = tuple(warning for warning in second.warnings if warning.code == "holdout-missed")
        except UserError:  # what is left is too little for this law
            held = None
    return Fitted(key, tuple(rows), found, holdout=held, held_doubts=held_doubts)


def _held_out(study: Study, columns: dict[str, Any]) -> Any:
    """Mask of the points beyond the limits of the report; None where there is none, or nothing else."""
    out = np.zeros(len(next(iter(columns.values()))), dtype=bool)
    for name, limit in (("tokens", study.report.holdout_tokens), ("n_params", study.report.holdout_parameters)):
        if limit is not None and name in columns:
            out |= columns[name] > limit
    return out if out.any() and not out.all() else None


def _domains(result: Analysis, arms: Sequence[str]) -> None:
    for arm, size in result.data:
        members = list(result.data[arm, size].rows)
        for domain in members[0].domains:
            columns = _columns(members, "tokens")
            key = ("data", arm, size, domain)
            result.domains.append(_fitted(result.study, key, "data", members, columns, domain=domain, bootstraps=200))
    for arm, tokens in result.model:
        members = list(result.model[arm, tokens].rows)
        for domain in members[0].domains:
            columns = _columns(members, "n_params")
            key = ("model", arm, str(tokens), domain)
            result.domains.append(_fitted(result.study, key, "model", members, columns, domain=domain, bootstraps=200))


def _speed(result: Analysis) -> None:
    baseline = result.study.baseline_arm
    for (arm, size), fitted in result.data.items():
        natural = result.data.get((baseline, size))
        if arm != baseline and natural is not None and natural.fit is not None and fitted.fit is not None:
            costs = (_cost(result, baseline, size), _cost(result, arm, size))
            result.speed[arm, size] = speed_up(natural.fit, fitted.fit, level=LEVEL, costs=costs)


def _cost(result: Analysis, arm: str, size: str) -> CostInTokens:
    """What tokens of an arm cost, in tokens of training at a size."""
    if not result.generation:
        return lambda tokens: tokens
    n_params = next(row.n_params for row in result.rows if row.size == size)
    generation = result.generation[arm]
    return lambda tokens: np.asarray(generation.in_tokens(tokens, n_params))


def _best(result: Analysis) -> None:
    for family in _families(result):
        members = _of_family(result, family)
        cells = sorted({(row.n_params, row.size, row.tokens) for row in members})
        choice = result.ratio.get(family)
        ranges = {
            name: (min(values), max(values))
            for name, values in (("n_params", [row.n_params for row in members]), ("tokens", [row.tokens for row in members]))
        }
        for n_params, size, tokens in cells:
            rows = [row for row in members if (row.size, row.tokens) == (size, tokens)]
            if len({row.ratio for row in rows}) < 2:
                continue
            measured = None
            noise = _noise(rows, result.noise)
            if noise is not None:
                measured = best_measured([row.ratio for row in rows], [row.loss for row in rows], noise, level=LEVEL)
            fitted = None
            if choice is not None:
                point = {"n_params": float(n_params), "tokens": float(tokens)}
                fitted = best_ratio_by(choice, point, ranges, noise=noise, level=LEVEL)
            by_ratio: dict[float, list[float]] = {}
            for row in rows:
                by_ratio.setdefault(row.ratio, []).append(row.loss)
            means = {ratio: float(np.mean(losses)) for ratio, losses in by_ratio.items()}
            lowest = min(means.items(), key=lambda item: (item[1], item[0]))
            ratios = sorted(means)
            refused = ""
            if choice is not None:
                refused = choice.refused if fitted is None else refusal(fitted, ratios, lowest[0], measured)
            between = bracket(tuple(ratios), (lowest[0],) if measured is None else measured.band)
            result.best.append(BestAt(family, size, tokens, tuple(rows), lowest, measured, fitted, refused, between))


def refusal(fitted: BestRatio, ratios: Sequence[float], lowest: float, measured: MeasuredBest | None) -> str:
    """Why the best ratio by a law is no answer: runs show the ratio next to it to be worse. Empty where it is one."""
    nearest = min(ratios, key=lambda ratio: abs(ratio - fitted.ratio))
    place = list(ratios).index(lowest)
    good = ratios[max(place - 1, 0) : place + 2] if measured is None else measured.band
    return "" if nearest in good else f"{fitted.ratio:.2f} is next to {nearest:.2g}, which the runs show to be worse"


def _noise(rows: Sequence[Row], study: Noise | None) -> Noise | None:
    """The scatter between seeds of these runs alone, as sizes and budgets differ; the study's where they are too few."""
    own = noise_floor([row.cell for row in rows], [row.loss for row in rows])
    return own if own is not None and own.freedom >= _ENOUGH_FREEDOM else study


def _comparisons(result: Analysis) -> None:
    baseline = result.study.baseline_arm
    for size in dict.fromkeys(size for _, size in result.data):
        fits = {arm: one.fit for (arm, at), one in result.data.items() if at == size and one.fit is not None}
        if baseline in fits and len(fits) > 1:
            largest = max(row.tokens for row in result.rows if row.size == size)
            result.equal_tokens[size] = compare_at_tokens(
                fits, baseline, tokens=largest, level=LEVEL, costs={arm: _cost(result, arm, size) for arm in fits}
            )
    joint = {arm: one.fit for arm, one in result.joint.items() if one.fit is not None}
    if baseline in joint and len(joint) > 1:
        result.compute = 6.0 * max(row.n_params * row.tokens for row in result.rows)
        try:
            per_token = {arm: one.per_new_token for arm, one in result.generation.items()}
            with np.errstate(invalid="ignore"):
                result.equal_compute = compare_at_compute(joint, baseline, result.compute, level=LEVEL, generation=per_token)
        except UserError:  # a law whose loss does not fall in N or in D has no best N
            result.no_best_size = True


def _collapse(result: Analysis) -> None:
    found: list[tuple[str, str, str, list[Row], Trend]] = []
    for (arm, size), fitted in result.data.items():
        rows = list(fitted.rows)
        tested = _trend([math.log2(row.tokens) for row in rows], rows, _noise(rows, result.noise))
        if tested is not None:
            found.append(("budget", arm, size, rows, tested))
    for best in result.best:
        rows = list(best.rows)
        tested = _trend([row.ratio for row in rows], rows, _noise(rows, result.noise))
        if tested is not None and len({row.ratio for row in rows}) >= _ENOUGH:
            found.append(("share", best.family, f"{best.size}, {best.tokens}", rows, tested))
    if not found:
        return
    rises, falls = (holm([getattr(one[4], name) for one in found]) for name in ("p_rises", "p_falls"))
    for (what, of, at, rows, tested), rise, fall in zip(found, rises, falls, strict=True):
        result.collapse.append(Collapse(what, of, at, tuple(rows), tested, float(rise), float(fall)))


def _behind(result: Analysis) -> None:
    found: list[tuple[str, str, list[Row], Contrast]] = []
    baseline = result.study.baseline_arm
    for size in dict.fromkeys(row.size for row in result.rows):
        natural = [row for row in result.rows if (row.arm, row.size) == (baseline, size)]
        for arm in result.study.arms:
            rows = [row for row in result.rows if (row.arm, row.size) == (arm, size)]
            if arm == baseline or not rows or not natural:
                continue
            sides = [np.array([(row.tokens, row.loss) for row in side], dtype=np.float64).T for side in (rows, natural)]
            try:
                found.append((arm, size, [*rows, *natural], contrast(*sides[0], *sides[1], level=LEVEL)))
            except UserError:  # too few budgets in common, or no scatter to hold it against
                continue
    if not found:
        return
    corrected = holm([(one.gap if one.floor is None else one.floor).p for *_, one in found])
    for (arm, size, rows, one), p in zip(found, corrected, strict=True):
        result.behind.append(Behind(arm, size, tuple(rows), one, float(p)))


def _trend(x: Sequence[float], rows: Sequence[Row], noise: Noise | None) -> Trend | None:
    try:
        return trend(x, [row.loss for row in rows], last=2, noise=noise, level=LEVEL)
    except UserError:  # too few runs to speak of a trend
        return None
