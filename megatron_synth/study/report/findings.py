"""The answers of a study in sentences, each with its numbers; nothing is said that a table of the report does not show."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from megatron_synth.core.log import compact
from megatron_synth.study.fit.contrast import Estimate
from megatron_synth.study.fit.worth import OTHER_R_D, SOURCE, worth_of
from megatron_synth.study.report.analysis import LEVEL, Analysis, BestAt, Fitted

MOST_TOLD = 3
"""Arms of a size whose speed-up is told in words; the table has all."""
REPEATED = 2.0
"""Epochs from which the page says what a source was worth."""


def percent(value: float) -> str:
    """A fraction in percent, with as many digits as it needs: `0.41 %`, `12 %`."""
    scaled = 100 * value
    digits = 2 if abs(scaled) < 1 else 1 if abs(scaled) < 10 else 0
    return f"{scaled:.{digits}f} %"


def findings(analysis: Analysis) -> list[str]:
    """Sentences: the noise, collapse, best ratios, speed-up, repetition, laws."""
    return [
        *_noise(analysis),
        *_behind(analysis),
        *_collapse(analysis),
        *_best(analysis),
        *_speed(analysis),
        *_repetition(analysis),
        *_laws(analysis),
    ]


def doubts(*fits: Fitted | None) -> str:
    """` (doubts: few-points, ...)` of the laws that a number comes from; empty where there are none."""
    codes = dict.fromkeys(doubt.code for fitted in fits if fitted is not None for doubt in fitted.doubts)
    return f" (doubts: {', '.join(codes)})" if codes else ""


def _noise(analysis: Analysis) -> Iterator[str]:
    noise = analysis.noise
    if noise is None:
        yield (
            "There is one seed per setting, so nothing measures how large chance is: no difference between single runs can be "
            "called real. What is called distinct rests on laws and on the scatter of runs around them, as far as these hold."
        )
        return
    low, high = (percent(bound) for bound in noise.interval)
    yield (
        f"The same setting with another seed scatters by {percent(noise.relative)} of its loss (90 % interval {low} to {high}, "
        f"{noise.freedom} degrees of freedom): the noise floor of every comparison."
    )


def _behind(analysis: Analysis) -> Iterator[str]:
    if not analysis.behind:
        return
    how = f"corrected for {len(analysis.behind)} arms and sizes"
    for one in (one for one in analysis.behind if one.collapses):
        found, parts = one.contrast, []
        if found.floor is not None:
            parts.append(f"its floor is {_change(found.floor)} above the baseline's at one exponent")
        if found.exponent is not None:
            low, high = found.exponent.interval
            parts.append(
                f"or its exponent {found.exponent.value:+.3f} [{low:+.3f}, {high:+.3f}] of the baseline's at one floor"
            )
        parts.append(f"the gap changes by {_change(found.gap)} per doubling of the budget")
        yield f"{one.arm} falls behind the baseline at {one.size} as budgets grow (p = {one.p:.2g}, {how}): {'; '.join(parts)}."
    quiet = [one for one in analysis.behind if not one.collapses]
    if quiet:
        known = [one for one in quiet if one.contrast.floor is not None]
        most = [one.contrast.floor.interval[1] for one in known if one.contrast.floor is not None]
        limit = (
            f"; floors higher by more than {percent(max(most))} are excluded in all of them" if most and max(most) < 1 else ""
        )
        none = "No arm falls" if len(quiet) == len(analysis.behind) else "The others do not fall"
        source = {one.contrast.noise for one in quiet}
        held = "" if source == {"seeds"} else ", held against the scatter around the laws, as there are no seeds"
        yield f"{none} behind the baseline as budgets grow, as far as {len(quiet)} contrasts can tell{held}{limit}."


def _change(one: Estimate) -> str:
    low, high = one.interval
    return f"{percent(one.value)} [{percent(low)}, {percent(high)}]"


def _best(analysis: Analysis) -> Iterator[str]:
    families: dict[str, list[BestAt]] = {}
    for best in analysis.best:
        families.setdefault(best.family, []).append(best)
    for family, cells in families.items():
        largest = max(cells, key=lambda best: best.rows[0].flops)
        where = f"{largest.size} parameters and {compact(largest.tokens)} tokens"
        ratio, loss = largest.lowest
        if largest.measured is None:
            ties = "; without seeds nothing says which others are as good"
        else:
            others = [other for other in largest.measured.band if other != ratio]
            ties = f"; {', '.join(map(_share, others))} cannot be told from it" if others else "; all others are worse"
        yield f"{family}: at {where} the lowest loss is at a share of {_share(ratio)} ({loss:.3f}){ties}."
        if family in analysis.ratio:
            low, high = largest.between
            where = f"; if the loss has one minimum, the best share there is between {_share(low)} and {_share(high)}"
            yield f"{family}: {analysis.ratio[family].told()}{where}."
        if any(best.refused for best in cells):
            reasons = dict.fromkeys(best.refused for best in cells if best.refused)
            count = sum(bool(best.refused) for best in cells)
            yield f"{family}: the law in the share gives no best one in {count} of {len(cells)} cells ({next(iter(reasons))})."
        winners = [_share(best.lowest[0]) for best in cells]
        if len(set(winners)) > 1 and len(cells) > 1:
            counted = ", ".join(f"{share} in {winners.count(share)}" for share in dict.fromkeys(winners))
            yield f"{family}: which share is best depends on size and budget: of {len(cells)} cells, {counted}."
        elif len(cells) > 1:
            yield f"{family}: the same share is best in all {len(cells)} cells of size and budget."


def _speed(analysis: Analysis) -> Iterator[str]:
    """One sentence for each model size: the arms that save most, at the lowest loss that both have measured."""
    for size in dict.fromkeys(size for _, size in analysis.speed):
        parts: dict[str, tuple[float, str]] = {}
        apart = []
        for (arm, at), curve in analysis.speed.items():
            if at != size:
                continue
            known = np.flatnonzero(np.isfinite(curve.measured))
            if not len(known):
                apart.append(arm)
                continue
            last = known[-1]
            text = f"{arm} reaches a loss of {curve.loss[last]:.3f} with {_times(curve.measured[last])} tokens"
            low, high, law = curve.low[last], curve.high[last], curve.fitted[last]
            if math.isfinite(low) and math.isfinite(high) and low > 0:
                ends = " to ".join(_times(value) for value in (low, high))
                said = f"{_times(law)}, {LEVEL:.0f} % interval {ends}"
                agrees = low <= curve.measured[last] <= high and not (curve.apart is not None and curve.apart[last])
                text += (
                    f" (measured; by the laws {said})"
                    if agrees
                    else f" (measured; the laws, which say {said}, are wrong there)"
                )
            baseline = analysis.data.get((analysis.study.baseline_arm, size))
            parts[arm] = float(curve.measured[last]), text + doubts(analysis.data.get((arm, size)), baseline)
        order = sorted(parts, key=lambda arm: -parts[arm][0])
        if order:
            told = "; ".join(parts[arm][1] for arm in order[:MOST_TOLD])
            rest = order[MOST_TOLD:]
            more = ""
            if rest:
                factors = f"{_times(parts[rest[0]][0])} to {_times(parts[rest[-1]][0])}"
                more = f"; {len(rest)} more arms, from {factors}, are in the table"
            counted = ", with what the text took to generate counted as tokens" if analysis.generation else ""
            yield f"Against the baseline at {size}{counted}: {told}{more}."
        if apart:
            yield f"At {size} the losses of {', '.join(apart)} and of the baseline do not overlap, so no speed-up was measured."


def _times(value: float) -> str:
    """A speed-up as `1.90 times fewer` or `1.19 times more`."""
    return f"{value:.2f} times fewer" if value >= 1 else f"{1 / value:.2f} times more"


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
    doubtful = [fitted for fitted in fits if fitted.doubts]
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
