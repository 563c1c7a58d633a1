"""What a study will be able to see, before it runs: the smallest effects that its design finds nine times of ten.

The noise between seeds is not known then, so the answers are for several. A test is one-sided at 5 %; with standard error S and
F degrees of freedom it has the power p for an effect of (t(0.95, F) + t(p, F)) S.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_synth.study.fit.contrast import floor_weights

POWER, SIZE = 0.9, 0.05
NOISES = (0.001, 0.003, 0.01)
MOST_SEEDS = 1000


def smallest_difference(seeds: int, noise: float) -> float | None:
    """The smallest difference of two arms' log losses at one size and budget that is found; None with one seed.

    noise: standard deviation of log loss between seeds.
    """
    return None if seeds < 2 else _reach(2 * seeds - 2) * noise * float(np.sqrt(2 / seeds))


def seeds_needed(effect: float, noise: float) -> int | None:
    """Seeds of each arm to find a difference of log losses at one size and budget; None if it takes more than 1,000."""
    for seeds in range(2, MOST_SEEDS + 1):
        found = smallest_difference(seeds, noise)
        if found is not None and found <= effect:
            return seeds
    return None


def smallest_floor(tokens: Sequence[float], seeds: int, noise: float) -> float | None:
    """The smallest rise of an arm's floor over the baseline's that `contrast` finds, as a fraction; None with too few budgets.

    tokens: different budgets of both arms at one size. The laws' shape is that of Besiroglu et al. 2024 (arXiv 2404.10102),
    near which the contrast is linear.
    """
    budgets = np.unique(np.asarray(tokens, dtype=np.float64))
    runs = np.repeat(budgets, seeds)
    weights = floor_weights(np.concatenate([runs, runs]), np.arange(2 * len(runs)) < len(runs))
    if weights is None:
        return None
    squares = weights**2
    if seeds > 1:  # Satterthwaite, every budget of every arm having its own variance
        cells = squares.reshape(-1, seeds).sum(axis=1)
        freedom = float(cells.sum() ** 2 / np.sum(cells**2 / (seeds - 1)))
    else:
        freedom = float(len(weights) - 6)  # both laws' own parameters
        if freedom < 1:
            return None
    return float(np.expm1(_reach(freedom) * noise * np.sqrt(squares.sum())))


def _reach(freedom: float) -> float:
    from scipy.stats import t as student

    return float(student.ppf(1 - SIZE, freedom) + student.ppf(POWER, freedom))


def power_text(budgets: dict[str, Sequence[float]], seeds: int) -> str:
    """What `study plan` says: a line for each noise.

    Args:
        budgets: those of each size.
        seeds: of every setting.
    """
    lines = [
        f"What {seeds} seed{'s' * (seeds > 1)} will show nine times of ten (one-sided, 5 %), by the scatter between seeds:"
    ]
    for noise in NOISES:
        difference, needed = smallest_difference(seeds, noise), seeds_needed(0.005, noise)
        parts = [
            "no difference of two runs" if difference is None else f"differences of {difference:.2%} at one size and budget"
        ]
        floors = {size: smallest_floor(tokens, seeds, noise) for size, tokens in budgets.items()}
        parts += [f"a floor {rise:.1%} higher at {size}" for size, rise in floors.items() if rise is not None]
        parts.append(f"0.5 % takes {needed} seeds" if needed else "0.5 % takes more than 1,000 seeds")
        lines.append(f"  scatter {noise:.1%}: {', '.join(parts)}")
    if all(len(set(tokens)) < 3 for tokens in budgets.values()):
        lines.append("  no size has three budgets: collapse is judged by the gap alone")
    return "\n".join(lines)
