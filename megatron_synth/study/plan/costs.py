"""What a study takes: its sources checked against every run, FLOPs, GPU-hours, money. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_synth.config.errors import UserError
from megatron_synth.data.loading.loader import validation_windows
from megatron_synth.data.loading.run_data import spec_of, vocab_size_of
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec, windows_in
from megatron_synth.data.mixing.schedule import phases_of
from megatron_synth.data.shards.source import Source, check_compatible
from megatron_synth.study.plan.runs import Run
from megatron_synth.study.plan.study_file import Study
from megatron_synth.train.dryrun import open_if_prepared


@dataclass(frozen=True)
class Sources:
    """The sources of a study as far as they are prepared."""

    opened: dict[str, Source]
    """Prepared training sources by name."""
    missing: tuple[str, ...]
    """Paths of what is not prepared, validation included."""
    vocab_size: int | None
    """Tokens of the vocabulary, where it is known."""

    @property
    def required_vocab_size(self) -> int:
        """The vocabulary.

        Raises:
            UserError: it is not known.
        """
        if self.vocab_size is None:
            raise UserError("the vocabulary is not known before the sources are prepared: set protocol.model.vocab_size")
        return self.vocab_size


@dataclass(frozen=True)
class Use:
    """What a run takes from a source."""

    tokens: int
    epochs: float | None
    """None: the size of the source is not known."""


@dataclass(frozen=True)
class Cost:
    """What a run takes."""

    flops: float
    hours: float | None
    """Device-hours; None without `costs`."""
    money: float | None


def open_sources(study: Study, runs: Sequence[Run]) -> Sources:
    """Open what is prepared.

    Raises:
        UserError: a source is damaged, tokenizers differ, or the vocabulary does not fit.
    """
    opened, domains, missing = {}, [], []
    for name, entry in study.sources.items():
        source = open_if_prepared(entry.path, name)
        if source is None:
            missing.append(entry.path)
        else:
            opened[name] = source
    for name, domain in study.validation.items():
        found = open_if_prepared(domain.path, name)
        if found is None:
            missing.append(domain.path)
        else:
            domains.append(found)
    info = check_compatible([*opened.values(), *domains])
    for domain_source in domains:
        validation_windows(domain_source, runs[0].config.train.sequence_length)
    return Sources(opened, tuple(dict.fromkeys(missing)), vocab_size_of(runs[0].config, info))


def check_sources(study: Study, runs: Sequence[Run], sources: Sources) -> dict[tuple[str, int, int], dict[str, Use]]:
    """Hold every run against the size and the cap of its sources, all of them before anything is run.

    A source that is not prepared counts with `tokens`, where the study says so, and is not checked otherwise; nor is one that
    the study makes, before it is made: the run that reads it then refuses what its cap does not allow.

    Returns:
        Of each (arm, steps, samples per step): what it takes from each source.

    Raises:
        UserError: runs that need more of a source than its cap allows, all arms at once.
    """
    uses: dict[tuple[str, int, int], dict[str, Use]] = {}
    refused: dict[str, tuple[int, list[str]]] = {}
    for run in runs:
        key = use_key(run)
        if key in uses:
            continue
        samples, length = run.config.total_samples, run.config.window_length
        specs = [_spec(study, run, name, sources, length) for name in run.config.data.sources]
        plan = MixturePlan(specs, run.config.data_seed, phases_of(run.config.data, length))
        try:
            plan.check(samples, length)
        except UserError as error:
            reasons = str(error).splitlines()[1:-1]  # a line per source between the head and the advice
            lines = [f"  {run.arm}, {run.tokens:,} tokens:", *(f"  {reason}" for reason in reasons)]
            refused[run.arm] = max(refused.get(run.arm, (0, lines)), (run.tokens, lines))
        uses[key] = {
            spec.name: Use(count * length, None if spec.num_windows == _UNKNOWN else count / spec.epoch_windows)
            for spec, count in zip(specs, plan.counts(samples).tolist(), strict=True)
        }
    if refused:
        lines = [line for _, largest in refused.values() for line in largest]
        raise UserError("\n".join(["sources too small for their share and cap:", *lines]))
    return uses


def use_key(run: Run) -> tuple[str, int, int]:
    """What decides how much a run takes of each source."""
    return run.arm, run.config.train.steps, run.config.train.global_batch_size


_UNKNOWN = 2**62
"""Windows of a source of unknown size: more than any run takes."""


def _spec(study: Study, run: Run, name: str, sources: Sources, length: int) -> SourceSpec:
    entry = run.config.data.sources[name]
    expected = (study.sources[name] if name in study.sources else study.generated[name]).tokens
    if name in sources.opened:
        expected = sources.opened[name].num_tokens
    elif expected is None:
        return spec_of(name, entry, _UNKNOWN, length)
    windows = windows_in(expected, length, shifted=entry.shift_windows)
    return spec_of(name, entry, windows if name in sources.opened else max(1, windows), length)


def cost_of(study: Study, run: Run, vocab_size: int) -> Cost:
    """FLOPs, device-hours and money of a run."""
    flops = run.flops(vocab_size)
    if study.costs is None:
        return Cost(flops, None, None)
    hours = flops / study.costs.rate(study.sizes[run.size].mfu) / 3600
    price = study.costs.price_per_hour
    return Cost(flops, hours, None if price is None else hours * price)


def total(costs: Sequence[Cost]) -> Cost:
    """Sum of costs."""

    def summed(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return math.fsum(known) if known else None

    flops = math.fsum(cost.flops for cost in costs)
    return Cost(flops, summed([cost.hours for cost in costs]), summed([cost.money for cost in costs]))


def require_prepared(study: Study, sources: Sources) -> None:
    """Refuse (UserError) to run with sources that are not prepared."""
    if sources.missing:
        how = f"megatron-synth prepare {study.prepare}" if study.prepare else "megatron-synth prepare"
        raise UserError(f"not prepared: {', '.join(sources.missing)}; make them with: {how}")


def mapping_of_epochs(uses: Mapping[str, Use]) -> str:
    """`web 0.50, qa 2.1` for a table; `?` where the size of a source is not known."""
    return ", ".join(f"{name} {'?' if use.epochs is None else format(use.epochs, '.2f')}" for name, use in uses.items())
