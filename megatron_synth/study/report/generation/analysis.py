"""What a study that makes its own text asks: does a loop collapse, how much do corpora scatter, and what did the text cost?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from megatron_synth.study.execute.folder import Folder
from megatron_synth.study.execute.shapes import CorpusResult
from megatron_synth.study.fit.contrast import Estimate
from megatron_synth.study.fit.noise import Noise, holm
from megatron_synth.study.fit.rounds import RoundsContrast, Spread, rounds_contrast, spread_of
from megatron_synth.study.plan.corpora import Corpus, corpora_of
from megatron_synth.study.plan.runs import Run
from megatron_synth.study.plan.study_file import Study
from megatron_synth.study.report.analysis import LEVEL
from megatron_synth.study.report.collect import Row

LIMIT = (100 - LEVEL) / 200
"""Of a one-sided p, after its correction."""
RISES, WORSE, NO_SIGN, ONE_SEED = "rises", "worse", "no sign", "one seed"


@dataclass(frozen=True)
class RoundText:
    """The newest corpora of a round, over seeds; `by chance` is a natural draw of as many tokens.

    All of them means: tokens, share of the tail's tokens that are lost, and divergences from natural text.
    """

    corpora: int
    tokens: float
    lost: float
    lost_by_chance: float
    kl: float
    kl_by_chance: float
    kl_reverse: float
    kl_reverse_by_chance: float


@dataclass(frozen=True)
class Loop:
    """A loop at one size and budget.

    losses: [S, R + 1], real text first; rows: the runs behind them. text: of each round, where its corpora are there.
    contrast: None with one seed. p_rises, p_worse: corrected for the number of loops, sizes and budgets (Holm).
    """

    name: str
    protocol: str
    size: str
    tokens: int
    losses: Any
    rows: tuple[Row, ...]
    text: tuple[RoundText | None, ...]
    contrast: RoundsContrast | None
    p_rises: float
    p_worse: float

    @property
    def verdict(self) -> str:
        """`rises` by round, `worse` than real text without a rise that is shown, `no sign` of either, or `one seed`."""
        if self.contrast is None:
            return ONE_SEED
        if self.contrast.rise is not None and self.p_rises < LIMIT and self.contrast.last.value > 0:
            return RISES
        return WORSE if self.p_worse < LIMIT else NO_SIGN


@dataclass(frozen=True)
class Copies:
    """Corpora that differ in the seed of their generation alone, each trained on with the same seeds."""

    name: str
    size: str
    tokens: int
    rows: tuple[Row, ...]
    spread: Spread


@dataclass(frozen=True)
class ArmCost:
    """An arm with text that the study has made, at one size and budget; means over its runs.

    share: of synthetic tokens. asked, kept, tokens_out, made: requests, texts kept, tokens written, and tokens prepared, of all
    corpora of a run. generation_flops: of these, rejected text included; None where a generator's parameters are not known.
    seconds: of generation. equal_tokens: log(loss / the baseline's) at the same budget. bought: how many tokens the baseline
    trains on with the FLOPs of both, generation and training; equal_compute: against its loss there, None where no budget
    reaches it.
    """

    arm: str
    size: str
    tokens: int
    rows: tuple[Row, ...]
    share: float
    kinds: tuple[str, ...]
    asked: float
    kept: float
    tokens_out: float
    made: float
    seconds: float
    train_flops: float
    generation_flops: float | None
    loss: float
    equal_tokens: Estimate | None
    bought: float | None
    equal_compute: Estimate | None


@dataclass(frozen=True)
class Generation:
    """All of it. corpora: that the study makes, each with its result, None while it is not there."""

    corpora: list[tuple[Corpus, CorpusResult | None]]
    loops: list[Loop] = field(default_factory=list)
    copies: list[Copies] = field(default_factory=list)
    costs: list[ArmCost] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As generation.json holds it: what the tables of the page show, and the runs that it comes from."""

        def plain(one: Any) -> dict[str, Any]:
            content = asdict(replace(one, rows=()))
            return {**content, "rows": [row.run for row in one.rows]}

        loops = [{**plain(loop), "losses": loop.losses.tolist(), "verdict": loop.verdict} for loop in self.loops]
        corpora = [result for _, result in self.corpora if result is not None]
        return {
            "level": LEVEL,
            "loops": loops,
            "copies": [plain(one) for one in self.copies],
            "costs": [plain(one) for one in self.costs],
            "corpora": corpora,
        }


def generation_of(
    study: Study, runs: Sequence[Run], rows: Sequence[Row], folder: Folder, noise: Noise | None
) -> Generation | None:
    """Answer what the runs allow; None of a study that makes no text.

    Raises:
        UserError: the record of a corpus is damaged.
    """
    corpora = corpora_of(runs)
    if not corpora:
        return None
    results = {corpus.id: folder.corpus(corpus) for corpus in corpora}
    work = _Work(study, {run.id: run for run in runs}, list(rows), results, noise)
    return Generation(
        corpora=[(corpus, results[corpus.id]) for corpus in corpora],
        loops=work.loops(),
        copies=work.copies(),
        costs=work.costs(),
    )


class _Work:
    def __init__(
        self,
        study: Study,
        runs: dict[str, Run],
        rows: list[Row],
        results: dict[str, CorpusResult | None],
        noise: Noise | None,
    ):
        self.study, self.runs, self.rows, self.results, self.noise = study, runs, rows, results, noise
        self.cells = sorted({(row.n_params, row.size, row.tokens) for row in rows})

    def _by_seed(self, arm: str, size: str, tokens: int) -> dict[int, Row]:
        return {row.seed: row for row in self.rows if (row.arm, row.size, row.tokens) == (arm, size, tokens)}

    # ---- loops

    def loops(self) -> list[Loop]:
        found: list[tuple[dict[str, Any], RoundsContrast | None]] = []
        for name, loop in self.study.rounds.items():
            for _, size, tokens in self.cells:
                arms = (self.study.baseline_arm, *(loop.arms or ()))
                tables = [self._by_seed(arm, size, tokens) for arm in arms]
                seeds = [seed for seed in self.study.seeds if all(seed in table for table in tables)]
                if not seeds:
                    continue
                rows = [[table[seed] for table in tables] for seed in seeds]
                losses = np.array([[row.loss for row in line] for line in rows])
                what: dict[str, Any] = {"name": name, "protocol": _protocol(loop), "size": size, "tokens": tokens}
                what |= {"losses": losses, "rows": tuple(row for line in rows for row in line)}
                what["text"] = tuple(self._text([line[number] for line in rows]) for number in range(1, len(arms)))
                contrast = rounds_contrast(losses[:, 0], losses[:, 1:], level=LEVEL) if len(seeds) > 1 else None
                found.append((what, contrast))
        rises = _corrected([None if one is None or one.rise is None else one.rise.p for _, one in found])
        worse = _corrected([None if one is None else one.last.p for _, one in found])
        return [
            Loop(**what, contrast=one, p_rises=rise, p_worse=last)
            for (what, one), rise, last in zip(found, rises, worse, strict=True)
        ]

    def _text(self, rows: Sequence[Row]) -> RoundText | None:
        """Of the newest corpora of a round's runs."""
        made = []
        for row in rows:
            run = self.runs.get(row.id)
            newest = [name for name in self.study.arms[row.arm] if name in self.study.generated][-1]
            result = None if run is None else self.results[run.corpora[newest].id]
            if result is None:
                return None
            made.append(result["unigrams"])

        def mean(value: Callable[[Any], float]) -> float:
            return float(np.mean([value(one) for one in made]))

        return RoundText(
            corpora=len(made),
            tokens=mean(lambda one: one["counted"]),
            lost=mean(lambda one: one["lost"]),
            lost_by_chance=mean(lambda one: one["lost_by_chance"]),
            kl=mean(lambda one: one["kl"]),
            kl_by_chance=mean(lambda one: one["kl_by_chance"]),
            kl_reverse=mean(lambda one: one["kl_reverse"]),
            kl_reverse_by_chance=mean(lambda one: one["kl_reverse_by_chance"]),
        )

    # ---- corpora of one generator

    def copies(self) -> list[Copies]:
        found = []
        for name, arms in self.study.copies.items():
            for _, size, tokens in self.cells:
                tables = [self._by_seed(arm, size, tokens) for arm in arms]
                tables = [table for table in tables if table]
                seeds = [seed for seed in self.study.seeds if tables and all(seed in table for table in tables)]
                if min(len(tables), len(seeds)) < 2:
                    continue
                rows = [[table[seed] for seed in seeds] for table in tables]
                spread = spread_of([[row.loss for row in line] for line in rows])
                found.append(Copies(name, size, tokens, tuple(row for line in rows for row in line), spread))
        return found

    # ---- costs

    def costs(self) -> list[ArmCost]:
        found = []
        for arm in self.study.arms:
            for _, size, tokens in self.cells:
                rows = list(self._by_seed(arm, size, tokens).values())
                made = [self._made(row) for row in rows]
                if not rows or not any(made) or any(result is None for of_run in made for result in of_run):
                    continue
                results = [[result for result in of_run if result is not None] for of_run in made]
                found.append(self._cost(arm, size, tokens, rows, results))
        return found

    def _made(self, row: Row) -> list[CorpusResult | None]:
        run = self.runs.get(row.id)
        return [] if run is None else [self.results[corpus.id] for corpus in run.corpora.values()]

    def _cost(
        self, arm: str, size: str, tokens: int, rows: Sequence[Row], results: Sequence[Sequence[CorpusResult]]
    ) -> ArmCost:
        def mean(value: Callable[[CorpusResult], float]) -> float:
            return float(np.mean([sum(value(result) for result in of_run) for of_run in results]))

        flops = [result["cost"]["flops"] for of_run in results for result in of_run]
        generation = None if any(one is None for one in flops) else mean(lambda one: one["cost"]["flops"] or 0.0)
        train = float(np.mean([row.flops for row in rows]))
        bought = None if generation is None else tokens * (1 + generation / train)
        share = sum(float(part.ratio) for name, part in self.study.arms[arm].items() if name in self.study.generated)
        return ArmCost(
            arm=arm,
            size=size,
            tokens=tokens,
            rows=tuple(rows),
            share=share,
            kinds=tuple(dict.fromkeys(result["template"] for result in results[0])),
            asked=mean(lambda one: one["account"]["asked"]),
            kept=mean(lambda one: one["account"]["kept"]),
            tokens_out=mean(lambda one: one["cost"]["tokens_out"]),
            made=mean(lambda one: one["tokens"]),
            seconds=mean(lambda one: one["seconds"]),
            train_flops=train,
            generation_flops=generation,
            loss=float(np.exp(np.mean(np.log([row.loss for row in rows])))),
            equal_tokens=self._against(rows, size, float(tokens)),
            bought=bought,
            equal_compute=None if bought is None else self._against(rows, size, bought),
        )

    def _against(self, rows: Sequence[Row], size: str, tokens: float) -> Estimate | None:
        """log(loss / that of the baseline on so many tokens), between its budgets along a straight line in log and log."""
        baseline = self.study.baseline_arm
        budgets = sorted({row.tokens for row in self.rows if (row.arm, row.size) == (baseline, size)})
        if self.noise is None or not budgets or not budgets[0] <= tokens <= budgets[-1]:
            return None
        means, counts = [], []
        for budget in budgets:
            losses = [row.loss for row in self._by_seed(baseline, size, budget).values()]
            means.append(float(np.mean(np.log(losses))))
            counts.append(len(losses))
        above = next(place for place, budget in enumerate(budgets) if budget >= tokens)
        below = above if budgets[above] == tokens else above - 1
        weight = 0.0 if above == below else np.log(tokens / budgets[below]) / np.log(budgets[above] / budgets[below])
        base = (1 - weight) * means[below] + weight * means[above]
        variance = 1 / len(rows) + (1 - weight) ** 2 / counts[below] + (weight**2 / counts[above] if above != below else 0.0)
        return _estimate(float(np.mean(np.log([row.loss for row in rows])) - base), float(np.sqrt(variance)), self.noise)


def _corrected(p_values: Sequence[float | None]) -> list[float]:
    """P-values corrected for the number of those that are there; 1 where there is none."""
    known = iter(holm([p for p in p_values if p is not None]) if any(p is not None for p in p_values) else ())
    return [1.0 if p is None else float(next(known)) for p in p_values]


def _estimate(value: float, scale: float, noise: Noise) -> Estimate:
    """With an error of `scale` times the study's noise floor, by Student's t."""
    from scipy.stats import t as student

    error = scale * noise.relative
    half = float(student.ppf(0.5 + LEVEL / 200, noise.freedom)) * error
    p = float(student.sf(value / error, noise.freedom)) if error > 0 else float(value <= 0)
    return Estimate(value, (value - half, value + half), p, float(noise.freedom))


def _protocol(loop: Any) -> str:
    real = "" if loop.real is None else f", {loop.real} real"
    return f"{loop.protocol}{real}"
