"""Memory of a rank: what `estimate/memory.py` predicts beside what its tensors really take.

On a GPU the device's allocator counts. On a CPU torch's profiler reports every allocation and release of the host allocator;
the resident size of the process would say little, since it holds libraries and what the C library keeps for later.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_synth.bench.train.engine import Engine, random_batches, vocab_size
from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.estimate.memory import Device, memory_per_rank
from megatron_synth.parallel.groups import Ranks, process_group
from megatron_synth.parallel.plan import Layout, plan


@dataclass(frozen=True)
class Measured:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    peak: int
    """Most that was ever alive during an optimizer step after the first."""

    @property
    def working(self) -> int:
        """What the step needs above weights, gradients and optimizer states: activations, logits, buffers."""
        return self.peak - self.weights - self.gradients - self.optimizer


def measure(config: Config, layout: Layout, ranks: Ranks) -> Measured:
    """Two optimizer steps of the engine on random tokens; the second is measured, when all states exist."""
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)
        engine = _steps(config, layout, ranks, lambda: torch.cuda.reset_peak_memory_stats(ranks.device))
        return Measured(*_held(engine), peak=torch.cuda.max_memory_allocated(ranks.device))
    mark = "measured step"
    record = torch.profiler.record_function(mark)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine = _steps(config, layout, ranks, record.__enter__)
        held = _held(engine)
        record.__exit__(None, None, None)
    return Measured(*held, peak=_peak_since(profiler, mark))


def _steps(config: Config, layout: Layout, ranks: Ranks, between: Callable[[], None]) -> Engine:
    batches = random_batches(config, layout, ranks, 1)
    engine = Engine(config, layout, ranks)
    engine.step(batches[0])
    between()
    engine.step(batches[0])
    return engine


def _peak_since(profiler: Any, mark: str) -> int:
    """Most bytes alive on the host since the event named `mark` began, counted from every allocation and release.

    The copies that gloo makes of what it sends are left out: it releases them in threads of its own, which the profiler does
    not see, and NCCL makes none.
    """
    allocation = torch._C._profiler._EventType.Allocation
    changes: list[tuple[int, int, int]] = []
    start = None
    stack = [(event, False) for event in profiler.profiler.kineto_results.experimental_event_tree()]
    while stack:
        event, in_gloo = stack.pop()
        in_gloo = in_gloo or event.name.startswith("c10d::")
        stack.extend((child, in_gloo) for child in event.children)
        if event.name == mark:
            start = event.start_time_ns
        elif event.tag == allocation and event.extra_fields.device.type == "cpu":
            size = event.extra_fields.alloc_size
            if size < 0 or not in_gloo:
                changes.append((event.start_time_ns, event.extra_fields.ptr, size))
    assert start is not None
    alive: dict[int, int] = {}
    total = peak = 0
    for at, place, size in sorted(changes):
        total -= alive.pop(place, 0)
        if size > 0:
            alive[place] = size
            total += size
        if at >= start:
            peak = max(peak, total)
    return peak


def _held(engine: Engine) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer states; what two of them share is counted once, in this order."""
    seen: set[int] = set()
    states = [
        value
        for part in engine.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    masters = [
        p for part in engine.optimizer.chained_optimizers for group in part.optimizer.param_groups for p in group["params"]
    ]
    weights = [parameter for chunk in engine.chunks for parameter in chunk.parameters()]
    gradients = [buffer.grad_data for chunk in engine.chunks for buffer in chunk.buffers]
    return _bytes(weights, seen), _bytes(gradients, seen), _bytes([*masters, *states], seen)


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def predicted_and_measured(config_path: str, settings: Sequence[str]) -> list[dict[str, Any]]:
    """Every rank's memory as estimated and as allocated, on rank 0; the others get an empty list."""
    config = load_file(Config, config_path, settings)
    layout = plan(config, int(os.environ.get("WORLD_SIZE", 1)))
    vocab_size(config)
    with process_group(layout, config.train.seed) as ranks:
        measured = measure(config, layout, ranks)
        kind: Device = "gpu" if ranks.device.type == "cuda" else "cpu"
        predicted = memory_per_rank(config, layout.data, device=kind)[ranks.pipeline_rank]
        mine = {
            "case": describe(config, layout),
            "rank": ranks.rank,
            "stage": ranks.pipeline_rank,
            "predicted": asdict(predicted),
            "predicted_total": predicted.total,
            "measured": asdict(measured),
        }
        everyone: list[Any] = [None] * ranks.world_size
        torch.distributed.all_gather_object(everyone, mine)
    return everyone if ranks.rank == 0 else []


def describe(config: Config, layout: Layout) -> str:
    """`tiny-7m fp32 TP2 x PP2 x DP1 (SP), selective`, for tables."""
    recompute = "" if config.train.recompute == "none" else f", {config.train.recompute} recompute"
    optimizer = "" if config.parallel.use_distributed_optimizer else ", plain optimizer"
    place = layout.describe().split(", ")[0]
    size = f"V{config.model.vocab_size} S{config.train.sequence_length} B{config.train.micro_batch_size}"
    return f"{config.model.name} {_precision(config)} {size} {place}{recompute}{optimizer}"


def _precision(config: Config) -> str:
    precision = config.precision
    if precision.fp8 == "off":
        return precision.dtype
    ends = f", {precision.fp8_bf16_ends} at each end not" if precision.fp8_bf16_ends else ""
    return f"{precision.dtype} fp8 {precision.fp8}{ends}{'' if precision.fp8_fused else ' not fused'}"


CONFIG = "bench/tiny-7m.yaml"
CASES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (1, ()),
    (1, ("model.vocab_size=256",)),
    (1, ("precision.dtype=bf16", "model.num_query_groups=2")),
    (1, ("train.recompute=selective",)),
    (1, ("train.recompute=full",)),
    (1, ("parallel.use_distributed_optimizer=false", "train.sequence_length=512", "train.micro_batch_size=1")),
    (2, ("precision.dtype=bf16",)),
    (2, ("parallel.tensor_model_parallel_size=2",)),
    (2, ("parallel.context_parallel_size=2",)),
    (
        4,
        (
            "parallel.tensor_model_parallel_size=2",
            "parallel.pipeline_model_parallel_size=2",
            "train.global_batch_size=16",
        ),
    ),
    (
        4,
        (
            "parallel.pipeline_model_parallel_size=4",
            "parallel.virtual_pipeline_model_parallel_size=2",
            "train.global_batch_size=32",
        ),
    ),
    (1, ("precision.dtype=bf16", "precision.fp8=current")),
    (1, ("precision.dtype=bf16", "precision.fp8=current", "precision.fp8_fused=false")),
    (1, ("precision.fp8=blockwise", "train.recompute=selective")),
    (1, ("precision.dtype=bf16", "precision.fp8=delayed", "train.recompute=full")),
    (2, ("precision.fp8=delayed", "parallel.tensor_model_parallel_size=2")),
    (2, ("precision.fp8=blockwise", "precision.dtype=bf16", "parallel.tensor_model_parallel_size=2")),
    (
        2,
        (
            "precision.fp8=current",
            "precision.dtype=bf16",
            "precision.fp8_first_last_bf16=1",
            "parallel.pipeline_model_parallel_size=2",
            "train.global_batch_size=16",
        ),
    ),
)
"""Ranks and settings, over CONFIG, of the table in the documentation."""


def table_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One row per case and stage: the stage's first rank."""
    rows = [["case", "stage", "static, MiB", "predicted, MiB", "measured, MiB", "predicted / measured"]]
    seen = set()
    for rank in results:
        key = (rank["case"], rank["stage"])
        if key in seen:
            continue
        seen.add(key)
        measured = rank["measured"]
        static = measured["weights"] + measured["gradients"] + measured["optimizer"]
        sizes = [f"{value / 2**20:.1f}" for value in (static, rank["predicted_total"], measured["peak"])]
        rows.append([rank["case"], str(rank["stage"]), *sizes, f"{rank['predicted_total'] / measured['peak']:.3f}"])
    return rows
