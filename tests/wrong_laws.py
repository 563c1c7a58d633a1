"""Truths that no law of ours has: what is said of the best ratio and of the speed-up where the law is wrong.

`python -m tests.wrong_laws ratio 100` and `... speed-up 100` print a table. An answer covers the truth, misses it, or is none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

from megatron_synth.study.fit.fit import fit
from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.noise import best_measured, noise_floor
from megatron_synth.study.fit.ratio.choice import choose
from megatron_synth.study.report.answers import speed_up
from megatron_synth.study.report.ratio import best_ratio_by, bracket
from tests.simulate import DATA, JOINT, MIXTURE, B, grid

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


# ---- speed-up

NATURAL, FASTER = DATA, {**DATA, "B": DATA["B"] * 0.8}
LEADS: dict[str, Callable[[Floats], Floats]] = {
    "the law data": lambda d: FASTER["E"] + FASTER["B"] / d ** FASTER["beta"],
    "the lead shrinks beyond 20B": lambda d: _shrinking(d, 20 * B),
    "the lead shrinks beyond 60B": lambda d: _shrinking(d, 60 * B),
    "the first budgets are off": lambda d: (FASTER["E"] + FASTER["B"] / d ** FASTER["beta"]) * (1 + 0.01 * (d < 3 * B)),
}
SPEED_BUDGETS = np.geomspace(1 * B, 100 * B, 8)


def _natural(d: Floats) -> Floats:
    return np.asarray(NATURAL["E"] + NATURAL["B"] / d ** NATURAL["beta"])


def _shrinking(d: Floats, beyond: float) -> Floats:
    """The lead in tokens, 1.84 times fewer, is lost by an exponent beyond some budget."""
    lead = (1 / 0.8) ** (1 / NATURAL["beta"])
    return _natural(d * lead ** np.where(d > beyond, beyond / d, 1.0))


def speed_rates(mixed: Callable[[Floats], Floats], seeds: int, noise: float, draws: int, seed: int = 0) -> dict[str, float]:
    """How often the interval of the speed-up holds the true one, at losses that both arms reach; and how often there is one at
    the loss that the mixture has at 800B."""
    random = np.random.default_rng(seed)
    tokens = np.repeat(SPEED_BUDGETS, seeds)
    fine = np.geomspace(0.5 * B, 1000 * B, 4000)
    curves = _natural(fine), mixed(fine)
    last = _natural(np.array([100 * B]))
    losses = np.concatenate([_natural(np.array([5 * B, 20 * B, 50 * B])), last * 1.003, mixed(np.array([800 * B]))])

    def needed(curve: Floats) -> Floats:
        return np.exp(np.interp(-losses, -np.minimum.accumulate(curve), np.log(fine)))

    truth = needed(curves[0]) / needed(curves[1])
    found: dict[str, list[float]] = {"5B": [], "20B": [], "50B": [], "100B": [], "far": []}
    for draw in range(draws):
        fits = []
        for curve in (_natural, mixed):
            loss = curve(tokens) * np.exp(noise * random.standard_normal(len(tokens)))
            fits.append(fit("data", {"tokens": tokens}, loss, bootstraps=200, seed=2 * draw + len(fits), starts=24))
        answer = speed_up(fits[0], fits[1], losses=losses)
        for place, name in enumerate(found):
            if name == "far":
                found[name].append(np.isfinite(answer.low[place]))
            elif np.isfinite(answer.low[place]):
                found[name].append(answer.low[place] <= truth[place] <= answer.high[place])
    return {name: float(np.mean(values)) if values else float("nan") for name, values in found.items()}


def ratio_table(draws: int) -> None:
    """Print what is said of the best ratio."""
    print("| truth | seeds | a law answers | its 90 % interval covers | mean width | the bracket covers | mean width |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, truth in TRUTHS.items():
        for seeds in (1, 2):
            found = ratio_rates(truth, seeds, draws)
            covered = "" if np.isnan(found["covered"]) else f"{found['covered']:.0%}"
            width = "" if np.isnan(found["width"]) else f"{found['width']:.2f}"
            cells = f"{found['answered']:.0%} | {covered} | {width} | {found['bracketed']:.0%} | {found['bracket_width']:.2f}"
            print(f"| {name} | {seeds} | {cells} |", flush=True)


def speed_table(draws: int) -> None:
    """Print how often the interval of the speed-up holds the truth."""
    print("| truth | seeds | at the loss of 5B | 20B | 50B | 100B | an answer at 800B |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, mixed in LEADS.items():
        for seeds in (1, 3):
            found = speed_rates(mixed, seeds, 0.003, draws)
            cells = " | ".join("" if np.isnan(rate) else f"{rate:.0%}" for rate in found.values())
            print(f"| {name} | {seeds} | {cells} |", flush=True)


TABLES = {"ratio": ratio_table, "speed-up": speed_table}

if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1] not in TABLES:
        sys.exit(f"usage: python -m tests.wrong_laws {'|'.join(TABLES)} [DRAWS]")
    TABLES[sys.argv[1]](int(sys.argv[2]) if len(sys.argv) > 2 else 100)
