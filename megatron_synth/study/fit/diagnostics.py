"""What speaks against believing a fit: each as a code and a sentence with its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_synth.study.fit import between_ratios
from megatron_synth.study.fit.catalog import AnyLaw
from megatron_synth.study.fit.laws import N_PARAMS, TOKENS, UNIQUE_TOKENS, Columns, Floats

if TYPE_CHECKING:
    from megatron_synth.study.fit.fit import Fit
    from megatron_synth.study.fit.solvers.solve import Solver

SPARE_SETTINGS = 2  # beyond the number of parameters
SINGULAR = 1e-6  # of the slopes of the predictions, each scaled to 1: smallest over largest singular value of a flat optimum
NARROW = 4.0  # smallest ratio of largest to smallest N or D from which an exponent is read
UNKNOWN_FACTOR = 1.0  # standard error of a factor's logarithm: known to a factor e only
UNKNOWN_EXPONENT = 0.5  # standard error of an exponent, relative
FLOOR_SHARE = 0.01  # of the lowest loss
RARE_START = 3  # fewer starts than this at the best optimum
OPTIMA_DISTANCE = 2.0  # standard errors between two optima
PART_OF = 1e-3  # part of a parameter in a free direction from which it is not determined
NOTICED = 1e-2  # change of a prediction along a free direction, in units of the points' own
SPARE_CLUSTERS = 10
UNEQUAL = 1e-3  # p-value of Bartlett's test, which finds long tails, too
NEEDED = 0.05  # p-value below which a law's extra parameter is needed
REJECTED = 0.01  # p-value of the lack-of-fit test, and of the hold-out's


@dataclass(frozen=True)
class Diagnostic:
    """One reason for doubt.

    code: `few-points`, `narrow-range`, `flat-optimum`, `floor-at-zero`, `starts-disagree`, `wrong-sign`, `law-rejected`,
    `holdout-missed`, `simpler-law-does`, `repetition-ignored`, `no-interval`, `equal-rows`, `dependent-rows`, `few-clusters`,
    `seeds-together`, `unequal-noise` or `wild-between-ratios`; of laws over shares also `source-rarely-seen` or
    `explains-nothing`.
    message: with numbers, for people.
    """

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def find(
    fit: Fit, solve: Solver, settings: NDArray[np.int64], other_optima: tuple[Floats, Floats], epochs: Floats | None = None
) -> tuple[Diagnostic, ...]:
    """All that speaks against `fit`.

    Args:
        fit: without its warnings.
        solve: the solver of the law and its points.
        settings: [M], equal for replications.
        other_optima: theta [O, P] and objective [O] of other optima nearly as low.
        epochs: [M] of the points fitted to, how often each run saw its text.
    """
    errors = log_errors(fit)
    return (
        *_points(fit, settings),
        *_rows(fit),
        *_flatness(fit, errors),
        *_floor(fit),
        *_between(fit),
        *_starts(fit, errors, other_optima),
        *_signs(fit),
        *_unequal_noise(fit, settings),
        *(() if fit.clusters else (*_lack_of_fit(fit, solve, settings), *_holdout(fit))),
        *repetition_ignored(None if UNIQUE_TOKENS in fit.law.columns else epochs),
    )


def log_errors(fit: Fit) -> Floats:
    """Standard errors [P] of theta: by least squares, or half the central 68 % of the bootstraps where that is more.

    Infinite for parameters that can be changed together without changing any prediction: bootstraps do not show that, as each
    stays where it started.
    """
    slopes = fit.law.gradient(fit.theta, fit.columns)  # [M, P]
    covariance, _ = least_squares_covariance(slopes, fit.residuals)
    errors = np.sqrt(np.diag(covariance))
    if len(fit.theta_samples) > 20:
        low, high = np.percentile(fit.theta_samples, [15.87, 84.13], axis=0)
        errors = np.maximum(errors, (high - low) / 2)
    free = [name in fit.undetermined for name in fit.law.parameters]
    return np.where(free, np.inf, errors)


def free_directions(law: AnyLaw, theta: Floats, columns: Columns) -> Floats:
    """Directions [P, F] in theta along which no prediction at the points changes.

    Their length is that which changes the predictions by 1, in the root of the sum of squares, if each parameter did so alone.
    """
    scale, free = _free(law.gradient(theta, columns))
    return np.asarray(free.T / np.where(scale > 0, scale, 1.0)[:, None])


def undetermined(law: AnyLaw, theta: Floats, columns: Columns) -> tuple[str, ...]:
    """Parameters that can be changed, together with others, without changing any prediction at the points."""
    scale, free = _free(law.gradient(theta, columns))
    loose = (np.abs(free) > PART_OF).any(axis=0) | (scale == 0)
    return tuple(name for name, is_loose in zip(law.parameters, loose, strict=True) if is_loose)


def _free(slopes: Floats) -> tuple[Floats, Floats]:
    """The length [P] of each parameter's slopes [M, P], and the directions [F, P] in units of these without any slope."""
    scale = np.linalg.norm(slopes, axis=0)
    _, singular, directions = np.linalg.svd(slopes / np.where(scale > 0, scale, 1), full_matrices=True)
    values = np.zeros(len(directions))
    values[: len(singular)] = singular
    return scale, np.asarray(directions[values < SINGULAR * max(values[0], 1e-300)])


def _points(fit: Fit, settings: NDArray[np.int64]) -> Iterator[Diagnostic]:
    distinct, parameters = len(np.unique(settings)), len(fit.law.parameters)
    if distinct < parameters + SPARE_SETTINGS:
        yield Diagnostic(
            "few-points",
            f"{len(settings)} points at {distinct} different settings for {parameters} parameters: little or nothing is left "
            "to contradict the law",
        )
    if len(settings) <= parameters:
        yield Diagnostic(
            "no-interval",
            f"{len(settings)} points for {parameters} parameters leave nothing to estimate the scatter from, so there is no "
            "interval; run more seeds or settings",
        )
    for column, name in ((N_PARAMS, "model sizes"), (TOKENS, "budgets")):
        if column in fit.columns:
            values = fit.columns[column]
            if values.max() / values.min() < NARROW:
                yield Diagnostic(
                    "narrow-range",
                    f"{name} span a factor of {values.max() / values.min():.2g} only, below {NARROW:g}: an exponent read from "
                    "that says little outside",
                )


def _rows(fit: Fit) -> Iterator[Diagnostic]:
    if len(fit.repeated):
        shown = ", ".join(str(index) for index in fit.repeated[:5]) + (", ..." if len(fit.repeated) > 5 else "")
        yield Diagnostic(
            "equal-rows",
            f"{len(fit.repeated)} rows (counted from 0: {shown}) equal an earlier one to the last digit of the loss: no other "
            "seed does that, so each counts once; remove them from the table",
        )
    if fit.clusters is not None and fit.clusters < len(fit.law.parameters) + SPARE_CLUSTERS:
        what = (
            "intervals are wide, as so few say little of their own scatter"
            if len(fit.theta_samples)
            else "there is no interval"
        )
        yield Diagnostic("few-clusters", f"{fit.clusters} clusters for {len(fit.law.parameters)} parameters: {what}")


def _unequal_noise(fit: Fit, settings: NDArray[np.int64]) -> Iterator[Diagnostic]:
    """Bartlett's test of equal scatter between seeds, and the scatter of the loudest and quietest third of the settings."""
    from scipy.stats import bartlett

    logs = np.log(fit.loss)
    groups = [logs[settings == number] for number in np.unique(settings)]
    groups = [group for group in groups if len(group) > 1 and np.ptp(group) > 0]
    if len(groups) < 2 or bartlett(*groups).pvalue >= UNEQUAL:
        return
    spreads = sorted(float(np.std(group, ddof=1)) for group in groups)
    third = max(len(spreads) // 3, 1)
    times = float(np.sqrt(np.mean(np.square(spreads[-third:])) / np.mean(np.square(spreads[:third]))))
    yield Diagnostic(
        "unequal-noise",
        f"the loudest third of the settings scatters {times:.0f} times as much between seeds as the quietest: intervals take "
        "all points to scatter alike, so they are too narrow where it is loud",
    )


def _between(fit: Fit) -> Iterator[Diagnostic]:
    times = float(between_ratios.excess(fit.law, fit.theta[None], fit.columns)[0])
    if times > 1:
        yield Diagnostic(
            "wild-between-ratios",
            f"between the ratios that were run the law leaves their losses {times:.2g} times as far as a smooth curve may: "
            "it says nothing about the best ratio",
        )


def _flatness(fit: Fit, errors: Floats) -> Iterator[Diagnostic]:
    loose = []
    for name, error, value in zip(fit.law.parameters, errors, fit.theta, strict=True):
        if np.isinf(error):
            loose.append(f"{name} not at all")
        elif name in fit.law.factors and error > UNKNOWN_FACTOR:
            loose.append(f"{name} to a factor of {np.exp(min(error, 700)):.2g}")
        elif name in ("alpha", "beta") and error > UNKNOWN_EXPONENT * abs(value):
            loose.append(f"{name} = {value:.3g} to {error:.2g}")
    if loose:
        yield Diagnostic(
            "flat-optimum",
            f"the points determine {', '.join(loose)}: other parameters fit as well. Trust predictions between the points, not "
            "parameters and not predictions far outside",
        )


def _floor(fit: Fit) -> Iterator[Diagnostic]:
    if "E" not in fit.law.parameters:
        return
    floor, lowest = fit.params["E"], float(fit.loss.min())
    bound = fit.intervals["95"]["E"][0] if "E" in fit.intervals.get("95", {}) else floor
    if min(floor, bound) < FLOOR_SHARE * lowest:
        yield Diagnostic(
            "floor-at-zero",
            f"E = {floor:.3g} (95 % interval from {bound:.3g}) is at its bound, 0, beside losses from {lowest:.3g}: the points "
            "show no floor, so do not extrapolate towards one",
        )


def _starts(fit: Fit, errors: Floats, other_optima: tuple[Floats, Floats]) -> Iterator[Diagnostic]:
    starts = fit.starts
    if starts.total >= 10 * RARE_START and starts.at_best < RARE_START:
        yield Diagnostic(
            "starts-disagree",
            f"{starts.at_best} of {starts.total} starts ended at the lowest objective: there may be a lower one still",
        )
    safe = np.where(np.isfinite(errors) & (errors > 0), errors, np.inf)
    for theta, objective in zip(*other_optima, strict=True):
        distance = np.abs(theta - fit.theta) / safe
        worst = int(distance.argmax())
        if distance[worst] > OPTIMA_DISTANCE:
            yield Diagnostic(
                "starts-disagree",
                f"another optimum, {objective / fit.objective - 1:.1%} higher only, has {fit.law.parameters[worst]} "
                f"{distance[worst]:.1f} standard errors away",
            )
            return


def _signs(fit: Fit) -> Iterator[Diagnostic]:
    for name in ("alpha", "beta"):
        if fit.params.get(name, 1.0) <= 0:
            what = "model size" if name == "alpha" else "tokens"
            yield Diagnostic(
                "wrong-sign", f"{name} = {fit.params[name]:.3g}: the loss rises with {what}; no floor can be read from this fit"
            )


def lack_of_fit(fit: Fit, solve: Solver, settings: NDArray[np.int64]) -> tuple[float, int, int] | None:
    """The p-value of the law against "any value per setting", and two degrees of freedom; None without replications.

    The F-test of lack of fit, on log losses: scatter of the settings' means around the law's least-squares fit, against the
    scatter of replications (seeds) around their means.
    """
    from scipy.stats import f as f_distribution

    counts = np.bincount(settings)
    free, pure = int((counts > 0).sum()) - len(fit.law.parameters), int(len(settings) - (counts > 0).sum())
    if free < 1 or pure < 1:
        return None
    log_loss = np.log(fit.loss)
    means = np.bincount(settings, log_loss) / counts
    scatter = float(np.sum((log_loss - means[settings]) ** 2)) / pure
    squares = solve(fit.theta[None], 1e6, tolerance=1e-14).objective[0] * 2
    misfit = max(float(squares) - scatter * pure, 0.0) / free
    if scatter == 0:
        return (1.0 if misfit == 0 else 0.0), free, pure
    return float(f_distribution.sf(misfit / scatter, free, pure)), free, pure


def nested_p(solve: Solver, theta: Floats, simpler: Solver, simple_theta: Floats) -> float | None:
    """The p-value of a law against one that is its special case, by an F-test of least squares on log losses; None if no
    degree of freedom is left.

    Args:
        solve: of the larger law and its points.
        theta: [P] near its optimum.
        simpler: of the smaller law at the same points.
        simple_theta: [Q] near its optimum, Q below P.
    """
    from scipy.stats import f as f_distribution

    extra, free = len(theta) - len(simple_theta), len(solve.log_loss) - len(theta)
    if free < 1:
        return None
    whole = float(solve(theta[None], 1e6, tolerance=1e-14).objective[0])
    part = float(simpler(simple_theta[None], 1e6, tolerance=1e-14).objective[0])
    gained = max(part - whole, 0.0) / extra
    return float(f_distribution.sf(gained / (whole / free), extra, free)) if whole > 0 else (0.0 if gained > 0 else 1.0)


def _lack_of_fit(fit: Fit, solve: Solver, settings: NDArray[np.int64]) -> Iterator[Diagnostic]:
    tested = lack_of_fit(fit, solve, settings)
    if tested is not None and tested[0] < REJECTED:
        p, free, pure = tested
        yield Diagnostic(
            "law-rejected",
            f"the points miss the law by more than the seeds scatter (lack of fit, F({free}, {pure}), p = {p:.1g}): the law is "
            "wrong for these runs, or seeds of one setting share something, such as the order of their text, so that they "
            "scatter too little (`--cluster` by setting); intervals do not know that",
        )


def least_squares_covariance(slopes: Floats, residuals: Floats) -> tuple[Floats, float]:
    """Covariance [P, P] of theta and variance of one log loss, from slopes [M, P] of log L and residuals [M].

    Directions without slope have no variance here; `log_errors` finds them.
    """
    variance = float(np.sum(residuals**2)) / max(len(slopes) - slopes.shape[1], 1)
    scale = np.linalg.norm(slopes, axis=0)
    scaled = slopes / np.where(scale > 0, scale, 1)
    inverse = np.linalg.pinv(scaled.T @ scaled, hermitian=True)
    safe = np.where(scale > 0, scale, np.inf)
    return np.asarray(variance * inverse / np.outer(safe, safe)), variance


def holdout_p(fit: Fit) -> float | None:
    """P-value of the mean error of the held-out points, against what fit and scatter explain; None if nothing is left to judge.

    Student's t: the mean log error over its standard error, which is made of the law's at these points and of the mean run's.
    """
    from scipy.stats import t as student

    held = fit.holdout
    freedom = len(fit.points) - len(fit.theta)
    if held is None or freedom < 1:
        return None
    slopes = fit.law.gradient(fit.theta, fit.columns)
    covariance, variance = least_squares_covariance(slopes, fit.residuals)
    mean_slope = fit.law.gradient(fit.theta, held.columns).mean(axis=0)
    error = float(np.sqrt(mean_slope @ covariance @ mean_slope + variance / held.points))
    miss = float(np.mean(fit.law.log_predict(fit.theta, held.columns) - np.log(held.loss)))
    return float(2 * student.sf(abs(miss) / max(error, 1e-12), freedom))


def _holdout(fit: Fit) -> Iterator[Diagnostic]:
    held, p = fit.holdout, holdout_p(fit)
    if held is None or p is None or p >= REJECTED:
        return
    side = "above" if held.mean_relative_error > 0 else "below"
    inside, outside, signed = fit.mean_absolute_relative_error, held.mean_absolute_relative_error, held.mean_relative_error
    yield Diagnostic(
        "holdout-missed",
        f"held-out points are missed by {outside:.2%} on average (predicted {side} measured by {abs(signed):.2%}, "
        f"p = {p:.1g}), points fitted to by {inside:.2%}: the law does not extrapolate here",
    )


def dependent_rows(column: str, rows: int, values: int) -> Diagnostic:
    """The warning of a table in which `values` names of runs stand in `rows` rows."""
    return Diagnostic(
        "dependent-rows",
        f"column '{column}' has {values} values in {rows} rows: rows of one run depend on each other, and intervals are too "
        f"narrow by far; use one row per run, or `--cluster {column}`",
    )


def seeds_together(fit: Fit, seeds: Sequence[Any]) -> Iterator[Diagnostic]:
    """The warning that runs of one seed are off together at all settings: then they are not independent of each other.

    An analysis of variance of the log losses around the mean of their setting, over the settings that have every seed: the
    scatter of the seeds' means against what is left, by an F-test. It needs no law.

    Args:
        fit: without clusters.
        seeds: the seed [M] of every row that the fit was given, those it left out included.
    """
    from scipy.stats import f as f_distribution

    names, label = np.unique(np.asarray(seeds, dtype=str)[fit.points], return_inverse=True)
    setting = np.unique(np.stack(list(fit.columns.values()), axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    cells = np.full((int(setting.max()) + 1, len(names)), np.nan)
    cells[setting, label] = np.log(fit.loss)  # of rows of one seed and setting, the last
    cells = cells[~np.isnan(cells).any(axis=1)]
    settings, count = cells.shape
    if fit.clusters is not None or settings < 2 or count < 2:
        return
    around = cells - cells.mean(axis=1, keepdims=True)
    means = around.mean(axis=0)
    between = settings * float(np.sum(means**2)) / (count - 1)
    free = (settings - 1) * (count - 1)
    within = float(np.sum((around - means) ** 2)) / free
    if within <= 0:
        return
    p = float(f_distribution.sf(between / within, count - 1, free))
    if p < REJECTED:
        shared = max(between - within, 0.0) / settings
        yield Diagnostic(
            "seeds-together",
            f"runs of one seed are off together: about {shared / (shared + within):.0%} of the scatter between {count} seeds "
            f"is the same at all {settings} settings (p = {p:.1g}), as when they start from the same weights or read their "
            "text in one order; intervals take all runs for independent, so they are too narrow: `--cluster` with the seeds",
        )


def repetition_ignored(epochs: Floats | None) -> Iterator[Diagnostic]:
    """The warning of a law that does not know epochs, where they vary.

    epochs: [M] or [M, K].
    """
    if epochs is None or epochs.size == 0:
        return
    highest = np.nanmax(np.maximum(epochs, 1).reshape(len(epochs), -1), axis=1)
    if highest.max() > 1.05 * highest.min() and highest.max() > 2:
        yield Diagnostic(
            "repetition-ignored",
            f"runs saw their text {highest.min():.3g} to {highest.max():.3g} times, and this law counts every token as new: "
            "fit the law 'repetition', or use runs of equal epochs",
        )
