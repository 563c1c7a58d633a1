"""Fit a law to runs: the best of many starts, with intervals, hold-outs and what speaks against believing it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit import between_ratios, bootstrap, diagnostics
from megatron_synth.study.fit.catalog import AnyLaw, law_named
from megatron_synth.study.fit.diagnostics import Diagnostic
from megatron_synth.study.fit.laws import Columns, Floats
from megatron_synth.study.fit.solvers.newton import Solutions
from megatron_synth.study.fit.solvers.nonlinear import NonlinearLaw, with_fixed
from megatron_synth.study.fit.solvers.solve import Solver
from megatron_synth.study.fit.table.row_filter import matching

DELTA = 1e-3
SAME_OBJECTIVE = 1e-6  # relative; starts that end this close ended at one optimum
SIMPLER = {"rectified": "data"}  # laws with a special case that is a law of its own
SIMPLE_STARTS = 60
SINGLE_STARTS = 24  # of a law that is fitted one start at a time
MOST_OPTIMA, OPTIMUM_MARGIN = 3, 1.05  # optima that a bootstrap starts from, and how much higher than the best they may be

RACE_STEPS = 10  # of each start before the lowest are followed alone
BOUNDED_MARGIN = 2.0  # how much higher an optimum may be that keeps to the measured ratios than one that does not

Progress = Callable[[str, int, int], object]


@dataclass(frozen=True)
class Holdout:
    """How the law predicts points that it was not fitted to. Errors are |predicted - measured| / measured.

    columns, loss: those points, [M] each.
    """

    rule: str
    points: int
    mean_absolute_relative_error: float
    worst: float
    worst_index: int
    mean_relative_error: float
    columns: dict[str, Floats] = field(repr=False)
    loss: Floats = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """As law.json holds it."""
        return {name: value for name, value in self.__dict__.items() if name not in ("columns", "loss")}


@dataclass(frozen=True)
class Starts:
    """What came of the starts: how many, how many converged, how many ended at the best optimum."""

    total: int
    converged: int
    at_best: int


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    params: by name, factors as they are (not as logarithms); those held fixed, too.
    objective: sum of Huber's losses of the log residuals over the points fitted to.
    standard_errors, intervals: by bootstrap; empty without one, and where nothing is left to estimate the scatter from.
        Intervals by level ("90", "95") and parameter; parameters that the points do not determine have neither.
    points, dropped: indices of the rows fitted to, and of those left out for their high loss.
    repeated: indices of rows that are equal to an earlier one in every column of the law and in the loss; each counts once.
    tails: parameters whose standard error is half the central 68 % of the bootstraps, as few draws would rule it.
    free: [P, F], directions in theta along which no prediction at the points changes.
    residuals: log(loss) - log(predicted) [M] of the points fitted to.
    theta, theta_samples: [P] and [bootstraps, P], internal parameters (logarithms of factors).
    columns: the columns [M] of the points fitted to.
    """

    law: AnyLaw
    params: dict[str, float]
    objective: float
    delta: float
    standard_errors: dict[str, float]
    intervals: dict[str, dict[str, list[float]]]
    points: NDArray[np.int64]
    dropped: NDArray[np.int64]
    residuals: Floats
    holdout: Holdout | None
    warnings: tuple[Diagnostic, ...]
    starts: Starts
    theta: Floats = field(repr=False)
    theta_samples: Floats = field(repr=False)
    columns: dict[str, Floats] = field(repr=False)
    loss: Floats = field(repr=False)
    repeated: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    tails: tuple[str, ...] = ()
    free: Floats = field(default_factory=lambda: np.zeros((0, 0)), repr=False)
    clusters: int | None = None

    @property
    def undetermined(self) -> tuple[str, ...]:
        """Parameters that can be changed, together with others, without changing any prediction at the points."""
        return diagnostics.undetermined(self.law, self.theta, self.columns)

    @property
    def samples(self) -> Floats:
        """Parameters [bootstraps, P] of every bootstrap, in the order of `law.parameters`."""
        named = self.law.to_params(self.theta_samples)
        return np.stack([named[name] for name in self.law.parameters], axis=-1)

    @property
    def mean_absolute_relative_error(self) -> float:
        """Of the points fitted to."""
        return float(np.mean(np.abs(np.expm1(-self.residuals))))

    def predict(self, columns: Columns) -> Floats:
        """The loss [M] at other points."""
        return self.law.predict(self.theta, columns)

    def predict_samples(self, columns: Columns) -> Floats:
        """The loss [bootstraps, M] by every bootstrap."""
        return self.law.predict(self.theta_samples, columns)

    def predict_interval(self, columns: Columns, level: float = 90) -> tuple[Floats, Floats]:
        """Lower and upper ends [M] of the interval of the law's value, `level` in percent.

        Of the fitted curve: a single run scatters around it by its seed besides. Not a number where the points do not determine
        the prediction.
        """
        if not len(self.theta_samples):
            raise UserError("no interval without bootstraps (bootstraps=1000 or so), or with no more points than parameters")
        low, high = bootstrap.interval(self.predict_samples(columns), level)
        known = self.determines(columns)
        return np.where(known, low, np.nan), np.where(known, high, np.nan)

    def determines(self, columns: Columns) -> NDArray[np.bool_]:
        """Whether the points determine the loss [M] at other points."""
        slopes = self.law.gradient(self.theta, columns)
        if not self.free.size:
            return np.ones(len(slopes), dtype=bool)
        limit = diagnostics.NOTICED / np.sqrt(len(self.points))
        return np.asarray((np.abs(slopes @ self.free) < limit).all(axis=1))

    def to_json(self) -> dict[str, Any]:
        """What law.json holds."""
        return {
            "law": self.law.name,
            "formula": self.law.formula,
            "source": self.law.source,
            "params": self.params,
            "objective": self.objective,
            "delta": self.delta,
            "standard_errors": self.standard_errors,
            "intervals": self.intervals,
            "bootstraps": len(self.theta_samples),
            "points": len(self.points),
            "dropped": [int(index) for index in self.dropped],
            "repeated": [int(index) for index in self.repeated],
            "undetermined": list(self.undetermined),
            "standard_errors_of_central_68": list(self.tails),
            "clusters": self.clusters,
            "mean_absolute_relative_error": self.mean_absolute_relative_error,
            "holdout": None if self.holdout is None else self.holdout.to_json(),
            "starts": dict(self.starts.__dict__),
            "warnings": [{"code": diagnostic.code, "message": diagnostic.message} for diagnostic in self.warnings],
        }


def fit(
    law: str | AnyLaw,
    columns: Columns,
    loss: ArrayLike,
    *,
    fixed: Mapping[str, float] | None = None,
    delta: float = DELTA,
    starts: int | ArrayLike | None = None,
    finish: int | None = None,
    drop_highest_loss: int = 0,
    holdout: str | ArrayLike | None = None,
    bootstraps: int = 1000,
    seed: int = 0,
    cluster: Sequence[Any] | None = None,
    extra: Mapping[str, Sequence[Any] | Floats] | None = None,
    epochs: ArrayLike | None = None,
    progress: Progress | None = None,
) -> Fit:
    """Fit `law` to M points.

    Args:
        law: a law or its name.
        columns: `n_params`, `tokens`, `ratio` as the law needs them, each [M].
        loss: [M], above 0.
        fixed: values of parameters that are known and not to be fitted.
        delta: of Huber's loss on the log residuals.
        starts: how many of the law's grid (default all), or vectors theta [S, P].
        finish: how many of the starts are followed to their end: those that are lowest after a few steps. Default all; where
            many laws are fitted, this takes a fraction of the time and ends at the same optimum.
        drop_highest_loss: leave out so many of the points of highest loss.
        holdout: points to predict, not to fit: a mask [M], or a rule such as `tokens>100e9`.
        bootstraps: draws for the intervals; 0 for none.
        seed: of the draws.
        cluster: labels [M]; points of one label depend on each other, such as checkpoints of one run. Intervals then come from
            clusters, and the tests of lack of fit and of the hold-out, which take points to be independent, are left out.
        extra: other columns [M] that a hold-out rule may name.
        epochs: [M], how often each run saw its text, for the warning that the law does not know it.
        progress: called with what is done, how much of it, and of how much.

    Raises:
        UserError: the points cannot determine the law, or a value is no loss, size, budget or ratio.
    """
    chosen = law_named(law) if isinstance(law, str) else law
    losses = checked_losses(loss)
    values = {name: _column(name, columns[name], len(losses)) for name in chosen.columns if name in columns}
    chosen.check(values)  # all points, also those that are held out
    out = np.zeros(len(losses), dtype=bool)
    rule = ""
    if holdout is not None:
        rule = holdout if isinstance(holdout, str) else "a given mask"
        out = holdout_mask(holdout, {**columns, "loss": losses, **(extra or {})}, len(losses))
    inside = np.flatnonzero(~out)
    repeated = inside[_equal_to_earlier({name: array[inside] for name, array in values.items()}, losses[inside])]
    kept, dropped = _split(losses, np.setdiff1d(inside, repeated), drop_highest_loss)
    clusters = None if cluster is None else _numbered(cluster, len(losses))[kept]
    clusters = None if clusters is None else np.unique(clusters, return_inverse=True)[1].reshape(-1)
    used = {name: array[kept] for name, array in values.items()}
    chosen = chosen.reduced(used)
    used = {name: used[name] for name in chosen.columns}
    settings = distinct_settings(used, len(kept))
    single = fixed or isinstance(chosen, NonlinearLaw)
    grid = start_grid(chosen, used, np.log(losses[kept]), SINGLE_STARTS if single and starts is None else starts)
    if fixed:
        whole, chosen = chosen, with_fixed(chosen, fixed)
        grid = np.unique(grid[:, [whole.parameters.index(name) for name in chosen.parameters]], axis=0)
    _check_enough(chosen, settings)

    log_loss = np.log(losses[kept])
    solve = Solver(chosen, used, log_loss)
    advance = _counter(progress, "starts", len(grid))
    found = race(solve, grid, delta, finish, advance) if finish is not None else solve(grid, delta, progress=advance)
    found = _bounded(found, chosen, used)
    optima = distinct_optima(found)
    best = solve(found.theta[optima[:1]], delta, iterations=300, tolerance=1e-15)
    theta, objective = best.theta[0], float(best.objective[0])
    samples: Floats = np.zeros((0, len(theta)))
    if bootstraps:
        centers = np.vstack([theta, found.theta[optima[1:]]])
        advance = _counter(progress, "bootstraps", bootstraps * len(centers))
        samples = bootstrap.draw(solve, centers, delta, bootstraps, seed, clusters=clusters, progress=advance)
    loose = diagnostics.undetermined(chosen, theta, used)
    errors, intervals, tails = bootstrap.summary(chosen, samples, loose) if len(samples) > 1 else ({}, {}, ())
    lowest = float(found.objective[optima[0]])  # of the starts, as the last steps below go lower than any of them
    at_best = int((found.objective <= lowest * (1 + SAME_OBJECTIVE) + 1e-30).sum())
    result = Fit(
        law=chosen,
        params={**getattr(chosen, "fixed", {}), **chosen.to_params(theta)},
        objective=objective,
        delta=delta,
        standard_errors=errors,
        intervals=intervals,
        points=kept,
        dropped=dropped,
        residuals=log_loss - chosen.log_predict(theta, used),
        holdout=_judge(chosen, theta, values, losses, np.flatnonzero(out), rule) if out.any() else None,
        warnings=(),
        starts=Starts(len(grid), int(found.converged.sum()), at_best),
        theta=theta,
        theta_samples=samples,
        columns=used,
        loss=losses[kept],
        repeated=repeated,
        tails=tails,
        free=diagnostics.free_directions(chosen, theta, used),
        clusters=None if clusters is None else len(np.unique(clusters)),
    )
    other_optima = found.theta[optima[1:]], found.objective[optima[1:]]
    seen = None if epochs is None else _column("epochs", epochs, len(losses))[kept]
    doubts = diagnostics.find(result, solve, settings, other_optima, seen)
    if chosen.name in SIMPLER and not fixed:
        doubts += _simpler(solve, theta, SIMPLER[chosen.name], delta)
    return replace(result, warnings=doubts)


def _simpler(solve: Solver, theta: Floats, name: str, delta: float) -> tuple[Diagnostic, ...]:
    """The doubt that a law with fewer parameters, which is a special case of this one, does as well."""
    law = law_named(name)
    other = Solver(law, {column: solve.columns[column] for column in law.columns}, solve.log_loss)
    found = other(start_grid(law, other.columns, solve.log_loss, SIMPLE_STARTS), delta)
    best = found.theta[found.objective.argmin()]
    p = diagnostics.nested_p(solve, theta, other, best)
    if p is None or p < diagnostics.NEEDED:
        return ()
    return (
        Diagnostic(
            "simpler-law-does",
            f"the law '{name}', with {len(theta) - len(best)} parameter less, fits as well (F-test, p = {p:.2g}): the runs do "
            f"not show that '{solve.law.name}' is needed",
        ),
    )


def start_grid(law: AnyLaw, columns: Columns, log_loss: Floats, starts: int | ArrayLike | None = None) -> Floats:
    """Starting values theta [S, P].

    The law's grid gives exponents as they are, and each factor as the logarithm of its term's share in the loss at the center
    of the points. (A grid of the factors themselves, as published for the joint law, has most terms so small that they never
    recover: 3 % of its starts reach the optimum of the published data, and 82 % of these.)

    Raises:
        UserError: vectors of the wrong shape, or fewer than one start.
    """
    names = law.parameters
    if starts is not None and not isinstance(starts, int):
        given = np.atleast_2d(np.asarray(starts, dtype=np.float64))
        if given.shape[1] != len(names) or not np.isfinite(given).all():
            raise UserError(f"starts: expected finite vectors of {len(names)} ({', '.join(names)}), got shape {given.shape}")
        return given
    grid = np.array(list(itertools.product(*(law.starts[name] for name in names))))
    terms = [] if isinstance(law, NonlinearLaw) else list(zip(law.terms, law.design(columns), strict=True))
    for term, features in terms:
        factor = next(name for name in term if name in law.factors)
        others = [names.index(name) for name in term if name != factor]
        grid[:, names.index(factor)] += log_loss.mean() - grid[:, others] @ features.mean(axis=0)[others]
    if starts is None:
        return grid
    if starts < 1:
        raise UserError(f"starts: expected at least 1, got {starts}")
    return grid[np.sort(np.random.default_rng(0).permutation(len(grid))[:starts])]


def race(solve: Solver, grid: Floats, delta: float, finish: int, advance: Callable[[int], None] | None = None) -> Solutions:
    """The ends of all starts after a few steps, and of the lowest `finish` of them after all steps."""
    if isinstance(solve.law, NonlinearLaw) or len(grid) <= finish:
        return solve(grid, delta, progress=advance)
    found = solve(grid, delta, iterations=RACE_STEPS, progress=advance)
    lowest = np.argsort(np.where(np.isfinite(found.objective), found.objective, np.inf), kind="stable")[:finish]
    ends = solve(found.theta[lowest], delta)
    theta, objective, converged = found.theta.copy(), found.objective.copy(), found.converged.copy()
    theta[lowest], objective[lowest], converged[lowest] = ends.theta, ends.objective, ends.converged
    return Solutions(theta, objective, converged)


def distinct_optima(found: Solutions) -> list[int]:
    """Indices of the best solution, and of up to two others that end at another optimum nearly as low."""
    order = np.argsort(np.where(np.isfinite(found.objective), found.objective, np.inf), kind="stable")
    lowest = found.objective[order[0]]
    kept = [int(order[0])]
    for index in order[1:]:
        value = found.objective[index]
        if value > lowest * OPTIMUM_MARGIN or len(kept) == MOST_OPTIMA:
            break
        if found.converged[index] and value > found.objective[kept[-1]] * (1 + SAME_OBJECTIVE):
            kept.append(int(index))
    return kept


def _bounded(found: Solutions, law: AnyLaw, columns: Columns) -> Solutions:
    """The solutions without those that leave the measured ratios far behind, where others are nearly as low.

    With few ratios a law in the ratio has optima that fit the scatter by a spike between two ratios.
    """
    wild = between_ratios.excess(law, found.theta, columns) > 1
    tame = ~wild & found.converged
    if not wild.any() or not tame.any() or found.objective[tame].min() > BOUNDED_MARGIN * found.objective.min():
        return found
    return Solutions(found.theta[~wild], found.objective[~wild], found.converged[~wild])


def _equal_to_earlier(columns: Mapping[str, Floats], losses: Floats) -> NDArray[np.int64]:
    """Positions of the points that equal an earlier one in every column and in the loss, to the last digit.

    Seeds never do. A loss of four digits or fewer may, by rounding: it is no sign.
    """
    rows = np.stack([*columns.values(), losses], axis=1)
    first = np.unique(rows, axis=0, return_index=True)[1]
    later = np.setdiff1d(np.arange(len(losses)), first)
    precise = np.array([float(f"{loss:.4g}") != loss for loss in losses[later]], dtype=bool)
    return np.asarray(later[precise] if len(later) else later, dtype=np.int64)


def _numbered(labels: Sequence[Any], points: int) -> NDArray[np.int64]:
    if len(labels) != points:
        raise UserError(f"cluster: expected {points} labels, one per loss, got {len(labels)}")
    return np.unique(np.asarray(labels, dtype=str), return_inverse=True)[1].reshape(-1).astype(np.int64)


def holdout_mask(holdout: str | ArrayLike, columns: Mapping[str, Any], points: int) -> NDArray[np.bool_]:
    """Which of the points are held out.

    Raises:
        UserError: the rule cannot be read, or holds out no point or all.
    """
    if isinstance(holdout, str):
        out, named = matching(holdout, columns, points), f"'{holdout}'"
    else:
        out, named = np.asarray(holdout), "the mask"
        if out.shape != (points,) or out.dtype != np.bool_:
            raise UserError(f"holdout: expected a mask of {points} booleans, got {out.dtype} of shape {out.shape}")
    if not out.any() or out.all():
        raise UserError(f"holdout: {named} holds out {int(out.sum())} of {points} points; at least one must be in and one out")
    return out


def checked_losses(loss: ArrayLike) -> Floats:
    """The losses [M].

    Raises:
        UserError: there is none, or one is not a finite number above 0.
    """
    losses = np.asarray(loss, dtype=np.float64)
    if losses.ndim != 1 or not len(losses):
        raise UserError(f"loss: expected one number per point, got shape {losses.shape}")
    wrong = np.flatnonzero(~(np.isfinite(losses) & (losses > 0)))
    if len(wrong):
        raise UserError(f"loss: expected numbers above 0; {len(wrong)} are not, first at point {wrong[0]}: {losses[wrong[0]]}")
    return losses


def distinct_settings(columns: Mapping[str, Floats], points: int) -> NDArray[np.int64]:
    """A number [M] per point, the same where all columns are equal (replications by seed)."""
    if not columns:
        return np.zeros(points, dtype=np.int64)
    rows = np.stack([columns[name] for name in columns], axis=1)
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _column(name: str, values: ArrayLike, points: int) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (points,):
        raise UserError(f"column {name}: expected {points} numbers, one per loss, got shape {array.shape}")
    return array


def _split(losses: Floats, inside: NDArray[np.int64], drop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices fitted to, and those dropped for their high loss."""
    if not 0 <= drop < len(inside):
        raise UserError(f"drop_highest_loss: expected 0 to {len(inside) - 1} of the {len(inside)} points, got {drop}")
    by_loss = inside[np.argsort(losses[inside], kind="stable")]
    return np.sort(by_loss[: len(inside) - drop]), np.sort(by_loss[len(inside) - drop :])


def _check_enough(law: AnyLaw, settings: NDArray[np.int64]) -> None:
    needed, distinct = len(law.parameters), len(np.unique(settings))
    if distinct < needed:
        raise UserError(
            f"law '{law.name}' has {needed} parameters ({', '.join(law.parameters)}): it needs points at {needed} different "
            f"settings of {', '.join(law.columns)} at least; got {len(settings)} points at {distinct}"
        )


def _judge(
    law: AnyLaw, theta: Floats, values: Mapping[str, Floats], losses: Floats, rows: NDArray[np.int64], rule: str
) -> Holdout:
    held = {name: values[name][rows] for name in law.columns}
    predicted = law.predict(theta, held)
    errors = predicted / losses[rows] - 1
    worst = int(np.abs(errors).argmax())
    return Holdout(
        rule=rule,
        points=len(rows),
        mean_absolute_relative_error=float(np.abs(errors).mean()),
        worst=float(abs(errors[worst])),
        worst_index=int(rows[worst]),
        mean_relative_error=float(errors.mean()),
        columns=held,
        loss=losses[rows],
    )


def _counter(progress: Progress | None, what: str, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    lock, done = threading.Lock(), 0

    def advance(count: int) -> None:
        nonlocal done
        with lock:  # chunks end in several threads
            done += count
            progress(what, done, total)

    return advance
