"""All layouts of a model on a number of GPUs, with memory and predicted speed. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_synth.config.errors import ConfigError
from megatron_synth.config.schema import Config
from megatron_synth.estimate.hardware import Accelerator
from megatron_synth.estimate.memory import Memory, memory_per_rank
from megatron_synth.estimate.step_time import Assumptions, StepTime, rates, step_time
from megatron_synth.parallel.plan import Layout, plan

RESERVED = 3 * 2**30
"""Bytes left to the driver's context, the libraries' workspaces and NCCL's buffers; assumed."""
FRAGMENTATION = 0.04
"""Share of the memory that the allocator cannot use; assumed."""
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Candidate:
    """One layout that the rules allow."""

    config: Config
    layout: Layout
    memory: Memory
    """Of the fullest stage."""
    needed: float
    """Bytes with the reserve."""
    fits: bool
    time: StepTime
    tokens_per_s: float
    """Per GPU."""
    flops: float
    mfu: float

    def describe(self) -> str:
        """Such as `TP2 x PP2 x DP16 (SP), micro-batch 2, selective recompute`."""
        train = self.config.train
        recompute = "" if train.recompute == "none" else f", {train.recompute} recompute"
        return f"{self.layout.describe().split(',')[0]}, micro-batch {train.micro_batch_size}{recompute}"

    def overrides(self) -> list[str]:
        """Settings that make a run of this layout."""
        layout, train = self.layout, self.config.train
        settings = [
            f"parallel.tensor_model_parallel_size={layout.tensor}",
            f"parallel.pipeline_model_parallel_size={layout.pipeline}",
            f"train.micro_batch_size={train.micro_batch_size}",
            f"train.global_batch_size={train.global_batch_size}",
            f"train.sequence_length={train.sequence_length}",
            f"train.recompute={train.recompute}",
        ]
        if layout.context > 1:
            settings.append(f"parallel.context_parallel_size={layout.context}")
        if layout.virtual > 1:
            settings.append(f"parallel.virtual_pipeline_model_parallel_size={layout.virtual}")
        return settings


def search(
    config: Config,
    gpus: int,
    chip: Accelerator,
    *,
    micro_batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16),
    fp8: bool = False,
    overlap: bool = True,
    assume: Assumptions | None = None,
) -> list[Candidate]:
    """Every legal layout of `config` on `gpus` GPUs: those that fit first, the fastest first."""
    found = []
    for candidate in _variants(config, gpus, chip, micro_batch_sizes):
        try:
            layout = plan(candidate, gpus)
        except ConfigError:
            continue
        found.append(_judge(candidate, layout, chip, fp8, overlap, assume))
    return sorted(found, key=lambda one: (not one.fits, -one.tokens_per_s, one.needed))


def _variants(config: Config, gpus: int, chip: Accelerator, micro_batch_sizes: tuple[int, ...]) -> Iterator[Config]:
    layers, batch = config.model.num_layers, config.train.global_batch_size
    shared = [(tensor, context) for tensor in _divisors(chip.per_node) for context in _contexts(config.train.sequence_length)]
    for tensor, context in shared:
        for pipeline in _divisors(layers):
            data, rest = divmod(gpus, tensor * context * pipeline)
            if rest or data == 0:
                continue
            for chunks in _divisors(layers // pipeline) if pipeline > 1 else [1]:
                if chunks > 8:
                    continue
                parallel = config.parallel.model_copy(
                    update={
                        "tensor_model_parallel_size": tensor,
                        "context_parallel_size": context,
                        "pipeline_model_parallel_size": pipeline,
                        "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
                        "sequence_parallel": None,
                    }
                )
                for micro in micro_batch_sizes:
                    if batch % (micro * data):
                        continue
                    for recompute in RECOMPUTE:
                        train = config.train.model_copy(update={"micro_batch_size": micro, "recompute": recompute})
                        yield config.model_copy(update={"parallel": parallel, "train": train})


def _contexts(sequence_length: int) -> list[int]:
    """Numbers of ranks that may share a sequence: powers of two that leave each 4,096 tokens."""
    return [1, *(2**n for n in range(1, 10) if sequence_length // 2**n >= 4096)]


def _divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]


def _judge(
    config: Config, layout: Layout, chip: Accelerator, fp8: bool, overlap: bool, assume: Assumptions | None
) -> Candidate:
    stages = memory_per_rank(config, layout.data, fp8=fp8)
    memory = max(stages, key=lambda stage: stage.total)
    needed = memory.total * (1 + FRAGMENTATION) + RESERVED
    overlap = overlap and all(config.parallel.overlaps(layout.replicas, on_gpu=True))
    time = step_time(config, layout.data, chip, fp8=fp8, overlap=overlap, assume=assume)
    return Candidate(
        config, layout, memory, needed, needed <= chip.memory, time, *rates(config, layout.world_size, time.total, chip)
    )
