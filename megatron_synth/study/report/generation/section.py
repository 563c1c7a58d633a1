"""The part of a study's page about text that the study has made, and the sentences about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from markupsafe import Markup

from megatron_synth.core.html import html
from megatron_synth.core.html import table as plain_table
from megatron_synth.core.log import compact, duration, human, scientific
from megatron_synth.study.fit.contrast import Estimate
from megatron_synth.study.fit.rounds import Spread
from megatron_synth.study.plan.study_file import Costs
from megatron_synth.study.report.analysis import LEVEL
from megatron_synth.study.report.collect import Row
from megatron_synth.study.report.generation.analysis import NO_SIGN, ONE_SEED, RISES, WORSE, ArmCost, Generation, Loop

_VERDICTS = {
    RISES: "rises by round",
    WORSE: "worse than real text, no rise shown",
    NO_SIGN: "no sign of either",
    ONE_SEED: "one seed: no verdict",
}


def signed(one: Estimate) -> str:
    """`+4.10 % [+3.20, +5.00]`."""
    low, high = one.interval
    return f"{100 * one.value:+.2f} % [{100 * low:+.2f}, {100 * high:+.2f}]"


# ---- sentences


def generation_findings(found: Generation, costs: Costs | None) -> Iterator[str]:
    """What the tables of generated text say."""
    for loop in found.loops:
        yield _loop_sentence(loop, len(found.loops))
    for one in found.copies:
        spread = one.spread
        yield (
            f"{one.name}: {spread.corpora} corpora of one generator scatter by {_percent(spread.between_corpora)} of the loss, "
            f"{spread.seeds} seeds of training by {_percent(spread.between_seeds)}, and {_percent(spread.rest)} is neither's "
            f"(p of equal corpora {_p(spread.p)}): a study with one corpus "
            f"{'takes its luck for the kind' if spread.p < 0.05 else 'loses little by it, as far as these can tell'}."
        )
    made = [result for _, result in found.corpora if result is not None]
    if made:
        flops = [result["cost"]["flops"] for result in made]
        known = math.fsum(value for value in flops if value is not None)
        unknown = "" if all(value is not None for value in flops) else " (of those whose generator's size is known)"
        money = ""
        if costs is not None and costs.price_per_hour is not None:
            money = f", {known / costs.rate() / 3600 * costs.price_per_hour:,.2f} {costs.currency} at the rate of training"
        written = sum(result["cost"]["tokens_out"] for result in made)
        kept = sum(result["account"]["kept"] for result in made)
        asked = sum(result["account"]["asked"] for result in made)
        yield (
            f"{len(made)} corpora were made: {asked:,} texts asked for, {kept:,} kept, {human(written)} tokens written with "
            f"{scientific(known)} FLOPs{unknown}{money}."
        )


def _loop_sentence(loop: Loop, tests: int) -> str:
    contrast, rounds = loop.contrast, loop.losses.shape[1] - 1
    protocol = "" if loop.protocol == loop.name else f" ({loop.protocol})"
    where = f"{loop.name}{protocol} at {loop.size} and {compact(loop.tokens)} tokens"
    if contrast is None:
        change = 100 * (loop.losses[0, -1] / loop.losses[0, 0] - 1)
        return f"{where}: one seed, so nothing says how much of {change:+.1f} % after {rounds} rounds is chance."
    last = f"after {rounds} round{'s' if rounds > 1 else ''} its loss is {signed(contrast.last)} beside real text alone"
    how = f"{contrast.seeds} seeds, corrected for {tests} loops"
    if contrast.rise is None:
        said = "worse" if loop.verdict != NO_SIGN else "not shown to be worse"
        return f"{where}: {last} (p = {_p(loop.p_worse)}, {how}): {said}."
    slope = f"changes by {signed(contrast.rise)} a round"
    if loop.verdict == RISES:
        return f"{where} collapses: its loss {slope} (p = {_p(loop.p_rises)}, {how}); {last}."
    limit = f"a rise above {_percent(contrast.rise.interval[1])} a round is excluded"
    if loop.verdict == NO_SIGN:
        return f"{where}: no sign of collapse: its loss {slope} (p = {_p(loop.p_rises)}, {how}), {limit}; {last}."
    told = f"{where} is worse than real text and not shown to go on rising"
    return f"{told}: {last} (p = {_p(loop.p_worse)}, {how}); it {slope}, {limit}."


# ---- tables


class Section:
    """The part of the page. arm, sources: how the page shows an arm, and the runs that a number comes from."""

    def __init__(
        self, found: Generation, costs: Costs | None, arm: Callable[[str], Markup], sources: Callable[[Sequence[Row]], Markup]
    ):
        self._found, self._costs, self._arm, self._sources = found, costs, arm, sources

    def render(self) -> Markup:
        """All of its tables."""
        parts = [Markup('<h2 id="generated">Generated text</h2>'), self._loops(), self._texts(), self._arms(), self._copies()]
        return Markup("\n").join([*(part for part in parts if part), self._corpora()])

    def _loops(self) -> Markup:
        rows = []
        for loop in self._found.loops:
            contrast = loop.contrast
            changes = 100 * (np.log(loop.losses[:, 1:]) - np.log(loop.losses[:, :1])).mean(axis=0)
            rounds = "; ".join(f"{change:+.2f}" for change in changes)
            rise = "n/a" if contrast is None or contrast.rise is None else signed(contrast.rise)
            last = "n/a" if contrast is None else signed(contrast.last)
            verdict: Markup | str = _VERDICTS[loop.verdict]
            if loop.verdict in (RISES, WORSE):
                verdict = html('<span class="warn">{}</span>', verdict)
            head = (loop.name, loop.protocol, loop.size, compact(loop.tokens), str(len(loop.losses)))
            tests = (rise, _p(loop.p_rises), last, _p(loop.p_worse))
            rows.append((*head, f"{rounds} %", *tests, verdict, self._sources(loop.rows)))
        if not rows:
            return Markup("")
        heads = (
            *("loop", "protocol", "N", "D", "seeds", "loss by round against real text"),
            *(
                f"slope per round [{LEVEL:.0f} %]",
                "p rises",
                f"last round against real text [{LEVEL:.0f} %]",
                "p worse",
                "",
                "runs",
            ),
        )
        note = Markup(
            "<p class='muted'>Each round's text is made by the model that the round before has trained, with the same seed; "
            "real text alone is what the first one learned from. The slope is over the rounds, real text left out: a loss "
            "that steps up once and stays is worse, and has not collapsed. Each seed gives one slope and one difference, "
            "whose Student's intervals hold whatever the rounds of a seed share. p-values are one-sided, corrected for the "
            "number of loops, sizes and budgets (Holm).</p>"
        )
        return html("<h3>Does the loss rise by round?</h3>{}{}", note, _table(heads, rows))

    def _texts(self) -> Markup:
        rows = []
        for loop in self._found.loops:
            for number, text in enumerate(loop.text, start=1):
                if text is None:
                    continue
                lost = f"{100 * text.lost:.1f} % ({100 * text.lost_by_chance:.1f} %)"
                kl = f"{text.kl:.4f} ({text.kl_by_chance:.4f})"
                reverse = f"{text.kl_reverse:.4f} ({text.kl_reverse_by_chance:.4f})"
                head = (f"{loop.name}, {loop.size}, {compact(loop.tokens)}", str(number), str(text.corpora), human(text.tokens))
                rows.append((*head, lost, kl, reverse))
        heads = ("loop", "round", "corpora", "tokens", "tail tokens lost", "KL(text || natural)", "KL(natural || text)")
        note = Markup(
            "<p class='muted'>The newest text of each round, mean over seeds, by the study's tokenizer. The tail: natural "
            "tokens beyond the most frequent that make up 90 % of the text; lost: those that never occur. Divergences of "
            "unigrams in nats. In brackets: a draw of as many tokens from the natural unigrams, which lacks some by "
            "chance.</p>"
        )
        return html("<h3>What the text loses</h3>{}{}", note, _table(heads, rows)) if rows else Markup("")

    def _arms(self) -> Markup:
        rows = [self._cost_row(one) for one in self._found.costs]
        priced = self._costs is not None and self._costs.price_per_hour is not None
        heads = (
            *(
                "arm",
                "N",
                "D",
                "synthetic",
                "text",
                "kept of asked",
                "written",
                "in the corpus",
                "seconds",
                "FLOPs of generation",
            ),
            *(("its price",) if priced else ()),
            *("of training", "loss", f"against real text, equal tokens [{LEVEL:.0f} %]"),
            *(f"equal compute [{LEVEL:.0f} %]", "runs"),
        )
        note = Markup(
            "<p class='muted'>Means over seeds. Generation: 2 x parameters x tokens read and written, rejected text "
            "included, of all corpora that a run reads, whatever it takes of them; training the generator is not counted. "
            "Equal compute: the baseline trained on as many more tokens as the FLOPs of generation buy, between its "
            "measured budgets along a line in log and log; n/a beyond them. Intervals by the noise floor, not corrected for "
            "their number.</p>"
        )
        return (
            html("<h3>What each arm's text cost, and what it was worth</h3>{}{}", note, _table(heads, rows))
            if rows
            else Markup("")
        )

    def _cost_row(self, one: ArmCost) -> tuple[str, ...]:
        generation = "n/a" if one.generation_flops is None else scientific(one.generation_flops)
        price: tuple[str, ...] = ()
        if self._costs is not None and self._costs.price_per_hour is not None:
            known = one.generation_flops
            cost = None if known is None else known / self._costs.rate() / 3600 * self._costs.price_per_hour
            price = ("n/a" if cost is None else f"{cost:,.2f}",)
        equal = "n/a" if one.equal_tokens is None else signed(one.equal_tokens)
        compute = "n/a" if one.bought is None else f"{human(one.bought)} tokens: n/a"
        if one.equal_compute is not None and one.bought is not None:
            compute = f"{human(one.bought)} tokens: {signed(one.equal_compute)}"
        head = (self._arm(one.arm), one.size, compact(one.tokens), f"{100 * one.share:.0f} %", ", ".join(one.kinds))
        text = (f"{one.kept:,.0f} of {one.asked:,.0f}", human(one.tokens_out), human(one.made), duration(one.seconds))
        return (
            *head,
            *text,
            generation,
            *price,
            scientific(one.train_flops),
            f"{one.loss:.4f}",
            equal,
            compute,
            self._sources(one.rows),
        )

    def _copies(self) -> Markup:
        rows = [
            (one.name, one.size, compact(one.tokens), *_spread_cells(one.spread), self._sources(one.rows))
            for one in self._found.copies
        ]
        heads = (
            "corpora of",
            "N",
            "D",
            "corpora x seeds",
            "between corpora",
            "between seeds",
            "neither",
            "p of equal corpora",
            "runs",
        )
        note = Markup(
            "<p class='muted'>Several corpora of one generator that differ in the seed of the draw alone, each trained on "
            "with the same seeds. Standard deviations of the loss, relative, by the analysis of variance of both; p by "
            "F.</p>"
        )
        return html("<h3>Between corpora and between seeds</h3>{}{}", note, _table(heads, rows)) if rows else Markup("")

    def _corpora(self) -> Markup:
        rows = []
        for corpus, result in self._found.corpora:
            if result is None:
                rows.append((html("<code>{}</code>", corpus.name), corpus.describe(), "missing", "", "", "", "", ""))
                continue
            account, cost = result["account"], result["cost"]
            rejected = ", ".join(f"{reason} {count:,}" for reason, count in account["rejected"].items()) or "none"
            unigrams = result["unigrams"]
            rows.append(
                (
                    html("<code>{}</code>", corpus.name),
                    result["by"],
                    f"{account['kept']:,} of {account['asked']:,}",
                    rejected,
                    f"{cost['tokens_in']:,} / {cost['tokens_out']:,}",
                    f"{result['tokens']:,}",
                    duration(result["processor_seconds"]),
                    f"{100 * unigrams['lost']:.1f} %, {unigrams['kl']:.4f}",
                )
            )
        heads = (
            "corpus",
            "made by",
            "kept of asked",
            "rejected",
            "read / written",
            "tokens",
            "processor time",
            "tail lost, KL",
        )
        return html("<details><summary>The {} corpora</summary>{}</details>", len(self._found.corpora), _table(heads, rows))


def _spread_cells(spread: Spread) -> tuple[str, ...]:
    parts = (spread.between_corpora, spread.between_seeds, spread.rest)
    return f"{spread.corpora} x {spread.seeds}", *map(_percent, parts), _p(spread.p)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    return plain_table(heads, rows, row_heads=True)


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
