"""The best ratio by the laws that cross-validation cannot tell apart."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_synth.study.fit.noise import Noise
from megatron_synth.study.fit.ratio.choice import RatioChoice
from megatron_synth.study.report.answers import BestRatio

_STEPS = 200


def best_ratio_by(
    choice: RatioChoice,
    point: Mapping[str, float],
    ranges: Mapping[str, tuple[float, float]],
    *,
    noise: Noise | None,
    level: float,
) -> BestRatio | None:
    """The best ratio at one N and D; None where there is no law.

    The ratio and the curve are of the chosen law. The interval holds that of every law which cannot be told from it: where
    these differ, the runs do not decide between them. To a law that misses ratios which it was not fitted to by more than
    scatter, all ratios are as good whose loss is above its lowest by less than that.

    Args:
        choice: the laws.
        point: `n_params` and `tokens`, as far as laws know them.
        ranges: smallest and largest that were run, by column.
        noise: the noise floor, for the band of ratios as good as the best.
        level: of the interval, in percent.
    """
    if choice.chosen is None:
        return None
    ratios = np.linspace(choice.ratios[0], choice.ratios[-1], _STEPS + 1)
    losses = choice.chosen.predict(ratios, point)
    at = int(losses.argmin())
    ends: list[tuple[float, float]] = []
    tail = (100 - level) / 2
    for name in choice.near:
        one = choice.candidates[name]
        found = ratios[np.nan_to_num(one.draws(ratios, point), nan=np.inf).argmin(axis=1)]
        if len(found) > 1:
            low, high = np.percentile(found, [tail, 100 - tail])
            curve = one.predict(ratios, point)
            near = ratios[curve <= curve.min() * (1 + one.beyond)]
            ends.append((min(float(low), float(near[0])), max(float(high), float(near[-1]))))
    interval = (min(low for low, _ in ends), max(high for _, high in ends)) if ends else (float("nan"), float("nan"))
    flat = None
    if noise is not None:
        level_of = np.flatnonzero(losses <= losses[at] * np.exp(noise.relative))
        flat = (float(ratios[level_of[0]]), float(ratios[level_of[-1]]))
    inside = all(ranges[name][0] <= value <= ranges[name][1] for name, value in point.items())
    return BestRatio(float(ratios[at]), float(losses[at]), interval, flat, inside, ratios, losses, level)


def bracket(ratios: tuple[float, ...], good: tuple[float, ...]) -> tuple[float, float]:
    """From and to which ratio the best may lie if the loss has one minimum: the neighbors of those as good as the best.

    Args:
        ratios: that were run at one size and budget, in rising order.
        good: of these, the ones that noise cannot tell from the best.
    """
    low, high = ratios.index(min(good)), ratios.index(max(good))
    return ratios[max(low - 1, 0)], ratios[min(high + 1, len(ratios) - 1)]
