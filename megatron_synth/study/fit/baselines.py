"""Predictions that need no law: a law that does no better than these is none.

Legend: M runs, Q coordinates of a mixture, S scales (logarithms of N and D).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_synth.study.fit.laws import Floats

NEAREST, MEAN = "nearest measured", "mean"
OTHER_CELL = 1e3
"""How much farther every run of another size or budget is than any of the same."""
_SAME = 1e-9


def plain_predictions(mixture: Floats, scales: Floats, log_loss: Floats, fold_of: NDArray[np.int64]) -> dict[str, Floats]:
    """Log losses [M] that runs of other folds say of each run, without a law.

    `nearest measured`: those of the nearest mixture at the same size and budget; of the nearest size and budget where that was
    not run. `mean`: the mean over all mixtures at the same size and budget; over all runs where there is none.

    Args:
        mixture: [M, Q], coordinates in which mixtures are near: the ratio, or the square roots of shares.
        scales: [M, S], S may be 0.
        log_loss: [M].
        fold_of: [M], the fold of each run.
    """
    cells = np.unique(scales, axis=0, return_inverse=True)[1].reshape(-1) if scales.shape[1] else np.zeros(len(log_loss), int)
    reach = np.ptp(scales, axis=0)
    near = scales / np.where(reach > 0, reach, 1.0)
    found = {NEAREST: np.empty(len(log_loss)), MEAN: np.empty(len(log_loss))}
    for fold in np.unique(fold_of):
        known = np.flatnonzero(fold_of != fold)
        for run in np.flatnonzero(fold_of == fold):
            same = cells[known] == cells[run]
            distance = np.sqrt(((mixture[known] - mixture[run]) ** 2).sum(axis=1))
            distance += np.where(same, 0.0, OTHER_CELL * (1 + np.abs(near[known] - near[run]).sum(axis=1)))
            found[NEAREST][run] = log_loss[known][distance <= distance.min() + _SAME].mean()
            found[MEAN][run] = log_loss[known][same].mean() if same.any() else log_loss[known].mean()
    return found


def plain_errors(mixture: Floats, scales: Floats, log_loss: Floats, fold_of: NDArray[np.int64]) -> dict[str, float]:
    """Mean absolute relative errors of `plain_predictions`, by name."""
    found = plain_predictions(mixture, scales, log_loss, fold_of)
    return {name: float(np.mean(np.abs(np.expm1(predicted - log_loss)))) for name, predicted in found.items()}
