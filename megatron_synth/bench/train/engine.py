"""Speed of the training engine, as the trainer builds it, on random tokens.

Conventions, stated again in every table:

- A step is one optimizer step: zero the gradients, forward and backward over all micro-batches, clip, update. Random
  batches are on the device before the clock starts, real ones are loaded inside the step. Checkpoints and logging are not
  part of it.
- tokens/s per rank = global_batch_size x sequence_length / median step time / world size.
- FLOPs per token are those of `estimate/flops.py`: 6 x (body + head parameters) + 12 x layers x query channels x sequence.
- MFU is against the dense BF16 peak of the named device, and n/a on a device that is not known.
- On a CPU, processor time is reported beside the time on the wall: with one thread per process it is what the step costs,
  however many others want the same cores. Waiting threads count too, so it says little with more threads or ranks.
- Peak memory is what the device allocator handed out on the busiest rank for this model alone. On a CPU it is what the
  process ever had resident, and n/a when several models share the process.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import Config
from megatron_synth.estimate.flops import flops_per_token
from megatron_synth.estimate.hardware import mfu
from megatron_synth.parallel.groups import Ranks
from megatron_synth.parallel.plan import Layout
from megatron_synth.train.batch import LABELS, LOSS, NUM_SUMS, TensorBatch, part_of


class Contender(Protocol):
    """A model with its optimizer, ready to train."""

    @property
    def name(self) -> str:
        """Its row in the table."""

    def step(self, batches: Sequence[TensorBatch]) -> None:
        """One optimizer step over these micro-batches, handed to the device."""

    def loss(self) -> float:
        """Mean loss of the latest step before its update, in nats per token."""


class Engine:
    """The trainer's engine on this rank: the same builders, called in the same order."""

    name = "megatron-synth"

    def __init__(self, config: Config, layout: Layout, ranks: Ranks):
        # megatron-core takes seconds to import and must find the device prepared
        from megatron_synth.model.build import build_model
        from megatron_synth.model.run_plan import decide
        from megatron_synth.parallel.wrap import build_optimizer, wrap_ddp
        from megatron_synth.train.step import Stepper

        self._lr, self._ranks = config.optim.lr, ranks
        self.chunks = wrap_ddp(build_model(decide(config, layout), vocab_size(config)), config)
        self.optimizer = build_optimizer(self.chunks, config)
        self.stepper = Stepper(config, self.chunks, self.optimizer, ranks, layout.replicas)
        self._sums = torch.zeros((NUM_SUMS, 1), dtype=torch.float64)

    def step(self, batches: Sequence[TensorBatch]) -> None:
        """One step of the trainer, at the configured peak learning rate."""
        result = self.stepper.step(batches, 1, self._lr)
        if result.skipped:
            raise UserError("the engine's loss or gradient is not finite on random tokens; lower optim.lr")
        self._sums = result.sums

    def loss(self) -> float:
        """Mean loss of the latest step over the global batch."""
        sums = self._sums.clone()
        torch.distributed.all_reduce(sums)
        return float(sums[LOSS].sum() / sums[LABELS].sum())

    def weights(self) -> dict[str, Tensor]:
        """Copies on the host, full tensors by megatron-core's names; of a single rank and a single chunk."""
        assert self._ranks.world_size == 1 and len(self.chunks) == 1
        state = self.chunks[0].module.state_dict()
        return {name: value.detach().cpu().clone() for name, value in state.items() if isinstance(value, Tensor)}


def vocab_size(config: Config) -> int:
    """Tokens to draw from, before padding."""
    if config.model.vocab_size is None:
        raise UserError("model.vocab_size: a benchmark reads no tokenizer; set it, such as model.vocab_size=50304")
    return config.model.vocab_size


def random_batches(config: Config, layout: Layout, ranks: Ranks, steps: int) -> list[list[TensorBatch]]:
    """This rank's micro-batches of `steps` optimizer steps, drawn from train.seed, equal in every layout."""
    train, device = config.train, ranks.device
    generator = torch.Generator().manual_seed(train.seed)
    mine = train.micro_batch_size * layout.num_microbatches
    result = []
    for _ in range(steps):
        shape = (train.global_batch_size, train.sequence_length + 1)
        tokens = torch.randint(vocab_size(config), shape, generator=generator)
        rows = tokens[ranks.data_rank * mine : (ranks.data_rank + 1) * mine].to(device)
        sources = torch.zeros(train.micro_batch_size, dtype=torch.int64, device=device)
        weights = torch.ones(train.micro_batch_size, dtype=torch.float64, device=device)
        micros, part = rows.split(train.micro_batch_size), part_of(ranks, config)
        result.append([TensorBatch(micro.contiguous(), sources, weights, part=part) for micro in micros])
    return result


def allocated(device: torch.device) -> int:
    """Bytes that this process holds on the device now; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@dataclass(frozen=True)
class Block:
    """Consecutive steps of one contender."""

    step_s: tuple[float, ...]
    """Seconds of each step."""
    cpu_s: tuple[float, ...]
    """Processor time of each step, over all threads of this process; empty on a GPU."""
    peak_bytes: int
    """Most device memory allocated meanwhile, above what was held when the block began; 0 on a CPU."""

    @property
    def median_s(self) -> float:
        """Median seconds per step."""
        return statistics.median(self.step_s)


def _differences(times: Sequence[float]) -> tuple[float, ...]:
    return tuple(end - begin for begin, end in pairwise(times))


def run_block(contender: Contender, batches: Sequence[Sequence[TensorBatch]], steps: int, device: torch.device) -> Block:
    """Time `steps` steps, walking round and round through `batches`.

    On a GPU the clock is one event on the stream after every step, so that nothing waits for the host to look.
    """
    torch.distributed.barrier()
    if device.type != "cuda":
        times, cpu_times = [time.perf_counter()], [time.process_time()]
        for index in range(steps):
            contender.step(batches[index % len(batches)])
            times.append(time.perf_counter())
            cpu_times.append(time.process_time())
        return Block(_differences(times), _differences(cpu_times), 0)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = allocated(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for index in range(steps):
        contender.step(batches[index % len(batches)])
        events[index + 1].record()
    torch.cuda.synchronize(device)
    seconds = tuple(begin.elapsed_time(end) / 1000 for begin, end in pairwise(events))
    return Block(seconds, (), torch.cuda.max_memory_allocated(device) - held)


def busiest(value: int, ranks: Ranks) -> int:
    """The largest `value` of all ranks."""
    shared = torch.tensor([value], dtype=torch.int64, device=ranks.device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared)


def resident_bytes() -> int:
    """Most memory that this process ever had resident on the host."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


@dataclass(frozen=True)
class Rates:
    """A step time in the units of the tables, by the module's conventions."""

    step_s: float
    tokens_per_s_per_rank: float
    tflops_per_rank: float
    mfu: float | None

    @classmethod
    def of(cls, step_s: float, config: Config, world_size: int, device_name: str) -> Rates:
        """Rates of a run of `config` whose steps take `step_s` seconds."""
        tokens = config.train.tokens_per_step / step_s / world_size
        flops = tokens * flops_per_token(config.model, config.train.sequence_length)
        return cls(step_s, tokens, flops / 1e12, mfu(flops, device_name))
