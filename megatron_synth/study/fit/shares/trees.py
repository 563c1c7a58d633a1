"""Boosted trees over mixtures, by LightGBM: what RegMix predicts losses with (arXiv 2407.01492)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.shares.points import Mixtures

REGMIX = {"num_iterations": 1000, "learning_rate": 0.01}
"""RegMix's published settings; all others at LightGBM's defaults."""
OURS = {"num_iterations": 500, "learning_rate": 0.03, "num_leaves": 8, "min_child_samples": 10}
"""Smaller trees: on RegMix's mixtures as good, in an eighth of the time."""


@dataclass(frozen=True)
class BoostedTrees:
    """The law; see `LAWS` for the interface. settings: of LightGBM."""

    name: str = "boosted-trees"
    formula: str = "log L = sum of regression trees of r, log N, log D"
    source: str = "Liu et al. 2024 (RegMix), arXiv 2407.01492"
    parametric: bool = False
    settings: tuple[tuple[str, Any], ...] = tuple(OURS.items())

    @property
    def needs(self) -> str | None:
        """What is not installed; None where all is there."""
        return None if importlib.util.find_spec("lightgbm") else "lightgbm: pip install 'megatron-synth[trees]'"

    def parameters(self, points: Mixtures) -> list[str]:
        """None."""
        return []

    def fit(self, points: Mixtures, log_loss: Floats, *, warm: Any = None, seed: int = 0) -> FittedTrees:
        """Fit to log losses [M]; warm is not used.

        Raises:
            UserError: LightGBM is not installed.
        """
        if self.needs is not None:
            raise UserError(f"law '{self.name}' needs {self.needs}")
        import lightgbm

        rounds = dict(self.settings)
        number = rounds.pop("num_iterations")
        fixed = {"objective": "regression", "seed": seed, "num_threads": 1, "deterministic": True, "verbosity": -1}
        data = lightgbm.Dataset(_features(points), log_loss, params={"verbosity": -1})
        return FittedTrees(self, lightgbm.train({**fixed, **rounds}, data, number), points)


@dataclass(frozen=True)
class FittedTrees:
    """Fitted trees."""

    law: BoostedTrees
    booster: Any = field(repr=False)
    points: Mixtures = field(repr=False)

    def log_predict(self, points: Mixtures) -> Floats:
        """The logarithm [M] of the predicted loss."""
        return np.asarray(self.booster.predict(_features(points), num_threads=1), dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        """How much each feature was split on, by gain."""
        names = [*self.points.sources, *self.points.scales]
        gains = self.booster.feature_importance("gain")
        return {"gain": dict(zip(names, map(float, gains), strict=True))}


def _features(points: Mixtures) -> Floats:
    return np.column_stack([points.shares, *points.scales.values()])
