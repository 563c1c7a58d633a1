"""The answers of a study in sentences, each with its numbers; nothing is said that a table of the report does not show."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from megatron_synth.core.log import compact
from megatron_synth.study.fit.worth import OTHER_R_D, SOURCE, worth_of
from megatron_synth.study.report.analysis import LEVEL, Analysis, BestAt

REPEATED = 2.0
"""Epochs from which the page says what a source was worth."""


def percent(value: float) -> str:
    """A fraction in percent, with as many digits as it needs: `0.41 %`, `12 %`."""
    scaled = 100 * value
    digits = 2 if abs(scaled) < 1 else 1 if abs(scaled) < 10 else 0
    return f"{scaled:.{digits}f} %"


def findings(analysis: Analysis) -> list[str]:
    """Sentences, in the order of the page's figures."""
    return [
        *_noise(analysis),
        *_best(analysis),
        *_speed(analysis),
        *_collapse(analysis),
        *_repetition(analysis),
        *_laws(analysis),
    ]


def _noise(analysis: Analysis) -> Iterator[str]:
    noise = analysis.noise
    if noise is None:
        yield "There is one seed per setting, so nothing says how large chance is: no difference below can be called real."
        return
    low, high = (percent(bound) for bound in noise.interval)
    yield (
        f"The same setting with another seed scatters by {percent(noise.relative)} of its loss (90 % interval {low} to {high}, "
        f"{noise.freedom} degrees of freedom): the noise floor of every comparison."
    )


def _best(analysis: Analysis) -> Iterator[str]:
    families: dict[str, list[BestAt]] = {}
    for best in analysis.best:
        families.setdefault(best.family, []).append(best)
    for family, cells in families.items():
        tested = [best for best in cells if best.measured is not None]
        if not tested:
            continue
        largest = max(tested, key=lambda best: best.rows[0].flops)
        measured = largest.measured
        assert measured is not None
        others = [ratio for ratio in measured.band if ratio != measured.ratio]
        ties = f"; {', '.join(map(_share, others))} cannot be told from it" if others else "; all others are worse"
        where = f"size {largest.size} and {compact(largest.tokens)} tokens"
        yield f"{family}: at {where} the lowest loss is at a share of {_share(measured.ratio)} ({measured.loss:.3f}){ties}."
        winners = [_share(best.measured.ratio) for best in tested if best.measured is not None]
        if len(set(winners)) > 1 and len(tested) > 1:
            counted = ", ".join(f"{share} in {winners.count(share)}" for share in dict.fromkeys(winners))
            yield f"{family}: which share is best depends on size and budget: of {len(tested)} cells, {counted}."
        elif len(tested) > 1:
            yield f"{family}: the same share is best in all {len(tested)} cells of size and budget."


def _speed(analysis: Analysis) -> Iterator[str]:
    for (arm, size), curve in analysis.speed.items():
        known = np.flatnonzero(np.isfinite(curve.measured))
        if not len(known):
            yield f"{arm}: its losses at {size} and those of the baseline do not overlap, so no speed-up was measured."
            continue
        last = known[-1]
        value, loss = curve.measured[last], curve.loss[last]
        word = "fewer" if value >= 1 else "more"
        times = f"{max(value, 1 / value):.2f} times {word} tokens than the baseline"
        text = f"{arm} reaches a loss of {loss:.3f} at {size} with {times}"
        low, high = curve.low[last], curve.high[last]
        if math.isfinite(low) and math.isfinite(high):
            text += f" (measured; by the laws {curve.fitted[last]:.2f}x, {LEVEL:.0f} % interval {low:.2f} to {high:.2f})"
        yield text + "."


def _collapse(analysis: Analysis) -> Iterator[str]:
    limit = (100 - LEVEL) / 200
    budgets = [one for one in analysis.collapse if one.what == "budget"]
    rising = [one for one in budgets if one.p_rises < limit]
    if budgets and not rising:
        falling = sum(one.p_falls < limit for one in budgets)
        others = "" if falling == len(budgets) else "; in the others the noise decides nothing"
        lowest = min(one.p_rises for one in budgets)
        yield (
            f"No loss rises with the budget: between the last two budgets it falls in {falling} of {len(budgets)} curves"
            f"{others} (lowest p of a rise: {lowest:.2f})."
        )
    tests = f"corrected for {len(analysis.collapse)} tests"
    for one in rising:
        yield f"The loss of {one.of} at {one.at} rises with the budget (p = {one.p_rises:.2g}, {tests})."
    shares = [one for one in analysis.collapse if one.what == "share"]
    worse = [one for one in shares if one.p_rises < limit]
    if shares:
        between = f"between shares of {' and '.join(_share(value) for value in shares[0].trend.values)}"
        yield f"Towards the highest share the loss rises in {len(worse)} of {len(shares)} cells ({between})."


def _repetition(analysis: Analysis) -> Iterator[str]:
    """What the text that was repeated most is worth."""
    most: dict[str, tuple[float, str]] = {}
    for row in analysis.rows:
        for column, epochs in row.others.items():
            source = column.removeprefix("epochs/")
            if source != column and epochs >= REPEATED and epochs > most.get(source, (0.0, ""))[0]:
                most[source] = epochs, row.arm
    for source, (epochs, arm) in most.items():
        low, high = worth_of(epochs), worth_of(epochs, OTHER_R_D)
        yield (
            f"{source} was seen {epochs:.1f} times in {arm}: worth {low:.1f} to {high:.1f} epochs of new text, by the law of "
            f"{SOURCE}. Laws and speed-ups here count every token as new."
        )


def _laws(analysis: Analysis) -> Iterator[str]:
    fits = analysis.fits
    if not fits:
        yield "No law was tried: three budgets, sizes or ratios are needed."
        return
    failed = [fitted for fitted in fits if fitted.fit is None]
    doubtful = [fitted for fitted in fits if fitted.fit is not None and fitted.fit.warnings]
    yield (
        f"Of {len(fits)} laws {len(doubtful)} carry doubts and {len(failed)} could not be fitted: their parameters are not to "
        "be quoted without what the table of laws says of them."
    )
    held = [(fitted, fitted.holdout) for fitted in fits if fitted.holdout is not None]
    if held:
        errors = [holdout.mean_absolute_relative_error for _, holdout in held]
        worst = max(held, key=lambda pair: pair[1].mean_absolute_relative_error)
        yield (
            f"Fitted without the runs beyond the hold-out limit, {len(held)} laws predict those with a mean absolute relative "
            f"error of {percent(float(np.mean(errors)))}; the worst, {worst[0].name}, "
            f"{percent(worst[1].mean_absolute_relative_error)}."
        )


def _share(value: float) -> str:
    from fractions import Fraction

    near = Fraction(value).limit_denominator(12)
    return str(near) if abs(float(near) - value) < 1e-9 else f"{value:.3g}"
