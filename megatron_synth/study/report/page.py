"""The report as one HTML file: no network, light and dark, every number beside the runs that it comes from.

Names come from tables that others may have written: only `core.html` and the drawn figures make `Markup`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup, escape

from megatron_synth.config import yaml12
from megatron_synth.core.html import TOOLS, bullets, document, html
from megatron_synth.core.log import compact, duration, human, scientific
from megatron_synth.study.forecast.predict import Measured
from megatron_synth.study.report.analysis import LEVEL, Analysis, Fitted
from megatron_synth.study.report.cells import (
    at_budget,
    at_cell,
    bounds_of,
    comparison,
    figure_of,
    in_percent,
    p_value,
    parts_of,
    simple_fraction,
    table,
    titled,
)
from megatron_synth.study.report.checks import Checks
from megatron_synth.study.report.collect import Collected, Row
from megatron_synth.study.report.figures.answers import describe_fit
from megatron_synth.study.report.figures.drawing import Drawn, Look
from megatron_synth.study.report.findings import percent
from megatron_synth.study.report.sections import sections


def render(
    analysis: Analysis,
    collected: Collected,
    figures: Sequence[Drawn],
    style: dict[str, Look],
    git: str,
    checks: Checks,
    said: Sequence[str],
    generated: Callable[[Callable[[str], Markup], Callable[[Sequence[Row]], Markup]], Markup | str] = lambda *_: "",
) -> str:
    """The page.

    Args:
        analysis: fits and answers.
        collected: the runs, and those that are missing.
        figures: in the order of the page.
        style: color of each arm.
        git: the commit that made the page, for its foot.
        checks: decisions, forecasts, rates and published answers.
        said: the answers in sentences.
        generated: makes the part about text that the study has made, given how the page shows an arm and the runs of a number.
    """
    page = _Page(analysis, collected, style, checks)
    title = f"Study {analysis.study.name}"
    of_generation = generated(page.arm, page.sources)
    parts = [
        Markup("<header>"),
        html("<h1>{}</h1>", title),
        html("<p>{}</p>", analysis.study.description) if analysis.study.description else "",
        page.tiles(),
        Markup(
            '<nav><a href="#findings">Findings</a><a href="#figures">Figures</a><a href="#answers">Answers</a>'
            + ('<a href="#generated">Generated text</a>' if of_generation else "")
            + '<a href="#scale">At scale</a><a href="#laws">Laws</a><a href="#design">Design</a><a href="#runs">Runs</a></nav>'
        ),
        Markup("</header>"),
        page.missing(),
        Markup('<h2 id="findings">Findings</h2>'),
        bullets(said),
        Markup('<h2 id="figures">Figures</h2>'),
        *(figure_of(figure) for figure in figures),
        of_generation,
        page.answers(),
        page.checked(),
        page.laws(),
        page.design(),
        page.runs(),
        html(
            '<p class="muted">Made {} with {} from {} runs.</p>', datetime.now(UTC).date().isoformat(), git, len(collected.rows)
        ),
    ]
    return document(title, parts, script=TOOLS)


_SPEED_STEP = 10
"""Of the losses of a speed-up every so many stand in the table; the figure's data have more."""
_MOST_DOMAIN_LAWS = 120


class _Page:
    def __init__(self, analysis: Analysis, collected: Collected, style: dict[str, Look], checks: Checks):
        self.checks = checks
        self.analysis, self.study, self.collected, self.style = analysis, analysis.study, collected, style
        self.rows = collected.rows

    def tiles(self) -> Markup:
        """What there is, in figures."""
        rows, noise = self.rows, self.analysis.noise
        total = len(rows) + len(self.collected.missing)
        seconds = sum(row.train_seconds for row in rows)
        devices = sorted({row.device for row in rows})
        held = [fitted.holdout for fitted in self.analysis.fits if fitted.holdout is not None]
        tiles = [
            (f"{len(rows)} of {total}", "runs finished"),
            (human(sum(row.tokens for row in rows)), "tokens trained"),
            (scientific(sum(row.flops for row in rows)), "FLOPs"),
            (duration(seconds) if seconds < 360_000 else f"{seconds / 3600:,.0f} h", f"in steps, on {', '.join(devices)}"),
            ("n/a" if noise is None else percent(noise.relative), "scatter of the loss between seeds"),
        ]
        if held:
            error = sum(one.mean_absolute_relative_error * one.points for one in held) / sum(one.points for one in held)
            tiles.append((percent(error), "mean absolute relative error of the laws on held-out runs"))
        inner = (html('<div class="tile"><b>{}</b><span>{}</span></div>', value, what) for value, what in tiles)
        return html('<div class="tiles">{}</div>', Markup("").join(inner))

    def missing(self) -> Markup:
        """Names of the runs without a result."""
        missing = self.collected.missing
        if not missing:
            return Markup("")
        return html(
            '<p class="warn" id="missing">{} runs of the study are missing; everything below is from the others.</p>'
            "<details><summary>Which</summary><ul>{}</ul></details>",
            len(missing),
            Markup("").join(html("<li><code>{}</code></li>", run.name) for run in missing),
        )

    def checked(self) -> Markup:
        """Whether the answers hold at larger scales."""
        shown = sections(self.checks, self.arm, lambda rows: self.sources(self._rows_of(rows)))
        return html('<h2 id="scale">At larger scales</h2>{}', shown) if shown.strip() else Markup("")

    def _rows_of(self, rows: Sequence[Measured]) -> list[Row]:
        wanted = {row.id for row in rows}
        return [row for row in self.rows if row.id in wanted]

    # ---- answers

    def answers(self) -> Markup:
        """Tables behind the findings."""
        head = Markup('<h2 id="answers">Answers</h2>')
        return Markup("\n").join([head, self._behind(), self._collapse(), self._best(), self._equal(), self._speed()])

    def _best(self) -> Markup:
        rows = []
        for best in self.analysis.best:
            measured, fitted = best.measured, best.fitted
            band = "n/a" if measured is None else ", ".join(simple_fraction(value) for value in measured.band)
            law, interval, flat = "n/a", "", "n/a"
            said: Markup | str = law
            if fitted is None and best.refused:
                low, high = (simple_fraction(value) for value in best.between)
                said = html('<span class="warn">no law; {} to {} if there is one minimum</span>', low, high)
            elif best.refused:
                said = html('<span class="warn">no answer: {}</span>', best.refused)
            elif fitted is not None:
                law, interval = f"{fitted.ratio:.2f}", bounds_of(fitted.interval, ".2f")
                flat = "n/a" if fitted.flat is None else bounds_of(fitted.flat, ".2f")
                said = html("{}{}", f"{law} {interval}".strip(), self._mark(self.analysis.behind_best(best.family)))
            head = (best.family, best.size, compact(best.tokens))
            tested = (simple_fraction(best.lowest[0]), f"{best.lowest[1]:.4f}")
            rows.append((*head, *tested, band, said, flat, self.sources(best.rows)))
        heads = (
            "family",
            "N",
            "D",
            "best run",
            "its loss",
            "not worse",
            f"by the law [{LEVEL:.0f} %]",
            "flat within noise",
            "runs",
        )
        note = Markup(
            "<p class='muted'>“Not worse”: ratios whose mean loss the noise between seeds can explain (t-tests, corrected for "
            "their number). “Flat within noise”: ratios whose predicted loss is within one standard deviation between seeds of "
            "the lowest. † The law carries doubts, named in the table of laws. A law that is rejected, or whose best ratio is "
            "next to one that the runs show to be worse, gives no answer. The interval by the law takes the laws that "
            "cannot be told apart for right: it does not know what all of them leave out.</p>"
        )
        return titled("Best ratio by size and budget", note, table(heads, rows)) if rows else Markup("")

    def _equal(self) -> Markup:
        rows: list[tuple[str, ...]] = []
        for size, comparisons in self.analysis.equal_tokens.items():
            for one in comparisons:
                sources = self.analysis.data[one.arm, size].rows
                where = f"{size}, {compact(one.tokens or math.nan)} tokens"
                marked = self._mark(self.analysis.data[one.arm, size], self.analysis.data[self.study.baseline_arm, size])
                rows.append((self.arm(one.arm), "tokens", where, *self._comparison(one, marked), self.sources(sources)))
        for one in self.analysis.equal_compute:
            where = f"{human(one.n_params or math.nan)} at {human(one.tokens or math.nan)} tokens"
            outside = Markup("" if one.inside else ' <span class="warn">(extrapolated)</span>')
            sources = self.analysis.joint[one.arm].rows
            marked = self._mark(self.analysis.joint[one.arm], self.analysis.joint[self.study.baseline_arm])
            compared = self._comparison(one, marked)
            rows.append((self.arm(one.arm), "compute", escape(where) + outside, *compared, self.sources(sources)))
        heads = ("arm", "equal", "at", f"loss by the law [{LEVEL:.0f} %]", f"against the baseline [{LEVEL:.0f} %]", "", "runs")
        compute = ""
        if self.analysis.no_best_size:
            compute = (
                " There is no comparison at equal compute: by a joint law, or a bootstrap of one, the loss does not fall in N "
                "or in D, so that no size is best."
            )
        elif self.analysis.compute:
            compute = f" Equal compute: 6ND = {scientific(self.analysis.compute)}, each arm at its own best N."
        generation = Markup("Generating the text is not counted (<code>report.count_generation=true</code> does).")
        if self.analysis.generation:
            generation = Markup(
                "Generating the text is counted: each arm has the tokens that cost, with their generation, what the baseline's "
                "tokens do, and speed-ups are of that cost."
            )
        note = html("<p class='muted'>Equal tokens at one size is equal compute, too.{} {}</p>", compute, generation)
        return titled("At equal cost", note, table(heads, rows)) if rows else Markup("")

    def _speed(self) -> Markup:
        rows = []
        for (arm, size), curve in self.analysis.speed.items():
            number = self._number(self.analysis.data[arm, size])
            law_link = html('<a href="#law-{}">its law</a>', number)
            for position in range(0, len(curve.loss), _SPEED_STEP):
                if not math.isfinite(curve.fitted[position]):
                    continue
                measured = "" if math.isnan(curve.measured[position]) else f"{curve.measured[position]:.2f}x"
                kind = "measured" if curve.inside[position] else "extrapolated"
                law = f"{curve.fitted[position]:.2f}x {bounds_of((curve.low[position], curve.high[position]), '.2f')}"
                marked = self._mark(self.analysis.data[arm, size], self.analysis.data[self.study.baseline_arm, size])
                said = html("{}{}", law, marked)
                rows.append((self.arm(arm), size, f"{curve.loss[position]:.3f}", measured, said, kind, law_link))
        heads = ("arm", "N", "loss", "measured", f"by the laws [{LEVEL:.0f} %]", "", "runs of")
        if not rows:
            return Markup("")
        return html("<h3>Speed-up</h3><details><summary>Table</summary>{}</details>", table(heads, rows))

    def _behind(self) -> Markup:
        rows = []
        for one in self.analysis.behind:
            found = one.contrast
            floor = "n/a" if found.floor is None else in_percent(found.floor)
            exponent = "n/a"
            if found.exponent is not None:
                exponent = f"{found.exponent.value:+.3f} {bounds_of(found.exponent.interval, '+.3f')}"
            verdict: Markup | str = Markup('<span class="warn">falls behind</span>') if one.collapses else "no sign of it"
            numbers = (in_percent(found.last), in_percent(found.gap), floor, exponent, p_value(one.p))
            rows.append((self.arm(one.arm), one.size, verdict, *numbers, found.noise, self.sources(one.rows)))
        heads = (
            *("arm", "N", "", f"gap at the largest D [{LEVEL:.0f} %]", "gap per doubling", "floor at one exponent"),
            *("exponent at one floor", "p", "noise from", "runs"),
        )
        note = Markup(
            "<p class='muted'>An arm collapses if it falls behind the baseline for good: a plateau, a higher floor and a "
            "smaller exponent all make its law's floor higher than the baseline's where both have one exponent. p is of that "
            "contrast, one-sided, corrected for the number of arms and sizes (Holm). A lead that only shrinks is none of it. "
            "Every cell has the variance of its own seeds; without seeds, that around both laws.</p>"
        )
        return titled("Does an arm fall behind as budgets grow?", note, table(heads, rows)) if rows else Markup("")

    def _collapse(self) -> Markup:
        rows = []
        for one in self.analysis.collapse:
            unit = "per doubling of the budget" if one.what == "budget" else "per unit of the share"
            slope = f"{percent(one.trend.slope)} {bounds_of(tuple(100 * bound for bound in one.trend.interval), '.2f')}"
            at = one.at if one.what == "budget" else at_cell(one.at)
            last = " to ".join(
                compact(2**value) if one.what == "budget" else simple_fraction(value) for value in one.trend.values
            )
            head = (one.of, one.what, self._verdict(one), f"{at}: {last}", f"{slope} {unit}")
            rows.append((*head, p_value(one.p_falls), p_value(one.p_rises), self.sources(one.rows)))
        heads = ("of", "along", "", "between", f"slope of the loss [{LEVEL:.0f} %]", "p falls", "p rises", "runs")
        note = Markup(
            "<p class='muted'>Between the last two budgets of an arm, and the last two shares of a family: does the loss "
            "still fall, or does it rise? p-values against “does not fall” and “does not rise”, by Student's t with the noise "
            "between seeds of the same arm and size (or size and budget), corrected for the number of tests (Holm).</p>"
        )
        return titled("Does a loss rise?", note, table(heads, rows)) if rows else Markup("")

    def _verdict(self, one: Any) -> str:
        limit = (100 - LEVEL) / 200
        if one.p_rises < limit:
            return Markup('<span class="warn">rises</span>')
        return "falls" if one.p_falls < limit else "undecided"

    # ---- laws

    def laws(self) -> Markup:
        """Every fit, with what speaks against it."""
        rows = [self._law_row(fitted) for fitted in self.analysis.fits]
        heads = ("law", "of", f"parameters [{LEVEL:.0f} %]", "error", "held-out error", "doubts", "runs")
        parts = [Markup('<h2 id="laws">Laws</h2>')]
        parts.append(
            html(
                "<p>Huber's loss (delta 1e-3) on the logarithm of the loss, the best of a grid of starts. Intervals are those "
                "of the bootstrap ({:,} draws). A law that is not to be believed says so in “doubts”. "
                "Error: mean absolute relative error, on the runs fitted to and on those held out.</p>",
                self.study.report.bootstraps,
            )
        )
        none = Markup("<p>No law could be tried: three budgets, sizes or ratios are needed.</p>")
        anchors = [f"law-{self._number(fitted)}" for fitted in self.analysis.fits]
        parts.append(table(heads, rows, anchors) if rows else none)
        if self.analysis.domains:
            shown = sorted(self.analysis.domains, key=lambda one: -max(row.flops for row in one.rows))[:_MOST_DOMAIN_LAWS]
            laws = table(heads, [self._domain_row(fitted) for fitted in shown])
            parts.append(
                html(
                    "<details><summary>Laws of single validation domains ({} of {}, those with most compute; laws/ has "
                    "all)</summary>{}"
                    "</details>",
                    len(shown),
                    len(self.analysis.domains),
                    laws,
                )
            )
        return Markup("\n").join(parts)

    def _law_row(self, fitted: Fitted) -> tuple[str, ...]:
        law, *of = fitted.key
        label = ", ".join(at_budget(part) for part in of)
        if fitted.fit is None:
            return (
                law,
                label,
                html('<div class="wide warn">{}</div>', fitted.problem),
                "",
                "",
                "",
                self.sources(fitted.rows),
            )
        warnings = Markup("").join(html("<p>{}</p>", str(warning)) for warning in fitted.doubts)
        codes = ", ".join(dict.fromkeys(warning.code for warning in fitted.doubts))
        doubts = html('<details><summary class="warn">{}</summary>{}</details>', codes, warnings) if warnings else "none"
        held = "n/a"
        if fitted.holdout is not None:
            held = f"{percent(fitted.holdout.mean_absolute_relative_error)} of {fitted.holdout.points}"
        error = percent(fitted.fit.mean_absolute_relative_error)
        wide = html('<div class="wide">{}</div>', describe_fit(fitted.fit))
        return law, label, wide, error, held, doubts, self.sources(fitted.rows)

    def _domain_row(self, fitted: Fitted) -> tuple[str, ...]:
        """A law of one domain: its runs, and what its doubts mean, are those of the law of the aggregate."""
        law, *of, domain = fitted.key
        whole = self.analysis.data.get((of[0], of[1])) if law == "data" else self.analysis.model.get((of[0], int(of[1])))
        runs = "" if whole is None else html('<a href="#law-{}">as here</a>', self._number(whole))
        label = ", ".join((*(at_budget(part) for part in of), domain))
        if fitted.fit is None:
            return law, label, html('<span class="warn">{}</span>', fitted.problem), "", "", "", runs
        codes = ", ".join(dict.fromkeys(warning.code for warning in fitted.doubts)) or "none"
        error = percent(fitted.fit.mean_absolute_relative_error)
        return law, label, html('<div class="wide">{}</div>', describe_fit(fitted.fit)), error, "n/a", codes, runs

    def _number(self, fitted: Fitted) -> int:
        return next(number for number, one in enumerate(self.analysis.fits) if one is fitted)

    def _mark(self, *fits: Fitted | None) -> Markup:
        """A dagger for each law with doubts that a number comes from; it leads to the row that tells them."""
        marks = [
            html(
                ' <a class="warn" href="#law-{}" title="{}">†</a>',
                self._number(fitted),
                ", ".join(dict.fromkeys(doubt.code for doubt in fitted.doubts)),
            )
            for fitted in fits
            if fitted is not None and fitted.doubts
        ]
        return Markup("").join(dict.fromkeys(marks))

    def _comparison(self, one: Any, marked: Markup) -> tuple[str, str, str]:
        loss, change, verdict = comparison(one)
        if verdict == "distinct" and self.analysis.noise is None:
            verdict = "distinct, as far as the laws hold"
        return html("{}{}", loss, marked), change, verdict

    # ---- design and runs

    def design(self) -> Markup:
        """Arms with what they consumed, and the protocol with its own choices marked."""
        study, rows = self.study, []
        for arm in study.arms:
            members = [row for row in self.rows if row.arm == arm]
            mixture = ", ".join(f"{source} {share.ratio}" for source, share in study.arms[arm].items() if share.ratio)
            largest = max(members, key=lambda row: row.tokens, default=None)
            epochs = "" if largest is None else ", ".join(f"{name} {value:.2f}" for name, value in parts_of(largest, "epochs/"))
            tokens = (
                "" if largest is None else ", ".join(f"{name} {human(value)}" for name, value in parts_of(largest, "tokens/"))
            )
            rows.append((self.arm(arm), mixture, str(len(members)), tokens, epochs))
        heads = ("arm", "mixture", "runs", "tokens by source, longest run", "epochs by source, longest run")
        ours = Markup("").join(html("<li><code>{}</code>: {}</li>", key, why) for key, why in study.ours.items())
        marked = html("<h3>Choices of this study's own</h3><ul class='findings'>{}</ul>", ours) if ours else ""
        shown = study.model_dump(mode="json", include={"protocol", "rates", "seeds", "grid", "sources", "validation"})
        started = "Every run starts from its seed; none continues another."
        if self.checks.trunks:
            started = (
                "Budgets are branches of trunks: those of one trunk share its steps up to where each leaves it, its "
                "seed and the "
                "order of its text, so that they are no independent runs."
            )
        return html(
            '<h2 id="design">Design</h2>{}<p class="muted">Runs that differ in the mixture alone share '
            "initial weights and the order of each source's text. {}</p>"
            "{}<details><summary>Protocol</summary><pre><code>{}</code></pre></details>",
            table(heads, rows),
            started,
            marked,
            yaml12.dump(shown),
        )

    def runs(self) -> Markup:
        """One row per run."""
        domains = list(self.rows[0].domains)
        trunks = ("trunk",) if self.checks.trunks else ()
        rated = ("lr",) if len({(row.size, row.lr) for row in self.rows}) > len({row.size for row in self.rows}) else ()
        heads = ("run", "arm", "N", "D", "seed", *rated, "steps", "loss", *domains, "epochs", "seconds", *trunks)
        rows = []
        for row in self.rows:
            losses = [f"{row.domains[name]:.4f}" for name in domains]
            epochs = ", ".join(f"{name} {value:.2f}" for name, value in parts_of(row, "epochs/"))
            rate = [f"{row.lr:.3g}{' (sweep)' if row.swept else ''}" if row.lr is not None else "n/a"] if rated else []
            numbers = (human(row.n_params), compact(row.tokens), str(row.seed), *rate, str(row.steps), f"{row.loss:.4f}")
            last = (epochs, f"{row.train_seconds:.0f}", *([row.trunk or "none"] if trunks else []))
            rows.append((html("<code>{}</code>", row.id), self.arm(row.arm), *numbers, *losses, *last))
        anchors = [f"run-{row.id}" for row in self.rows]
        listing = table(heads, rows, anchors)
        note = "Also in runs.csv; ratios.csv and metrics.csv beside it join on the run."
        return html('<h2 id="runs">Runs</h2><p class="muted">{}</p>{}', note, listing)

    def arm(self, arm: str) -> Markup:
        """An arm's name with its mark."""
        look = self.style.get(arm)
        if look is None:  # a forecast of an arm that has no run, or is no longer in the study
            return html("{}", arm)
        shown = "var(--ink)" if arm == self.study.baseline_arm else look.color
        return html('<span class="mark" aria-hidden="true" style="color:{}">{}</span>{}', shown, look.sign, arm)

    def sources(self, rows: Sequence[Row]) -> Markup:
        """How many runs a number comes from, and links to them."""
        links = Markup(" ").join(html('<a href="#run-{}">{}</a>', row.id, row.id[:6]) for row in rows)
        return html("<details><summary>{}</summary><p>{}</p></details>", len(rows), links)
