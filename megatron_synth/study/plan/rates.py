"""Learning rates: a rule in size, budget and batch, and the sweep around it that shows whether it is good.

    lr(N, D, B) = lr (N / at)^exponent (D / at_tokens)^tokens_exponent (B / at_batch)^batch_exponent

B is tokens per step. A rate that is best at one budget is not best at another: Delphi's first law, clean to the eye, failed 30
times beyond its fit until rates followed the budget, about as (T0 / T)^0.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from pydantic import Field

from megatron_synth.config.errors import Problem
from megatron_synth.config.rules import check
from megatron_synth.config.schema import Config
from megatron_synth.config.section import Amount, PositiveInt, Section, Seed
from megatron_synth.config.validation import suggest

Positive = Annotated[float, Field(gt=0)]


class RateSweep(Section):
    """Runs at other rates and batches than the rule's, in some cells of the grid. They take no part in the laws."""

    factors: tuple[Positive, ...] = Field((0.25, 0.5, 1.0, 2.0, 4.0), min_length=1)
    """Multiples of the rule's rate."""
    batches: tuple[PositiveInt, ...] = ()
    """Sequences per step. Default: that of the protocol."""
    arms: tuple[str, ...] | None = None
    """Default: the baseline."""
    sizes: tuple[str, ...] | None = None
    """Default: all."""
    tokens: tuple[Amount, ...] | None = None
    """Budgets of the grid. Default: the smallest and the largest of each size."""
    seeds: tuple[Seed, ...] | None = None
    """Default: the first."""


class Rates(Section):
    """The learning rate by size, budget and batch, and its schedule by the length of the run."""

    lr: Positive
    """Peak at the size `at`, the budget `at_tokens` and the batch `at_batch`."""
    at: Positive | None = None
    """Non-embedding parameters that `lr` holds for. Default: all alike."""
    exponent: float = 0.0
    """lr x (N / at) ** exponent, rounded to three digits."""
    at_tokens: Amount | None = None
    """Budget that `lr` holds for. Default: all alike."""
    tokens_exponent: float = 0.0
    """x (D / at_tokens) ** tokens_exponent; about -0.3 where rates follow the budget."""
    at_batch: Amount | None = None
    """Tokens per step that `lr` holds for. Default: all alike."""
    batch_exponent: float = 0.0
    """x (B / at_batch) ** batch_exponent."""
    min_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Rate at the end, as a part of the peak."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Steps of linear warm-up, as a part of the run."""
    max_warmup_steps: PositiveInt | None = None
    """Warm-up is never longer than this."""
    decay_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Schedule wsd: steps of the final decay, as a part of the run. Default: a tenth."""
    sweep: RateSweep | None = None
    """Runs at other rates and batches, from which the report fits the rule."""

    def peak(self, own: float | None, parameters: int, tokens: float, batch: float) -> float:
        """Peak rate of a run, in three digits where a rule makes it.

        Args:
            own: the rate of the size, if it has one, instead of `lr` and its dependence on the size.
            parameters: N.
            tokens: D.
            batch: B, tokens per step.
        """
        rate, ruled = (self.lr, False) if own is None else (own, False)
        if own is None and self.at is not None:
            rate, ruled = rate * (parameters / self.at) ** self.exponent, True
        if self.at_tokens is not None and self.tokens_exponent:
            rate, ruled = rate * (tokens / self.at_tokens) ** self.tokens_exponent, True
        if self.at_batch is not None and self.batch_exponent:
            rate, ruled = rate * (batch / self.at_batch) ** self.batch_exponent, True
        return float(f"{rate:.3g}") if ruled else rate

    def schedule(self, lr: float, steps: int) -> dict[str, Any]:
        """Rates and lengths of the schedule in a run of `steps` steps: keys of `optim`."""
        warmup = round(self.warmup_fraction * steps)
        if self.max_warmup_steps is not None:
            warmup = min(warmup, self.max_warmup_steps)
        section: dict[str, Any] = {"lr": lr, "min_lr": lr * self.min_lr_fraction, "warmup_steps": warmup}
        if self.decay_fraction is not None:
            section["decay_steps"] = max(1, round(self.decay_fraction * steps))
        return section


@dataclass(frozen=True)
class Variant:
    """A run of the sweep: which run of the grid it is a variant of, and its configuration."""

    of: int
    config: Config
    lr: float


def check_rates(
    rates: Rates, *, arms: Iterable[str], sizes: Iterable[str], seeds: Iterable[int], tokens: Iterable[float]
) -> Iterator[Problem]:
    """Rules between the rates and the rest of a study; tokens: budgets that entries of the grid name."""
    for at, exponent in (("at_tokens", "tokens_exponent"), ("at_batch", "batch_exponent")):
        if getattr(rates, exponent) and getattr(rates, at) is None:
            yield Problem(f"rates.{exponent}", f"needs rates.{at}: the value that `lr` holds for")
    sweep = rates.sweep
    if sweep is None:
        return
    known: dict[str, list[Any]] = {"arms": list(arms), "sizes": list(sizes), "seeds": list(seeds)}
    for key, values in known.items():
        for value in getattr(sweep, key) or ():
            if value not in values:
                hint = suggest(str(value), [str(item) for item in values]) or f"; known: {', '.join(map(str, values))}"
                yield Problem(f"rates.sweep.{key}", f"'{value}' is none of the study's {key}{hint}")
    budgets = list(tokens)
    for budget in sweep.tokens or ():
        if budgets and budget not in budgets:
            yield Problem(
                "rates.sweep.tokens", f"{budget:,.0f} is no budget of the grid: {', '.join(f'{one:,.0f}' for one in budgets)}"
            )
    if len(set(sweep.factors)) < len(sweep.factors) or len(set(sweep.batches)) < len(sweep.batches):
        yield Problem("rates.sweep", "names a factor or a batch twice")


def variants(
    rates: Rates,
    grid: list[tuple[str, str, int, int, int, float | None, Config]],
    baseline: str,
    first_seed: int,
    problems: dict[Problem, None],
) -> Iterator[Variant]:
    """The runs of a sweep, without those that are runs of the grid.

    Args:
        rates: of the study.
        grid: of each run arm, size, budget, seed, parameters, own rate of the size, and configuration.
        baseline: the arm that is swept by default.
        first_seed: the seed by default.
        problems: where what is wrong is noted.
    """
    sweep = rates.sweep
    if sweep is None:
        return
    budgets: dict[str, set[int]] = {}
    for _, size, budget, *_ in grid:
        budgets.setdefault(size, set()).add(budget)
    for place, (arm, size, budget, seed, parameters, own, config) in enumerate(grid):
        wanted = sweep.tokens if sweep.tokens is not None else (min(budgets[size]), max(budgets[size]))
        chosen = arm in (sweep.arms or (baseline,)) and size in (sweep.sizes or (size,)) and budget in wanted
        if not chosen or seed not in (sweep.seeds or (first_seed,)):
            continue
        for batch in sweep.batches or (config.train.global_batch_size,):
            step = batch * config.train.sequence_length
            if budget < step:
                message = f"a budget of {budget:,} tokens is below one batch of {step:,} (sequences x length)"
                problems[Problem("rates.sweep.batches", message)] = None
                continue
            steps = max(1, round(Fraction(budget, step)))
            for factor in sweep.factors:
                if factor == 1 and batch == config.train.global_batch_size:
                    continue
                lr = float(f"{factor * rates.peak(own, parameters, budget, step):.3g}")
                optim = config.optim.model_copy(update=rates.schedule(lr, steps))
                micro = math.gcd(config.train.micro_batch_size, batch)
                train = config.train.model_copy(update={"steps": steps, "global_batch_size": batch, "micro_batch_size": micro})
                found = config.model_copy(update={"optim": optim, "train": train})
                for one in check(found):
                    problems[
                        Problem("rates.sweep", f"batch {batch}, factor {factor:g} at {size}: {one.path}: {one.message}")
                    ] = None
                yield Variant(place, found, lr)
