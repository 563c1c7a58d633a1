"""How often the intervals of a fit hold the truth: simulated runs of the law in D, from 1B to 200B tokens.

Errors of the runs are independent, or depend on each other in one of the ways of `ERRORS`, each with the same variance.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_synth.study.fit.fit import fit
from megatron_synth.study.fit.laws import LAWS, Floats

TRUTH = {"B": 2085.0, "beta": 0.366, "E": 2.2}
RANGE = (1e9, 200e9)
BEYOND = 10
"""Times the largest budget, where a prediction is judged, too."""
LEVEL = "90"
BOOTSTRAPS = 200
SHARED = 0.5
"""Of the variance, what runs have in common that depend on each other."""
NEXT = 0.8
"""Correlation of a run's checkpoints from one budget to the next."""

Errors = Callable[[np.random.Generator, int, int], Floats]


def independent(random: np.random.Generator, budgets: int, seeds: int) -> Floats:
    """[budgets, seeds] of unit variance."""
    return random.standard_normal((budgets, seeds))


def same_order(random: np.random.Generator, budgets: int, seeds: int) -> Floats:
    """All seeds of a budget read one text in one order: half the variance is theirs in common."""
    shared = random.standard_normal((budgets, 1))
    return np.asarray(np.sqrt(SHARED) * shared + np.sqrt(1 - SHARED) * independent(random, budgets, seeds))


def same_seed(random: np.random.Generator, budgets: int, seeds: int) -> Floats:
    """All budgets of a seed begin alike: half the variance is theirs in common."""
    shared = random.standard_normal((1, seeds))
    return np.asarray(np.sqrt(SHARED) * shared + np.sqrt(1 - SHARED) * independent(random, budgets, seeds))


def checkpoints(random: np.random.Generator, budgets: int, seeds: int) -> Floats:
    """The budgets of a seed are checkpoints of one run: what one is off by, the next is off by for the most part."""
    found = independent(random, budgets, seeds)
    for place in range(1, budgets):
        found[place] = NEXT * found[place - 1] + np.sqrt(1 - NEXT**2) * found[place]
    return found


@dataclass(frozen=True)
class Kind:
    """A way in which runs depend on each other. cluster: what `--cluster` is given, `budget` or `seed`; None for nothing."""

    errors: Errors
    cluster: str | None


KINDS = {
    "independent": Kind(independent, None),
    "seeds of a budget share the order of their text": Kind(same_order, "budget"),
    "budgets of a seed begin alike": Kind(same_seed, "seed"),
    "budgets are checkpoints of one run": Kind(checkpoints, "seed"),
}
BUDGETS = (4, 6, 10)
NOISES = (0.0005, 0.003, 0.01)


def coverage(kind: Kind, cluster: str | None, budgets: int, seeds: int, noise: float, draws: int) -> dict[str, float]:
    """How often the 90 % intervals hold the truth, by parameter and, as `far`, of the loss beyond; `none` without an interval.

    cluster: what the fit is told, `budget`, `seed` or None for nothing.
    """
    law, random = LAWS["data"], np.random.default_rng(0)
    theta = law.to_theta(TRUTH)
    tokens = np.repeat(np.geomspace(*RANGE, budgets), seeds)
    clean, far = law.predict(theta, {"tokens": tokens}), {"tokens": np.array([BEYOND * RANGE[1]])}
    truth = {**TRUTH, "far": float(law.predict(theta, far)[0])}
    labels: dict[str, NDArray[np.int64]] = {
        "budget": np.repeat(np.arange(budgets), seeds),
        "seed": np.tile(np.arange(seeds), budgets),
    }
    hits = dict.fromkeys((*truth, "none"), 0)
    for draw in range(draws):
        loss = clean * np.exp(noise * kind.errors(random, budgets, seeds).ravel())
        named = None if cluster is None else list(labels[cluster])
        found = fit("data", {"tokens": tokens}, loss, starts=theta, bootstraps=BOOTSTRAPS, seed=draw, cluster=named)
        if not found.intervals:
            hits["none"] += 1
            continue
        low, high = found.predict_interval(far)
        bounds = {**found.intervals[LEVEL], "far": [low[0], high[0]]}
        for name, value in truth.items():
            hits[name] += bool(bounds[name][0] <= value <= bounds[name][1])
    told = draws - hits["none"]
    return {name: count / told if told else float("nan") for name, count in hits.items() if name != "none"} | {
        "none": hits["none"] / draws
    }


def all_designs(draws: int, tell: Callable[[str], object] = print) -> list[dict[str, Any]]:
    """Coverage of every kind of errors, with the fit told of them; and of dependent ones with a fit that is not."""
    found = []
    for name, kind in KINDS.items():
        for cluster in dict.fromkeys((kind.cluster, None)):
            seeds = (1, 3, 5) if kind.cluster is None else (3, 5)
            noises = NOISES if cluster == kind.cluster else NOISES[1:2]
            for budgets, each, noise in itertools.product(BUDGETS, seeds, noises):
                tell(f"{name}, {budgets} budgets, {each} seeds, {noise:.2%}")
                rates = coverage(kind, cluster, budgets, each, noise, draws)
                found.append(
                    {
                        "errors": name,
                        "cluster": cluster,
                        "budgets": budgets,
                        "seeds": each,
                        "noise": noise,
                        "draws": draws,
                        **rates,
                    }
                )
    return found
