"""What a study asks of its laws: how much faster a mixture is, which ratio is best, and how arms compare at equal cost.

Legend: M points, G values of the loss, R ratios, S bootstraps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.bootstrap import interval
from megatron_synth.study.fit.fit import Fit
from megatron_synth.study.fit.laws import FLOPS_PER_PARAMETER_AND_TOKEN, N_PARAMS, RATIO, TOKENS, Floats
from megatron_synth.study.fit.noise import Noise

CostInTokens = Callable[[Floats], Floats]
"""What tokens [...] cost, in tokens of training."""


@dataclass(frozen=True)
class SpeedUp:
    """S(L) = D_natural(L) / D_mixed(L) at losses L [G], from high to low.

    measured: interpolated between measured losses; nan where L is outside what both arms were measured at.
    fitted: from both arms' laws; infinite where only the mixture reaches L, 0 where only the natural arm does, nan where
        neither.
    low, high: the interval, `level` percent: it holds that of the laws, by bootstrap, and that of the interpolation, by the
        scatter of the runs. Where the laws are wrong the runs still say what was measured. nan where L was not reached by both
        arms: whether a lead lasts beyond what was run is in no run, and the laws' own interval does not know it.
    inside: where L was reached by both arms, so that `fitted` interpolates; elsewhere it extrapolates.
    """

    loss: Floats
    measured: Floats
    fitted: Floats
    low: Floats
    high: Floats
    inside: NDArray[np.bool_]
    level: float
    apart: NDArray[np.bool_] | None = None
    """Where the laws' interval and that of the interpolation do not meet: the laws are wrong there."""


def speed_up(
    natural: Fit,
    mixed: Fit,
    *,
    losses: ArrayLike | None = None,
    beyond: float = 4.0,
    count: int = 60,
    level: float = 90,
    costs: tuple[CostInTokens, CostInTokens] | None = None,
) -> SpeedUp:
    """How many times fewer tokens the mixture needs for a loss.

    Args:
        natural: the law `data`, fitted to the natural arm at one model size.
        mixed: the law `data`, fitted to the mixture's arm at the same size.
        losses: where; default `count` values from what both arms start at to what the better one is expected to reach with
            `beyond` times the largest budget.
        beyond: how far to extrapolate, in budgets.
        count: of default values.
        level: of the interval, in percent.
        costs: what tokens of the natural arm and of the mixture cost, in tokens of training, generating them included
            (`Generation.in_tokens`). Default: what they are.
    """
    for arm in (natural, mixed):
        if arm.law.name != "data":
            raise UserError(f"speed-up: needs fits of the law 'data', got '{arm.law.name}'")
    curves = [mean_curve(arm) for arm in (natural, mixed)]
    top = min(float(loss.max()) for _, loss in curves)
    bottom = max(float(np.minimum.accumulate(loss)[-1]) for _, loss in curves)
    if losses is None:
        budget = beyond * max(float(tokens.max()) for tokens, _ in curves)
        lowest = min(float(arm.predict({TOKENS: [budget]})[0]) for arm in (natural, mixed))
        at = np.linspace(top, min(lowest, bottom), count)
    else:
        at = np.sort(np.atleast_1d(np.asarray(losses, dtype=np.float64)))[::-1]
    inside = (at <= top) & (at >= bottom)
    cost_of = costs or (_as_they_are, _as_they_are)
    needed = [cost(tokens_needed_measured(*curve, at)) for cost, curve in zip(cost_of, curves, strict=True)]
    measured = np.where(inside, needed[0] / needed[1], np.nan)
    by_law = [cost(tokens_needed(arm.theta[None], arm, at)) for cost, arm in zip(cost_of, (natural, mixed), strict=True)]
    fitted = _ratio(*by_law)[0]
    low, high = np.full(len(at), np.nan), np.full(len(at), np.nan)
    apart = np.zeros(len(at), dtype=bool)
    draws = min(len(natural.theta_samples), len(mixed.theta_samples))
    if draws > 1:  # shifted by one: arms of one design and seed drew the same points, and would vary together
        first = tokens_needed(np.roll(natural.theta_samples[:draws], 1, axis=0), natural, at)
        drawn = _ratio(cost_of[0](first), cost_of[1](tokens_needed(mixed.theta_samples[:draws], mixed, at)))
        reached = [
            cost_of[place](tokens_needed_measured(*_measured_draws(arm, draws, place), at))
            for place, arm in enumerate((natural, mixed))
        ]
        for ratios in (drawn, reached[0] / reached[1]):
            ends = np.full((2, len(at)), np.nan)
            known = ~np.isnan(ratios)
            for position in np.flatnonzero(inside & (known.mean(axis=0) > 0.5)):
                values = np.sort(ratios[known[:, position], position])  # sorted, as infinities cannot be interpolated between
                tail = (1 - level / 100) / 2 * (len(values) - 1)
                ends[:, position] = values[int(np.floor(tail))], values[int(np.ceil(len(values) - 1 - tail))]
            apart |= (ends[0] > high) | (ends[1] < low)
            low, high = np.fmin(low, ends[0]), np.fmax(high, ends[1])
    return SpeedUp(at, measured, fitted, low, high, inside, level, apart)


def _as_they_are(tokens: Floats) -> Floats:
    return tokens


def mean_curve(arm: Fit) -> tuple[Floats, Floats]:
    """Budgets [G] in rising order, and the mean loss [G] over seeds at each."""
    tokens, place = np.unique(arm.columns[TOKENS], return_inverse=True)
    place = place.reshape(-1)
    return tokens, np.bincount(place, arm.loss) / np.bincount(place)


def tokens_needed(theta: Floats, arm: Fit, losses: Floats) -> Floats:
    """D(L) = (B / (L - E))^(1 / beta) for theta [S, P]: [S, G]; infinite at and below the floor, and for beta <= 0."""
    params = arm.law.to_params(theta)
    gap = losses[None, :] - params["E"][:, None]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        logs = (np.log(params["B"])[:, None] - np.log(np.where(gap > 0, gap, np.nan))) / params["beta"][:, None]
        reached = np.where(np.isnan(logs) | (params["beta"] <= 0)[:, None], np.inf, np.exp(logs))
    return np.asarray(reached)


def tokens_needed_measured(tokens: Floats, loss: Floats, losses: Floats) -> Floats:
    """Tokens at which a measured curve first reaches each loss, linear in log D between budgets; nan where it does not.

    Args:
        tokens: [B] budgets in rising order.
        loss: [B] or [S, B] at these.
        losses: [G] to be reached.

    Returns:
        [G] or [S, G].
    """
    curves = np.atleast_2d(loss)
    reached = curves[:, :, None] <= losses  # [S, B, G]
    first = reached.argmax(axis=1)  # [S, G]
    before = np.maximum(first - 1, 0)
    rows = np.arange(len(curves))[:, None]
    high, low = curves[rows, before], curves[rows, first]
    logs = np.log(tokens)
    with np.errstate(divide="ignore", invalid="ignore"):
        part = (high - losses) / (high - low)
        found = np.exp(logs[before] + part * (logs[first] - logs[before]))
    found = np.where(first == 0, np.where(low == losses, tokens[0], np.nan), found)
    found = np.where(reached.any(axis=1), found, np.nan)
    return np.asarray(found if np.ndim(loss) == 2 else found[0])


def _measured_draws(arm: Fit, draws: int, seed: int) -> tuple[Floats, Floats]:
    """Budgets [B], and mean losses [draws, B] that could as well have been measured: each with the scatter of its seeds, or
    where there are none of the runs around the law.
    """
    tokens, place = np.unique(arm.columns[TOKENS], return_inverse=True)
    place, logs = place.reshape(-1), np.log(arm.loss)
    counts = np.bincount(place)
    means = np.bincount(place, logs) / counts
    freedom = len(logs) - len(tokens)
    if freedom > 0:
        variance = float(np.sum((logs - means[place]) ** 2)) / freedom
    else:
        freedom = max(len(logs) - len(arm.theta), 1)
        variance = float(np.sum(arm.residuals**2)) / freedom
    random = np.random.default_rng(seed)
    scale = np.sqrt(variance * freedom / random.chisquare(freedom, (draws, 1)))
    return tokens, np.exp(means + scale * random.standard_normal((draws, len(tokens))) / np.sqrt(counts))


def _ratio(natural: Floats, mixed: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(np.isinf(natural) & np.isinf(mixed), np.nan, natural / mixed))


@dataclass(frozen=True)
class BestRatio:
    """The ratio of lowest predicted loss at one N and D.

    interval: of the ratio, by bootstrap, `level` percent.
    flat: from and to which ratio the predicted loss is within the noise floor of the lowest (one standard deviation between
        seeds); None without a noise floor. A run cannot tell these ratios from the best.
    inside: whether N and D are within what the law was fitted to.
    ratios, losses: the curve [R] that was searched.
    """

    ratio: float
    loss: float
    interval: tuple[float, float]
    flat: tuple[float, float] | None
    inside: bool
    ratios: Floats
    losses: Floats
    level: float


def best_ratio(
    mixture: Fit,
    *,
    n_params: float | None = None,
    tokens: float | None = None,
    noise: Noise | None = None,
    level: float = 90,
    steps: int = 200,
) -> BestRatio:
    """The best ratio at one N and D by a fitted mixture law.

    Args:
        mixture: a fit whose law has the ratio.
        n_params: the model size; only where the law has it.
        tokens: the budget; only where the law has it.
        noise: the noise floor, for the flat band.
        level: of the interval, in percent.
        steps: the ratios are searched in steps of the fitted range / `steps`; there is no extrapolation in the ratio.
    """
    if RATIO not in mixture.law.columns:
        raise UserError(f"best ratio: the law '{mixture.law.name}' has no ratio; fit 'mixture'")
    given = {N_PARAMS: n_params, TOKENS: tokens}
    point: dict[str, float] = {}
    for name, value in given.items():
        if name in mixture.law.columns:
            if value is None:
                raise UserError(f"best ratio: the law depends on {name}; say at which")
            point[name] = value
    ratios = np.linspace(mixture.columns[RATIO].min(), mixture.columns[RATIO].max(), steps + 1)
    columns: dict[str, ArrayLike] = {RATIO: ratios, **point}
    losses = mixture.predict(columns)
    at = int(losses.argmin())
    low = high = float("nan")
    if len(mixture.theta_samples) > 1:
        found = ratios[mixture.predict_samples(columns).argmin(axis=1)]
        low, high = _bounds(found, level)
    flat = None
    if noise is not None:
        near = np.flatnonzero(losses <= losses[at] * np.exp(noise.relative))
        flat = (float(ratios[near[0]]), float(ratios[near[-1]]))
    inside = all(mixture.columns[name].min() <= value <= mixture.columns[name].max() for name, value in point.items())
    return BestRatio(float(ratios[at]), float(losses[at]), (low, high), flat, inside, ratios, losses, level)


_BISECTIONS = 80


@dataclass(frozen=True)
class Comparison:
    """One arm beside the baseline at equal cost.

    loss, interval: by the arm's law, `level` percent by bootstrap.
    difference, difference_interval: loss / baseline's loss - 1; draws of the two arms are independent.
    distinct: whether that interval leaves out 0.
    n_params, tokens: at what.
    inside: whether that is within what the arm's law was fitted to.
    """

    arm: str
    loss: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    distinct: bool
    n_params: float | None
    tokens: float | None
    inside: bool


def compare_at_tokens(
    arms: Mapping[str, Fit],
    baseline: str,
    *,
    tokens: float | None = None,
    n_params: float | None = None,
    level: float = 90,
    costs: Mapping[str, CostInTokens] | None = None,
) -> list[Comparison]:
    """All arms at the same tokens (and model size, for laws that have it); at one size that is equal training compute, too.

    Args:
        arms: one fit per arm, all of one law (`data`, `model` or `joint`).
        baseline: the arm to compare with, usually the natural one.
        tokens: the budget, where the law has it.
        n_params: the model size, where the law has it.
        level: of the intervals, in percent.
        costs: by arm, what its tokens cost in tokens of training (`Generation.in_tokens`): each arm then has as many as cost
            what `tokens` of training do.
    """
    afforded = dict.fromkeys(arms, tokens)
    if costs and tokens is not None:
        afforded = {name: _affordable(costs[name], tokens) for name in arms}
    points = {name: _point(fit, n_params, afforded[name]) for name, fit in arms.items()}
    samples = {name: fit.predict_samples(points[name])[:, 0] for name, fit in arms.items()}
    return _compare(arms, baseline, points, samples, level)


def _affordable(cost: CostInTokens, budget: float) -> float:
    """How many tokens cost as much as a budget, by bisection: costs rise with them."""
    low, high = 0.0, budget
    if float(cost(np.array([budget]))[0]) <= budget:
        return budget
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if float(cost(np.array([middle]))[0]) <= budget else (low, middle)
    return high


def compare_at_compute(
    arms: Mapping[str, Fit],
    baseline: str,
    flops: float,
    *,
    level: float = 90,
    generation: Mapping[str, float] | None = None,
) -> list[Comparison]:
    """All arms at the same compute C = 6 N D, each at its own best N and D.

    These minimize E + A / N^alpha + B / D^beta: N = G (C / 6)^(beta / (alpha + beta)) with
    G = (alpha A / (beta B))^(1 / (alpha + beta)) (Hoffmann et al. 2022, equation 4). Every bootstrap has its own.

    Args:
        arms: one fit of the law `joint` per arm.
        baseline: the arm to compare with.
        flops: C.
        level: of the intervals, in percent.
        generation: FLOPs by arm that each of its tokens took to generate: C = (6 N + g) D then, and the best N is searched.
    """
    costs = generation or {}
    for name, fit in arms.items():
        if fit.law.name != "joint":
            raise UserError(f"equal compute: arm '{name}' has a fit of '{fit.law.name}'; the law 'joint' is needed")
    points = {name: compute_optimal(fit, fit.theta[None], flops, costs.get(name, 0.0)) for name, fit in arms.items()}
    samples: dict[str, Floats] = {}
    for name, fit in arms.items():
        p, best = fit.law.to_params(fit.theta_samples), compute_optimal(fit, fit.theta_samples, flops, costs.get(name, 0.0))
        samples[name] = p["E"] + p["A"] / best[N_PARAMS] ** p["alpha"] + p["B"] / best[TOKENS] ** p["beta"]
    return _compare(arms, baseline, points, samples, level)


def compute_optimal(joint: Fit, theta: Floats, flops: float, generation: float = 0.0) -> dict[str, Floats]:
    """The best `n_params` and `tokens` [S] for `flops` = (6 N + generation) D, by theta [S, P] of a joint law.

    With generation, d log L / d log N = 0 gives A alpha / N^alpha = B beta / D^beta x 6 N / (6 N + g): the right side has less
    weight for small N, and the root lies above that without. It is found by bisection.
    """
    p = joint.law.to_params(theta)
    beta = p.get("beta", p["alpha"])  # one for both in the law `tied`
    total = p["alpha"] + beta
    log_g = (np.log(p["alpha"] / beta) + np.log(p["A"]) - np.log(p["B"])) / total
    log_budget = np.log(flops / FLOPS_PER_PARAMETER_AND_TOKEN)
    log_n = log_g + beta / total * log_budget
    if generation > 0:
        low, high = log_n, log_n + np.log1p(flops)
        with np.errstate(over="ignore", invalid="ignore"):
            for _ in range(_BISECTIONS):
                middle = (low + high) / 2
                per_token = FLOPS_PER_PARAMETER_AND_TOKEN * np.exp(middle) + generation
                log_d = np.log(flops) - np.log(per_token)
                size = np.log(p["alpha"] * p["A"]) - p["alpha"] * middle
                data = np.log(beta * p["B"]) - beta * log_d + np.log(FLOPS_PER_PARAMETER_AND_TOKEN) + middle - np.log(per_token)
                smaller = size > data  # a larger N still lowers the loss
                low, high = np.where(smaller, middle, low), np.where(smaller, high, middle)
        per_token = FLOPS_PER_PARAMETER_AND_TOKEN * np.exp(high) + generation
        return {N_PARAMS: np.exp(high), TOKENS: flops / per_token}
    return {N_PARAMS: np.exp(log_n), TOKENS: np.exp(log_budget - log_n)}


def _point(fit: Fit, n_params: float | None, tokens: float | None) -> dict[str, Floats]:
    given = {N_PARAMS: n_params, TOKENS: tokens}
    point = {}
    for name in fit.law.columns:
        value = given.get(name)
        if value is None:
            raise UserError(f"comparison: the law '{fit.law.name}' depends on {name}; say at which")
        point[name] = np.array([value], dtype=np.float64)
    return point


def _compare(
    arms: Mapping[str, Fit],
    baseline: str,
    points: Mapping[str, Mapping[str, Floats]],
    samples: Mapping[str, Floats],
    level: float,
) -> list[Comparison]:
    """Compare predictions at `points` (one per arm) with intervals from `samples` [S] of them."""
    if baseline not in arms:
        raise UserError(f"comparison: there is no arm '{baseline}'; one of: {', '.join(arms)}")
    reference = float(arms[baseline].predict(points[baseline])[0])
    unknown = (float("nan"), float("nan"))
    results = []
    for name, fit in arms.items():
        loss, own = float(fit.predict(points[name])[0]), samples[name]
        bounds, difference = unknown, (0.0, 0.0) if name == baseline else unknown
        if len(own) > 1:
            bounds = _bounds(own, level)
        if name != baseline and min(len(own), len(samples[baseline])) > 1:
            # arms of one design and seed drew the same points; shifted by one draw they are independent, as the runs were
            count = min(len(own), len(samples[baseline]))
            difference = _bounds(own[:count] / np.roll(samples[baseline][:count], 1) - 1, level)
        point = {column: float(values[0]) for column, values in points[name].items()}
        results.append(
            Comparison(
                arm=name,
                loss=loss,
                interval=bounds,
                difference=loss / reference - 1,
                difference_interval=difference,
                distinct=difference[0] > 0 or difference[1] < 0,
                n_params=point.get(N_PARAMS),
                tokens=point.get(TOKENS),
                inside=all(fit.columns[column].min() <= value <= fit.columns[column].max() for column, value in point.items()),
            )
        )
    return results


def _bounds(samples: Floats, level: float) -> tuple[float, float]:
    low, high = interval(samples, level)
    return float(low), float(high)
