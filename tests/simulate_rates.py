"""Simulated sweeps of the learning rate, and studies with a rate that is off: how often the answers are right.

python -m tests.simulate_rates sweeps 200     # intervals of the rule, power and false positives of a sweep
python -m tests.simulate_rates bends 200      # power and false positives without one
"""

from __future__ import annotations

import sys

import numpy as np

from megatron_synth.study.fit.fit import fit
from megatron_synth.study.fit.noise import Noise, noise_floor
from megatron_synth.study.rates.mis_set import bends, off_rates
from megatron_synth.study.rates.rule import Point, fit_rule

CURVATURE = 0.01
"""Of log loss per square of log rate: a rate that is off by 2 costs 0.5 %, by 4 it costs 2 %."""
EXPONENTS = {"N": -0.25, "D": -0.3, "B": 0.4}
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
SIZES, BUDGETS, BATCHES = (1e8, 4e8, 1e9), (1e9, 1e10, 1e11), (2**19, 2**21)


def best_rate(n_params: float, tokens: float, batch: float) -> float:
    """The true best rate."""
    parts = zip((n_params / 1e9, tokens / 1e10, batch / 2**20), EXPONENTS.values(), strict=True)
    return float(3e-4 * np.prod([ratio**exponent for ratio, exponent in parts]))


def true_loss(n_params: float, tokens: float, factor: float) -> float:
    """The loss at a rate that is off by a factor."""
    clean = 1.8 + 480 / n_params**0.348 + 2085 / tokens**0.366
    return float(clean * np.exp(CURVATURE * np.log(factor) ** 2))


def sweep(
    random: np.random.Generator, noise: float, seeds: int, off: float = 1.0
) -> tuple[list[Point], dict[tuple[float, float, float], float]]:
    """A sweep around the true rule, whose middle is off by `off` at the largest budget; and the rates of the middle."""
    points, used = [], {}
    for n_params in SIZES:
        for tokens in BUDGETS:
            for batch in BATCHES:
                best = best_rate(n_params, tokens, batch)
                middle = best * (off if tokens == max(BUDGETS) else 1.0)
                used[n_params, tokens, batch] = middle
                for factor in FACTORS:
                    lr = middle * factor
                    for _ in range(seeds):
                        loss = true_loss(n_params, tokens, lr / best) * np.exp(noise * random.standard_normal())
                        points.append(Point((n_params, tokens, batch), n_params, tokens, batch, lr, float(loss)))
    return points, used


def sweep_rates(noise: float, seeds: int, off: float, draws: int, seed: int = 0) -> dict[str, float]:
    """How often each exponent's interval holds it, a cell of the largest budget is found off, and another is."""
    random = np.random.default_rng(seed)
    counted = dict.fromkeys((*EXPONENTS, "off", "wrong"), 0.0)
    for _ in range(draws):
        points, used = sweep(random, noise, seeds, off)
        rule = fit_rule(points)
        assert rule is not None
        for axis, truth in EXPONENTS.items():
            counted[axis] += rule.exponents[axis].low <= truth <= rule.exponents[axis].high
        found = off_rates(points, used)
        counted["off"] += any(one.found for one in found if one.tokens == max(BUDGETS))
        counted["wrong"] += any(one.found for one in found if one.tokens != max(BUDGETS))
    return {name: count / draws for name, count in counted.items()}


def bend_rate(
    noise: float, seeds: int, arms: int, budgets: int, lift: float, draws: int, *, only_one: bool = False, seed: int = 0
) -> float:
    """How often a lift of all arms (or of one) at the longest of the budgets is found."""
    random, hits = np.random.default_rng(seed), 0
    tokens = np.repeat(np.geomspace(1e9, 1e11, budgets), seeds)
    for _ in range(draws):
        fits, rows = {}, []
        for arm in range(arms):
            clean = 2.2 + 2085 * (1 + 0.1 * arm) / tokens**0.366
            raised = np.where(tokens == tokens.max(), 1 + (lift if arm == 0 or not only_one else 0.0), 1.0)
            losses = clean * raised * np.exp(noise * random.standard_normal(len(tokens)))
            fits[f"arm{arm}", "s"] = fit("data", {"tokens": tokens}, losses, starts=60, bootstraps=0)
            rows += [((arm, count), loss) for count, loss in zip(tokens, losses, strict=True)]
        known: Noise | None = noise_floor([cell for cell, _ in rows], [loss for _, loss in rows])
        hits += any(one.found for one in bends(fits, {"s": known}))
    return hits / draws


def sweeps_table(draws: int) -> None:
    """Print what a sweep of 3 sizes x 3 budgets x 2 batches x 5 rates shows."""
    print("| noise | seeds | rate at the longest budget | N | D | B | found off | another cell found off |")
    print("| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for noise, seeds, off in (
        (0.001, 1, 1.0),
        (0.003, 1, 1.0),
        (0.003, 2, 1.0),
        (0.003, 1, 2.0),
        (0.003, 1, 3.0),
        (0.01, 2, 3.0),
    ):
        found = sweep_rates(noise, seeds, off, draws)
        coverage = " | ".join(f"{found[axis]:.0%}" for axis in EXPONENTS)
        rate = "the best" if off == 1 else f"{off:g} times the best"
        print(f"| {noise:.1%} | {seeds} | {rate} | {coverage} | {found['off']:.1%} | {found['wrong']:.1%} |", flush=True)


def bends_table(draws: int) -> None:
    """Print how often a lift at the longest budget is found without a sweep."""
    print("| arms | budgets | seeds | noise | no lift | 0.5 % | 1 % | 2 % | 5 % in one arm alone |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for arms, budgets, seeds, noise in (
        (4, 4, 3, 0.003),
        (4, 6, 1, 0.003),
        (4, 8, 3, 0.003),
        (10, 8, 1, 0.003),
        (4, 8, 3, 0.01),
    ):
        rates = [bend_rate(noise, seeds, arms, budgets, lift, draws) for lift in (0.0, 0.005, 0.01, 0.02)]
        rates.append(bend_rate(noise, seeds, arms, budgets, 0.05, draws, only_one=True))
        print(
            f"| {arms} | {budgets} | {seeds} | {noise:.1%} | " + " | ".join(f"{rate:.1%}" for rate in rates) + " |", flush=True
        )


TABLES = {"sweeps": sweeps_table, "bends": bends_table}


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1] not in TABLES:
        sys.exit(f"usage: python -m tests.simulate_rates {'|'.join(TABLES)} [DRAWS]")
    TABLES[sys.argv[1]](int(sys.argv[2]) if len(sys.argv) > 2 else 200)
