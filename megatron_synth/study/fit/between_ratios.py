"""What a law in the ratio may do between the ratios that were run: no more than a smooth curve through them would.

A parabola through evenly spaced ratios passes below the lower of two neighbors by at most an eighth of the range of losses over
the ratios. A law may by a quarter, at any size and budget that was run; beyond that it makes up what no run has seen.
"""

from __future__ import annotations

import numpy as np

from megatron_synth.study.fit.catalog import AnyLaw
from megatron_synth.study.fit.laws import N_PARAMS, RATIO, TOKENS, Columns, Floats

ALLOWED = 0.25  # of the range of losses over the measured ratios, at one size and budget
NEGLIGIBLE = 1e-3  # of the loss: no noise floor is lower
INSIDE = np.linspace(0, 1, 10)[1:-1]  # places between two neighbors
MOST_CELLS = 12


def excess(law: AnyLaw, theta: Floats, columns: Columns) -> Floats:
    """How far theta [S, P] leave their neighbors between measured ratios, 1 being the most that is allowed: [S].

    0 for laws without a ratio, and for fewer than two ratios.

    Args:
        law: the law.
        theta: [S, P].
        columns: of the points that the law was fitted to, [M] each.
    """
    ratios = np.unique(np.asarray(columns[RATIO])) if RATIO in law.columns else np.zeros(0)
    if len(ratios) < 2:
        return np.zeros(len(theta))
    others = [name for name in (N_PARAMS, TOKENS) if name in law.columns]
    cells = np.unique(np.stack([np.asarray(columns[name]) for name in others], axis=1), axis=0) if others else np.zeros((1, 0))
    cells = cells[np.unique(np.linspace(0, len(cells) - 1, MOST_CELLS).round().astype(int))]
    between = ratios[:-1, None] + np.diff(ratios)[:, None] * INSIDE
    worst = np.zeros(len(theta))
    for cell in cells:
        point = dict(zip(others, map(float, cell), strict=True))
        with np.errstate(over="ignore", invalid="ignore"):
            ends = law.log_predict(theta, {RATIO: ratios, **point})
            inner = law.log_predict(theta, {RATIO: between.ravel(), **point}).reshape(len(theta), *between.shape)
        low, high = np.minimum(ends[:, :-1], ends[:, 1:]), np.maximum(ends[:, :-1], ends[:, 1:])
        leaves = np.maximum(low - inner.min(axis=2), inner.max(axis=2) - high).max(axis=1)
        worst = np.maximum(worst, leaves / np.maximum(ALLOWED * np.ptp(ends, axis=1), NEGLIGIBLE))
    return np.nan_to_num(worst, nan=np.inf)
