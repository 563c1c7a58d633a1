"""Truths that no law of ours has: what is said of the best ratio and of the speed-up where the law is wrong.

`python -m tests.wrong_laws ratio 100` and `... speed-up 100` print a table. An answer covers the truth, misses it, or is no answer
or one with a doubt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.noise import best_measured, noise_floor
from megatron_synth.study.fit.ratio.choice import choose
from megatron_synth.study.report.ratio import best_ratio_by, bracket
from tests.simulate import JOINT, MIXTURE, B, grid

LEVEL = 90.0
Loss = Callable[[Floats, Floats, Floats], Floats]


def _base(n: Floats, d: Floats) -> Floats:
    return np.asarray(JOINT["E"] + JOINT["A"] / n ** JOINT["alpha"] + JOINT["B"] / d ** JOINT["beta"])


def right_law(n: Floats, d: Floats, r: Floats) -> Floats:
    """The law `mixture` itself."""
    p = MIXTURE
    floor, size, data = (np.exp(value) for value in (p["e1"] * r + p["e2"] * r * r, p["a1"] * r, p["b1"] * r))
    return np.asarray(p["E"] * floor + p["A"] * size / n ** p["alpha"] + p["B"] * data / d ** p["beta"])


def hidden_domains(n: Floats, d: Floats, r: Floats) -> Floats:
    """The mean of two domains, each helped by its own text and little by the other."""
    own, other = 1 - r + 0.1 * r, r + 0.25 * (1 - r)
    data = 0.6 * (d * own) ** -JOINT["beta"] + 0.4 * (d * other) ** -JOINT["beta"]
    return np.asarray(JOINT["E"] + JOINT["A"] / n ** JOINT["alpha"] + JOINT["B"] * data)


def repeating(n: Floats, d: Floats, r: Floats) -> Floats:
    """The source has 10B tokens and repeats: good text, worth 2.5 times the web's, that wears out (R* = 4 epochs)."""
    unique, worn = 10 * B, 4.0
    used = r * d
    fresh = np.minimum(used, unique)
    worth = fresh + fresh * worn * -np.expm1(-np.maximum(used / np.maximum(fresh, 1.0) - 1, 0) / worn)
    return _base(n, (1 - r) * d + 2.5 * worth) + 0.02 * r * r


def abrupt(n: Floats, d: Floats, r: Floats) -> Floats:
    """The first 4 % lower the loss by 3 %, all more raises it slowly."""
    return np.asarray(_base(n, d) * (1 - 0.03 * -np.expm1(-r / 0.013) + 0.03 * r))


TRUTHS: dict[str, Loss] = {
    "the law mixture": right_law,
    "two hidden domains": hidden_domains,
    "a source that repeats": repeating,
    "the first 4 % act abruptly": abrupt,
}
SIZES, BUDGETS, RATIOS = [0.1 * B, 0.4 * B, 1.7 * B], [2 * B, 10 * B, 75 * B], [0.0, 1 / 3, 2 / 3, 1.0]
CELLS = ((0.1 * B, 2 * B), (1.7 * B, 75 * B))
NOISE = 0.002


def ratio_rates(truth: Loss, seeds: int, draws: int, seed: int = 0, bootstraps: int = 100) -> dict[str, float]:
    """Over draws and cells: how often the best ratio is answered, how often the interval then holds the true one, how often
    the bracket does, and mean widths of both."""
    random, fine = np.random.default_rng(seed), np.linspace(0, 1, 2001)
    columns = grid(ratio=RATIOS, n_params=SIZES, tokens=BUDGETS * seeds)
    clean = truth(columns["n_params"], columns["tokens"], columns["ratio"])
    ranges = {name: (float(columns[name].min()), float(columns[name].max())) for name in ("n_params", "tokens")}
    found: dict[str, list[float]] = {"answered": [], "covered": [], "width": [], "bracketed": [], "bracket_width": []}
    for draw in range(draws):
        loss = clean * np.exp(NOISE * random.standard_normal(len(clean)))
        choice = choose(columns, loss, bootstraps=bootstraps, seed=draw)
        settings = list(zip(*columns.values(), strict=True))
        noise = noise_floor(settings, loss)
        for n, d in CELLS:
            best = float(fine[truth(np.full(2001, n), np.full(2001, d), fine).argmin()])
            answer = best_ratio_by(choice, {"n_params": n, "tokens": d}, ranges, noise=noise, level=LEVEL)
            found["answered"].append(answer is not None)
            here = (columns["n_params"] == n) & (columns["tokens"] == d)
            ratios, losses = columns["ratio"][here], loss[here]
            good = (float(ratios[losses.argmin()]),) if noise is None else best_measured(ratios, losses, noise).band
            low, high = bracket(tuple(np.unique(ratios)), good)
            if answer is not None:
                found["covered"].append(answer.interval[0] <= best <= answer.interval[1])
                found["width"].append(answer.interval[1] - answer.interval[0])
            found["bracketed"].append(low <= best <= high)
            found["bracket_width"].append(high - low)
    return {name: float(np.mean(values)) if values else float("nan") for name, values in found.items()}


if __name__ == "__main__":
    import time

    for name, truth in TRUTHS.items():
        for seeds in (1, 2):
            t = time.process_time()
            print(name, seeds, ratio_rates(truth, seeds, int(sys.argv[2])), time.process_time() - t, flush=True)
