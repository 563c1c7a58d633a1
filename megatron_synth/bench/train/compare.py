"""The engine and its baselines in one process, in turn, so that what disturbs the machine disturbs them alike.

One pair is one block of steps of every contender, right after each other: A B C, in the next pair C B A, so that a
drift of the machine favors nobody. A ratio compares two blocks of one pair. Whatever a table says of the spread is the
spread of these ratios.

Before anything is timed, every contender trains the same warm-up steps from the same weights. Their losses must agree,
the first one and those after updates: then what is timed is the same computation.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megatron_synth.bench.train.baselines import BASELINES
from megatron_synth.bench.train.engine import (
    Block,
    Contender,
    Engine,
    Rates,
    allocated,
    busiest,
    random_batches,
    resident_bytes,
    run_block,
    vocab_size,
)
from megatron_synth.bench.train.profile import profile
from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import Config
from megatron_synth.core.log import say
from megatron_synth.data.loading.run_data import RunData
from megatron_synth.parallel.groups import Ranks, process_group
from megatron_synth.parallel.plan import Layout
from megatron_synth.train.batch import TensorBatch
from megatron_synth.train.record.run_dir import device_name

TOLERANCES = {"fp32": 1e-3, "bf16": 2e-2}
"""How far the losses of two contenders may be apart, in nats per token."""
BATCHES = 4  # optimizer steps' worth of distinct tokens; the timed steps walk round them


@dataclass(frozen=True)
class Row:
    """What was measured of one contender."""

    name: str
    rates: Rates
    """Of the median of all timed steps."""
    cpu_s: float | None
    """Median processor time of all timed steps; None on a GPU."""
    blocks: tuple[Block, ...]
    """One per pair."""
    peak_bytes: int | None
    losses: tuple[float, ...]
    """Of the warm-up steps, nats per token."""

    def speedups_over(self, other: Row) -> list[float]:
        """Per pair: this contender's tokens/s divided by the other's."""
        return [b.median_s / a.median_s for a, b in zip(self.blocks, other.blocks, strict=True)]

    def cpu_speedups_over(self, other: Row) -> list[float]:
        """Per pair: this contender's tokens per second of processor time divided by the other's; empty on a GPU."""
        return [
            statistics.median(b.cpu_s) / statistics.median(a.cpu_s)
            for a, b in zip(self.blocks, other.blocks, strict=True)
            if a.cpu_s
        ]


@dataclass(frozen=True)
class Comparison:
    """The rows, the engine's first, and where they were measured."""

    rows: tuple[Row, ...]
    device: str
    world_size: int
    shares: dict[str, float] | None = None
    """Of one of the engine's steps on rank 0, by what the time goes to; None when it was not profiled."""
    real_data: bool = False
    """Whether the steps loaded their data."""


def compare(
    config: Config,
    layout: Layout,
    baselines: Sequence[str],
    *,
    pairs: int,
    steps: int,
    warmup: int,
    data: RunData | None = None,
    profiled: bool = False,
    trace: Path | None = None,
    so_far: Callable[[Comparison], None] = lambda result: None,
) -> Comparison:
    """Measure the engine, and baselines by name (keys of `baselines.BASELINES`).

    Args:
        config: what to train; its data are not read.
        layout: of the engine; baselines are possible on a single rank alone.
        baselines: names, none for the engine alone.
        pairs: blocks of each contender.
        steps: timed optimizer steps in a block.
        warmup: optimizer steps before the first block, at least 1.
        data: read these with the loader, as part of the step; the engine alone. Default: random tokens on the device.
        profiled: also profile one step of the engine, after all others.
        trace: a file for the profile of rank 0.
        so_far: given the result after each pair, on every rank: what was measured outlives a run that is cut off.
    """
    vocab_size(config)  # refuse before anything is built
    assert pairs >= 1 and steps >= 1 and warmup >= 1
    if baselines and layout.world_size > 1:
        raise UserError(f"baselines run on a single rank, this launch has {layout.world_size}: give --vs none")
    assert data is None or not baselines
    with process_group(layout, config.train.seed) as ranks:
        from megatron_synth.bench.train.data import real_batches

        source: AbstractContextManager[Sequence[Sequence[TensorBatch]]]
        if data is None:
            source = nullcontext(random_batches(config, layout, ranks, BATCHES))
        else:
            source = real_batches(config, layout, ranks, data)
        with source as batches:
            return _compare(config, layout, ranks, batches, baselines, pairs, steps, warmup, profiled, trace, so_far)


def _compare(
    config: Config,
    layout: Layout,
    ranks: Ranks,
    batches: Sequence[Sequence[TensorBatch]],
    baselines: Sequence[str],
    pairs: int,
    steps: int,
    warmup: int,
    profiled: bool,
    trace: Path | None,
    so_far: Callable[[Comparison], None],
) -> Comparison:
    device = ranks.device
    contenders: list[Contender] = []
    losses: list[tuple[float, ...]] = []
    held: list[int] = []
    weights: dict[str, Tensor] = {}
    for name in ("engine", *baselines):
        before = allocated(device)
        if name == "engine":
            engine = Engine(config, layout, ranks)
            weights = engine.weights() if baselines else {}
            contenders.append(engine)
        else:
            contenders.append(BASELINES[name](config, weights, device))
        losses.append(_warm_up(contenders[-1], batches, warmup))
        # weights and optimizer states, which exist since the first step
        held.append(allocated(device) - before)
    check_agreement(contenders, losses, TOLERANCES[config.precision.dtype])

    blocks: list[list[Block]] = [[] for _ in contenders]
    for pair in range(pairs):
        order = range(len(contenders))
        for index in order if pair % 2 == 0 else reversed(order):
            blocks[index].append(run_block(contenders[index], batches, steps, device))
        say(f"pair {pair + 1}/{pairs}: " + ", ".join(_progress(c, b[-1]) for c, b in zip(contenders, blocks, strict=True)))
        result = Comparison(
            _rows(config, ranks, contenders, blocks, losses, held),
            device_name(),
            ranks.world_size,
            real_data=not isinstance(batches, list),
        )
        so_far(result)
    if profiled:
        shares = profile(lambda: contenders[0].step(batches[0]), device, trace if ranks.rank == 0 else None)
        return replace(result, shares=shares)
    return result


def _rows(
    config: Config,
    ranks: Ranks,
    contenders: Sequence[Contender],
    blocks: Sequence[Sequence[Block]],
    losses: Sequence[tuple[float, ...]],
    held: Sequence[int],
) -> tuple[Row, ...]:
    """The rows of what was measured so far. Called by all ranks."""
    device, where, alone = ranks.device, device_name(), len(contenders) == 1
    rows = []
    for contender, measured, warm_losses, static in zip(contenders, blocks, losses, held, strict=True):
        all_steps = [seconds for block in measured for seconds in block.step_s]
        rates = Rates.of(statistics.median(all_steps), config, ranks.world_size, where)
        cpu_steps = [seconds for block in measured for seconds in block.cpu_s]
        cpu_s = statistics.median(cpu_steps) if cpu_steps else None
        peak: int | None = None
        if device.type == "cuda":
            peak = busiest(static + max(block.peak_bytes for block in measured), ranks)
        elif alone:
            peak = busiest(resident_bytes(), ranks)
        rows.append(Row(contender.name, rates, cpu_s, tuple(measured), peak, warm_losses))
    return tuple(rows)


def _progress(contender: Contender, block: Block) -> str:
    return f"{contender.name} {1000 * block.median_s:.1f} ms"


def _warm_up(contender: Contender, batches: Sequence[Sequence[TensorBatch]], steps: int) -> tuple[float, ...]:
    losses = []
    for index in range(steps):
        contender.step(batches[index % len(batches)])
        losses.append(contender.loss())
    return tuple(losses)


def check_agreement(contenders: Sequence[Contender], losses: Sequence[tuple[float, ...]], tolerance: float) -> None:
    """UserError unless all contenders have had the same losses."""
    for contender, theirs in zip(contenders[1:], losses[1:], strict=True):
        for step, (expected, found) in enumerate(zip(losses[0], theirs, strict=True), start=1):
            if not abs(expected - found) <= tolerance:
                raise UserError(
                    f"{contender.name} does not compute what the engine computes: loss of warm-up step {step} is "
                    f"{found:.6f}, the engine's {expected:.6f}, more than {tolerance:g} apart; leave it out of --vs"
                )
