"""Simulated loops of generating and training: how often a rise is found that is there, and one that is not.

`python -m tests.simulate_rounds` prints the table of docs/collapse.md.
"""

from __future__ import annotations

import sys

import numpy as np

from megatron_synth.study.fit.noise import holm
from megatron_synth.study.fit.rounds import rounds_contrast
from megatron_synth.study.report.generation.analysis import LIMIT

LOOPS = 3


def losses(
    random: np.random.Generator, seeds: int, rounds: int, step: float, slope: float, noise: float, drift: float
) -> tuple[np.ndarray, np.ndarray]:
    """Losses [S] of real text and [S, R] of a loop: a step, a slope per round, noise of training, and a walk of the corpora.

    drift: standard deviation of what each round adds for good, as its corpus was drawn by chance.
    """
    real = noise * random.standard_normal(seeds)
    walk = np.cumsum(drift * random.standard_normal((seeds, rounds)), axis=1)
    loop = step + slope * np.arange(rounds) + walk + noise * random.standard_normal((seeds, rounds))
    return 5 * np.exp(real), 5 * np.exp(loop)


def rates(seeds: int, rounds: int, slope: float, noise: float, drift: float, draws: int, seed: int = 0) -> tuple[float, float]:
    """How often a rise is told of one loop of three, corrected for these, and how often its 90 % interval holds the slope."""
    random = np.random.default_rng(seed)
    told = held = 0
    for _ in range(draws):
        found = []
        for number in range(LOOPS):
            real, loop = losses(random, seeds, rounds, 0.05, slope if number == 0 else 0.0, noise, drift)
            found.append(rounds_contrast(real, loop).rise)
        assert all(one is not None for one in found)
        p = holm([one.p for one in found if one is not None])
        told += bool(p[0] < LIMIT)
        low, high = found[0].interval if found[0] is not None else (0.0, 0.0)
        held += low <= slope <= high
    return told / draws, held / draws


def any_false(seeds: int, rounds: int, noise: float, drift: float, draws: int, seed: int = 0) -> float:
    """How often any of three loops without a rise is said to have one."""
    random = np.random.default_rng(seed)
    told = 0
    for _ in range(draws):
        p = []
        for _ in range(LOOPS):
            one = rounds_contrast(*losses(random, seeds, rounds, 0.05, 0.0, noise, drift)).rise
            assert one is not None
            p.append(one.p)
        told += bool(holm(p).min() < LIMIT)
    return told / draws


def table(draws: int) -> None:
    """The table of the docs."""
    noise = 0.012
    print("| seeds | drift | a rise told of 3 loops without one | interval holds 4 % a round | finds 2 % a round | 4 % | 8 % |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for seeds in (3, 5):
        for drift in (0.0, 0.012):
            found = [rates(seeds, 3, slope, noise, drift, draws) for slope in (0.02, 0.04, 0.08)]
            values = [any_false(seeds, 3, noise, drift, draws), found[1][1], *(told for told, _ in found)]
            cells = [f"{100 * value:.0f} %" for value in values]
            print(f"| {seeds} | {100 * drift:.1f} % | {' | '.join(cells)} |")


if __name__ == "__main__":
    table(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
