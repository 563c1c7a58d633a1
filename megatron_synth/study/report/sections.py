"""Sections of the page on decisions, forecasts, rates and published answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from megatron_synth.core.html import html
from megatron_synth.core.log import compact, human
from megatron_synth.study.forecast.decisions import LEVEL
from megatron_synth.study.forecast.predict import Measured
from megatron_synth.study.rates.rule import Ratio
from megatron_synth.study.report.cells import table
from megatron_synth.study.report.checks import Checks

Sources = Callable[[Sequence[Measured]], Markup]


def sections(checks: Checks, arm: Callable[[str], Markup], sources: Sources) -> Markup:
    """All sections that there is something for.

    Args:
        checks: what was found.
        arm: the name of an arm as the page shows it.
        sources: runs, as the page lists them in a cell.
    """
    return Markup("\n").join([_decisions(checks, sources), _forecasts(checks, arm, sources), _rates(checks), _beside(checks)])


def _decisions(checks: Checks, sources: Sources) -> Markup:
    if not checks.decisions:
        return Markup("")
    rows = []
    for one in checks.decisions:
        low, high = one.interval
        told = "n/a" if not one.told else f"{one.told_kept / one.told:.0%} of {one.told}"
        law = "n/a" if one.by_law is None else f"{one.by_law:.0%} ({one.law})"
        kept = f"{one.accuracy:.0%} [{low:.0%}, {high:.0%}]"
        head = (one.size, compact(one.tokens), str(len(one.arms)), str(one.pairs))
        rows.append((*head, kept, told, law, sources(one.rows)))
    heads = ("N", "D", "arms", "pairs", f"order kept [{LEVEL:.0f} %]", "of pairs beyond the noise", "ranked by laws", "runs")
    first = checks.decisions[0]
    note = html(
        "<p class='muted'>Of all pairs of arms: how many have the same order of mean losses at this size and budget as "
        "at {} and "
        "{} tokens (decision accuracy; DataDecide, arXiv 2504.11393, where 150M parameters decide about 80 % of pairs "
        "for 1B, and "
        "no law of eight does better). The interval is that of two new arms, as pairs that share an arm are not independent. "
        "“Beyond the noise”: pairs that seeds tell apart at the target. “Ranked by laws”: laws of each arm, fitted to runs of "
        "at most this compute.</p>",
        first.target_size,
        compact(first.target_tokens),
    )
    small = html('<p class="warn">{}</p>', checks.small) if checks.small else ""
    return html("<h3>Do small runs decide as the largest?</h3>{}{}{}", note, small, table(heads, rows))


def _forecasts(checks: Checks, arm: Callable[[str], Markup], sources: Sources) -> Markup:
    scored = checks.forecasts
    if not scored.scores and not scored.lost:
        return Markup("")
    rows: list[tuple[str, ...]] = []
    for one in scored.scores:
        forecast = one.forecast
        head = (arm(forecast["arm"]), forecast["size"], compact(forecast["tokens"]), forecast["made"][:16].replace("T", " "))
        if one.changed:
            rows.append(
                (*head, forecast["law"], "", "", "", "", html('<span class="warn">changed: {}</span>', one.changed), "")
            )
            continue
        predicted = f"{forecast['loss']:.4f} [{forecast['low']:.4f}, {forecast['high']:.4f}]"
        measured, error, inside = "not yet", "", ""
        if one.measured is not None and one.error is not None:
            measured, error = f"{one.measured:.4f}", f"{100 * one.error:+.2f} %"
            inside = "yes" if one.inside else html('<span class="warn">no</span>')
        remarks = "; ".join(("before its runs" if one.before else "", *one.remarks)).strip("; ")
        doubts = f"{forecast['law']}{' †' if forecast['doubts'] else ''}"
        rows.append((*head, doubts, predicted, measured, error, inside, remarks, sources(one.rows)))
    heads = ("arm", "N", "D", "made (UTC)", "law", "predicted [90 %]", "measured", "error", "inside", "", "runs")
    note = Markup(
        "<p class='muted'>Predictions that <code>study forecast</code> wrote down, with the digest of the runs that "
        "they come from, "
        "and what came of them. The interval is that of the mean of the runs, seeds included. A line that was changed, "
        "taken out "
        "or added later does not fit its digest, or the digests that results of runs hold, and is named. † The law carried "
        "doubts when it was made.</p>"
    )
    lost = html('<p class="warn">{}</p>', scored.lost) if scored.lost else ""
    return html('<h3 id="forecasts">Did forecasts hold?</h3>{}{}{}', note, lost, table(heads, rows))


def _rates(checks: Checks) -> Markup:
    rates, parts = checks.rates, []
    if rates.rule is not None:
        rule = rates.rule
        used = {(one.n_params, one.tokens, round(one.batch)): one for one in rates.off}
        rows: list[tuple[str, ...]] = []
        for cell in rule.cells:
            one = used.get((cell.n_params, cell.tokens, round(cell.batch)))
            verdict: Markup | str = "not run" if one is None else "good"
            if one is not None and one.found:
                verdict = html('<span class="warn">off by {:.2g}, costs {:.2f} %</span>', one.factor[0], 100 * one.cost)
            edge = html('<span class="warn">{} end of the sweep</span>', cell.edge) if cell.edge else ""
            head = (
                human(cell.n_params),
                compact(cell.tokens),
                human(cell.batch),
                f"{cell.rates[0]:.3g} to {cell.rates[-1]:.3g}",
            )
            own = (
                "" if one is None else f"{one.used:.3g}",
                _ratio(cell.best),
                _ratio(rule.at(cell.n_params, cell.tokens, cell.batch)),
            )
            rows.append((*head, *own, verdict, edge, "" if one is None else f"{one.p:.3f}"))
        heads: tuple[str, ...] = (
            "N",
            "D",
            "tokens per step",
            "swept",
            "used",
            "best [90 %]",
            "by the rule [90 %]",
            "",
            "edge",
            "p",
        )
        fitted = "".join(f" {axis}^{_ratio(ratio, '.2f')}" for axis, ratio in rule.exponents.items())
        text = (
            f"log L is a parabola in the logarithm of the rate, with one curvature for all cells, {rule.curvature.value:.4f} "
            f"[{rule.curvature.low:.4f}, {rule.curvature.high:.4f}]; the best rate is a power of size, budget and "
            f"batch:{fitted}. "
            "Intervals by Fieller. p: of “the rate that was used is the best”, corrected for the number of cells (Holm). "
            f"{rule.left_out} runs are further than a factor of 4 from the best of their cell, or in cells with fewer "
            f"than three "
            "rates, and were left out."
        )
        if rule.doubtful:
            text += " The cells do not follow one rule, or the curvature is not known: do not carry it to other scales."
        parts.append(html("<p class='muted'>{}</p>{}", text, table(heads, rows)))
    if rates.bends:
        lifts: list[tuple[str, ...]] = []
        for bend in rates.bends:
            low, high = bend.interval
            verdict = html('<span class="warn">lifted</span>') if bend.found else "no sign of it"
            lift = f"{100 * bend.lift:+.2f} % [{100 * low:+.2f}, {100 * high:+.2f}]"
            lifts.append((bend.size, compact(bend.tokens), str(len(bend.arms)), lift, f"{bend.p:.3f}", verdict))
        note = Markup(
            "<p class='muted'>Without a sweep a rate that is off for the longest budget alone still shows: all arms "
            "lie above what "
            "their smaller budgets say, by about the same fraction. p: one-sided, the largest without one of the arms, "
            "corrected "
            "for the sizes (Holm). A rate that is off gradually bends laws without a sign: sweep it "
            "(<code>rates.sweep</code>).</p>"
        )
        heads = ("N", "longest D", "arms", "lift of the loss there [90 %]", "p", "")
        parts.append(html("{}{}", note, table(heads, lifts)))
    if not parts:
        return Markup("")
    return html('<h3 id="rates">Are the learning rates good?</h3>{}', Markup("").join(parts))


def _ratio(ratio: Ratio, form: str = ".3g") -> str:
    bounds = f" [{ratio.low:{form}}, {ratio.high:{form}}]" if ratio.bounded else " [no interval]"
    return f"{ratio.value:{form}}{bounds}"


def _beside(checks: Checks) -> Markup:
    if not checks.beside:
        return Markup("")
    rows = []
    for one in checks.beside:
        reference = one.reference
        ties = ", ".join(f"{share:.2g}" for share in one.band if share != one.share)
        here = f"{one.share:.2g} at {one.size}, {compact(one.tokens)} tokens{f' (not worse: {ties})' if ties else ''}"
        wide = html(
            '<div class="wide"><strong>{}. Collapse: {}.</strong> {}. {}. By {}, {}; known from: {}.</div>',
            _sentence(reference.answer),
            reference.collapse,
            _sentence(reference.text),
            _sentence(reference.setting),
            reference.name,
            reference.source,
            reference.origin,
        )
        rows.append((one.family, f"{reference.share:.2g}", html('<div class="place">{}</div>', here), wide))
    heads = ("family", "published", "best share here", "the published answer")
    note = Markup(
        "<p class='muted'>Reference values, where a source of the study names the kind of text that it is like. Other "
        "text, sizes "
        "and measures: they say what to expect, not what is right here.</p>"
    )
    return html("<h3>Beside published answers</h3>{}{}", note, table(heads, rows))


def _sentence(text: str) -> str:
    """The text with a capital, and all its other letters as they are."""
    return text[:1].upper() + text[1:]
