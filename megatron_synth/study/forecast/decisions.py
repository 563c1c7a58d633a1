"""Decision accuracy: how often two arms that are ranked at a small size or budget keep their order at a large one.

As in DataDecide (Magnusson et al. 2025, arXiv 2504.11393): the share of pairs of arms whose lower loss is the same arm's at
both scales; there ranking at one size decided about 80 % of pairs at 150M parameters, and no law of eight did better. So the
plain ranking at each cell stands beside that by laws fitted to all runs up to its compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.fit import fit
from megatron_synth.study.fit.laws import N_PARAMS, TOKENS, Floats
from megatron_synth.study.forecast.predict import Measured, Target, choose_law, smaller

FEWEST_ARMS = 3
LEVEL = 90.0
SMALL = 15e6
"""Parameters below which mixtures are ranked badly: in olmix (arXiv 2602.12237) rank correlations with 1B are above 0.89 from
15M on, and 0.73 at 1M."""
_STARTS = 24
_DRAWS = 2000
_CORRELATIONS = np.sin(np.pi * (np.linspace(0.01, 0.99, 99) - 0.5))


@dataclass(frozen=True)
class Decision:
    """What the ranking at one size and budget says of that at the largest.

    arms: that both have. pairs: of these. kept: pairs in the same order at both; ties count half.
    interval: of the probability that the order of two arms is kept, `LEVEL` percent (`interval_of`).
    told, told_kept: pairs whose difference at the target is beyond the noise between seeds, and those of them that are kept;
        None without seeds.
    by_law: the same share where arms are ranked by what laws say of the target; None where these cannot be fitted for all arms.
    law: their name.
    """

    size: str
    n_params: int
    tokens: int
    target_size: str
    target_tokens: int
    arms: tuple[str, ...]
    pairs: int
    kept: float
    interval: tuple[float, float]
    told: int | None
    told_kept: float
    by_law: float | None
    law: str
    rows: tuple[Measured, ...]

    @property
    def accuracy(self) -> float:
        """Of the plain ranking."""
        return self.kept / self.pairs


def decisions(rows: Sequence[Measured], size_of: Mapping[int, str], noise: float | None) -> list[Decision]:
    """Decision accuracy of every cell of size and budget that has three arms of the target, which is the largest such cell.

    Args:
        rows: finished runs.
        size_of: names of the sizes, by parameters.
        noise: standard deviation of log loss between seeds; None without seeds.
    """
    cells: dict[tuple[int, int], dict[str, list[Measured]]] = {}
    for row in rows:
        cells.setdefault((row.n_params, row.tokens), {}).setdefault(row.arm, []).append(row)
    full = {cell: arms for cell, arms in cells.items() if len(arms) >= FEWEST_ARMS}
    if len(full) < 2:
        return []
    most = max(len(arms) for arms in full.values())
    target = max((cell for cell, arms in full.items() if len(arms) == most), key=lambda cell: cell[0] * cell[1])
    found = []
    for cell in sorted(full, key=lambda cell: cell[0] * cell[1]):
        arms = tuple(arm for arm in full[cell] if arm in full[target])
        if cell[0] * cell[1] >= target[0] * target[1] or len(arms) < FEWEST_ARMS:
            continue
        here, there = (np.array([_mean(full[at][arm]) for arm in arms]) for at in (cell, target))
        kept, pairs = kept_pairs(here, there)
        told: int | None = None
        told_kept = 0.0
        if noise is not None:
            errors = np.array([noise / np.sqrt(len(full[target][arm])) for arm in arms])
            told_kept, told = kept_pairs(here, there, 2 * errors)
        by_law, law = _by_law(rows, arms, cell, target, size_of, there)
        found.append(
            Decision(
                size=size_of[cell[0]],
                n_params=cell[0],
                tokens=cell[1],
                target_size=size_of[target[0]],
                target_tokens=target[1],
                arms=arms,
                pairs=pairs,
                kept=kept,
                interval=interval_of(kept, len(arms)),
                told=told,
                told_kept=told_kept,
                by_law=by_law,
                law=law,
                rows=tuple(row for arm in arms for row in (*full[cell][arm], *full[target][arm])),
            )
        )
    return found


def _mean(rows: Sequence[Measured]) -> float:
    return float(np.mean(np.log([row.loss for row in rows])))


def kept_pairs(small: Floats, large: Floats, errors: Floats | None = None) -> tuple[float, int]:
    """Pairs of arms [K] in the same order at both scales, ties counted half, and how many pairs there are.

    errors: [K]; only pairs whose difference at the large scale is above the root of the sum of their squares.
    """
    first, second = np.triu_indices(len(small), 1)
    changes, truth = small[first] - small[second], large[first] - large[second]
    if errors is not None:
        beyond = np.abs(truth) > np.hypot(errors[first], errors[second])
        changes, truth = changes[beyond], truth[beyond]
    same = np.sign(changes) * np.sign(truth)
    return float(np.sum((1 + same) / 2)), len(same)


def interval_of(kept: float, arms: int) -> tuple[float, float]:
    """90 % interval of the probability that two arms keep their order, from the pairs of so many arms.

    Pairs share arms, so they are no independent trials. Losses at the two scales are taken to have a normal copula: then the
    count depends on the number of arms and one correlation alone, whose distribution is simulated and inverted (mid-p). For
    a correlation r the probability is 1/2 + arcsin(r) / pi.
    """
    lower, upper = _tails(min(arms, 60), round(2 * kept))
    probabilities = 0.5 + np.arcsin(_CORRELATIONS) / np.pi
    tail = (1 - LEVEL / 100) / 2
    possible = np.flatnonzero((lower > tail) & (upper > tail))
    if not len(possible):  # more than 60 arms, or a count at the very end
        return (float(probabilities[-1]), 1.0) if upper[-1] <= tail else (0.0, float(probabilities[0]))
    low = 0.0 if possible[0] == 0 else float(probabilities[possible[0]])
    high = 1.0 if possible[-1] == len(probabilities) - 1 else float(probabilities[possible[-1]])
    return low, high


@cache
def _tails(arms: int, doubled: int) -> tuple[Floats, Floats]:
    """Of each correlation: the probabilities (mid-p) of as many pairs kept or fewer, and of as many or more."""
    counts = _counts(arms)
    below, equal = (counts < doubled).mean(axis=1), (counts == doubled).mean(axis=1)
    return below + equal / 2, 1 - below - equal / 2


@cache
def _counts(arms: int) -> Floats:
    """Twice the pairs that are kept [correlations, draws]."""
    random = np.random.default_rng(0)
    small, other = random.standard_normal((2, _DRAWS, arms))
    first, second = np.triu_indices(arms, 1)
    truth = small[:, first] > small[:, second]
    result = np.empty((len(_CORRELATIONS), _DRAWS))
    for place, correlation in enumerate(_CORRELATIONS):
        large = correlation * small + np.sqrt(1 - correlation**2) * other
        result[place] = 2 * ((large[:, first] > large[:, second]) == truth).sum(axis=1)
    return result


def _by_law(
    rows: Sequence[Measured],
    arms: Sequence[str],
    cell: tuple[int, int],
    target: tuple[int, int],
    size_of: Mapping[int, str],
    there: Floats,
) -> tuple[float | None, str]:
    """The share of pairs that laws rank as the target does, fitted to the runs of at most the cell's compute."""
    reach = cell[0] * cell[1] * 1.001
    predicted, names = [], set()
    for arm in arms:
        wanted = Target(arm, size_of[target[0]], *target, 1)
        own = [row for row in smaller(rows, wanted) if row.n_params * row.tokens <= reach]
        try:
            name, used = choose_law(own, wanted)
            columns = {N_PARAMS: [row.n_params for row in used], TOKENS: [row.tokens for row in used]}
            values = {column: np.asarray(numbers, dtype=np.float64) for column, numbers in columns.items()}
            law = fit(name, values, [row.loss for row in used], starts=_STARTS, bootstraps=0)
        except UserError:  # too few runs up to there for a law
            return None, ""
        point = {N_PARAMS: np.array([float(target[0])]), TOKENS: np.array([float(target[1])])}
        predicted.append(float(law.predict({column: point[column] for column in law.law.columns})[0]))
        names.add(name)
    kept, pairs = kept_pairs(np.array(predicted), there)
    return kept / pairs, "+".join(sorted(names))


def too_small(rows: Sequence[Measured], size_of: Mapping[int, str]) -> str:
    """A warning where mixtures are compared with models below `SMALL` parameters; empty where none is."""
    sizes = sorted({row.n_params for row in rows if row.n_params < SMALL})
    if not sizes or len({row.arm for row in rows}) < 2:
        return ""
    names = ", ".join(size_of[count] for count in sizes)
    every = "every size" if len(sizes) == len({row.n_params for row in rows}) else f"{names}"
    return (
        f"Models below about 15M parameters ({every} here) rank mixtures badly: in olmix (arXiv 2602.12237) their rank "
        "correlation with 1B is 0.73 at 1M and above 0.89 from 15M on. What is best among these need not be best at scale."
    )
