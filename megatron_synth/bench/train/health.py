"""What `log.health_interval` costs: steps that are measured beside steps that are not, in turn in one process."""

from __future__ import annotations

import cProfile
import math
import pstats
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_synth.bench.train.engine import Block, Engine, random_batches, run_block
from megatron_synth.config.schema import Config
from megatron_synth.parallel.groups import Ranks, process_group
from megatron_synth.parallel.plan import Layout
from megatron_synth.train.batch import TensorBatch

GOAL = 0.01
"""Share of the time that watching may cost."""


@dataclass(frozen=True)
class Cost:
    """What was measured, by pairs of blocks that follow each other."""

    plain: tuple[Block, ...]
    measured: tuple[Block, ...]
    own: float | None
    """What watching takes of a measured step, as a part of the rest: by a profile of one more block. None on a GPU, whose work
    no profile of the host sees."""

    @property
    def extra(self) -> list[float]:
        """Per pair: what a measured step takes beyond a plain one, as a part of it; processor time on a CPU, else time."""
        return [_of(one) / _of(other) - 1 for one, other in zip(self.measured, self.plain, strict=True)]

    @property
    def interval(self) -> int:
        """Least `log.health_interval` at which the median of `extra` is within GOAL."""
        return max(1, math.ceil(statistics.median(self.extra) / GOAL))


def _of(block: Block) -> float:
    return statistics.median(block.cpu_s or block.step_s)


class _Watched:
    """The engine with every step measured."""

    name = "measured"

    def __init__(self, engine: Engine, health: Any):
        self._engine, self._health = engine, health

    def step(self, batches: Sequence[TensorBatch]) -> None:
        """One step, and the reduction of what was seen."""
        self._engine.stepper.health = self._health
        self._engine.step(batches)
        self._health.observed()
        self._engine.stepper.health = None

    def loss(self) -> float:
        """As the engine's."""
        return self._engine.loss()


def measure(config: Config, layout: Layout, *, pairs: int, steps: int, warmup: int) -> Cost:
    """Blocks of `steps` plain and `steps` measured steps in turn, in every second pair the other way round."""
    with process_group(layout, config.train.seed) as ranks:
        return _measure(config, layout, ranks, pairs, steps, warmup)


def _measure(config: Config, layout: Layout, ranks: Ranks, pairs: int, steps: int, warmup: int) -> Cost:
    from megatron_synth.train.health import Health

    engine = Engine(config, layout, ranks)
    stepper = engine.stepper
    watched = _Watched(engine, Health(config, engine.chunks, engine.optimizer, ranks, stepper.gradient_copies))
    batches = random_batches(config, layout, ranks, 4)
    blocks: dict[str, list[Block]] = {engine.name: [], watched.name: []}
    for contender in (engine, watched):
        run_block(contender, batches, warmup, ranks.device)
    for pair in range(pairs):
        for contender in (engine, watched) if pair % 2 == 0 else (watched, engine):
            blocks[contender.name].append(run_block(contender, batches, steps, ranks.device))
    own = None if ranks.device.type == "cuda" else _profiled(watched, batches, steps, ranks.device)
    return Cost(tuple(blocks[engine.name]), tuple(blocks[watched.name]), own)


def _profiled(watched: _Watched, batches: Any, steps: int, device: torch.device) -> float:
    """Time in calls of what watches from elsewhere, as a part of the time without them."""
    from megatron_synth.model import observer
    from megatron_synth.train import health

    with cProfile.Profile() as profile:
        block = run_block(watched, batches, steps, device)
    files, own = {health.__file__, observer.__file__}, 0.0
    for (file, _, _), (*_, callers) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if file in files:
            own += sum(times[3] for (caller, _, _), times in callers.items() if caller not in files)
    return own / (sum(block.step_s) - own)


def table_rows(cost: Cost) -> list[list[str]]:
    """The rows of the table, its head first."""
    rows = [["steps", "ms/step", "CPU ms/step"]]
    for name, blocks in (("plain", cost.plain), ("measured", cost.measured)):
        times = [second for block in blocks for second in block.step_s]
        processor = [second for block in blocks for second in block.cpu_s]
        rows.append(
            [
                name,
                f"{1000 * statistics.median(times):.1f}",
                f"{1000 * statistics.median(processor):.1f}" if processor else "",
            ]
        )
    return rows
