"""One optimizer step: forward and backward over the micro-batches, then the update or, if it is not finite, no update.

K sources.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_synth.config.schema import Config
from megatron_synth.model.fp8 import recipe
from megatron_synth.model.objective import Losses, Objective
from megatron_synth.parallel.average import Average
from megatron_synth.parallel.groups import Ranks
from megatron_synth.train.batch import LABELS, LOSS, NUM_SUMS, TensorBatch, sums_by_value, sums_per_source
from megatron_synth.train.grad_norm import square_sum
from megatron_synth.train.health import Health
from megatron_synth.train.qk_clip import QkClip
from megatron_synth.train.spikes import Guard


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind.

    sums: [4, K] fp64 on the device: by source, what `batch.py` sums up, of this rank's share; zeros on ranks that do not report
        the loss. Summed over all ranks it is the global batch's.
    grad_norm: global norm before clipping.
    skipped: the loss or the gradient was not finite, or stood out (train.skip), and the weights stayed as they were.
    stop: some rank was asked to stop; equal on every rank.
    own_s: from the begin of the step to the reduction of its gradients, in which data-parallel ranks wait for each other: a
        slow rank is slow before it. Ranks of one replica wait for each other all along, and have about the same.
    save: some rank's clock asks for a checkpoint; equal on every rank.
    row_losses: [R, 2] fp64 on the device: sum of the loss over the labels of each window of this rank, and how many these are,
        where ranks share the sequence over those of its part; None on ranks that do not report the loss.
    rows: [R] number of each of these windows in the plan.
    why: the step was skipped, where train.skip says.
    clipped: heads of this rank that QK-clip has scaled since the start, a number on the device that goes on counting; None
        without it.
    by_value: [2, V] fp64 on the device, by value of documents (log.loss_by): sums over labels of the loss, and how many these
        are; as `sums` of this rank's share. None where losses are not told apart.
    """

    sums: Tensor
    grad_norm: float
    skipped: bool
    stop: bool
    own_s: float = 0.0
    save: bool = False
    row_losses: Tensor | None = None
    rows: npt.NDArray[np.int64] | None = None
    why: str = ""
    clipped: Tensor | None = None
    by_value: Tensor | None = None


def _loss(
    losses: Losses, *, batch: TensorBatch, z_loss: float, num_sources: int, num_values: int
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """What the schedule asks of the last stage: the scalar to differentiate, and data to keep."""
    z_losses = None
    if z_loss:
        assert losses.log_sum_exp is not None
        z_losses = z_loss * losses.log_sum_exp.square()
    by_value = sums_by_value(losses.per_token, batch, num_values) if batch.values is not None else None
    return losses.total, (*sums_per_source(losses.per_token, z_losses, batch, num_sources), by_value)


def _forward_step(
    batches: Iterator[TensorBatch],
    model: torch.nn.Module,
    *,
    objective_of: Callable[[TensorBatch], Objective | None],
    loss_of: Callable[..., tuple[Tensor, Any]],
) -> tuple[Any, Any]:
    batch = next(batches)
    output = model(
        batch.inputs,
        None,
        None,
        labels=batch.labels,
        packed_seq_params=batch.documents,
        loss_mask=objective_of(batch),
    )
    return output, partial(loss_of, batch=batch)


class Pipeline:
    """Sends micro-batches through this rank's model chunks and, by them, through the pipeline."""

    def __init__(self, config: Config, chunks: list[DistributedDataParallel], ranks: Ranks):
        self.config, self.chunks, self.ranks = config, chunks, ranks
        self.row_losses: Tensor | None = None
        """[R, 2] fp64, `row_losses` of StepResult, of the last `forward`; None: another rank's."""
        self.by_value: Tensor | None = None
        """[2, V] fp64, `by_value` of StepResult, of the last `forward`; None: losses are not told apart."""
        self.num_values = 0
        """V; 0: losses are not told apart by values of documents."""
        self._schedule = get_forward_backward_func()

    def forward(self, batches: Sequence[TensorBatch], num_sources: int, *, backward: bool) -> Tensor:
        """All micro-batches through the pipeline. Returns `sums` of StepResult."""
        kept = self._run(
            batches,
            self._objectives(batches) if backward and self.ranks.is_last_stage else lambda batch: None,
            partial(_loss, z_loss=self.config.train.z_loss, num_sources=num_sources, num_values=self.num_values),
            backward=backward,
        )
        self.row_losses = None
        if self.num_values:
            self.by_value = torch.zeros((2, self.num_values), dtype=torch.float64, device=self.ranks.device)
        if self.ranks.reports_loss:
            self.row_losses = torch.cat([of_windows for _, of_windows, _ in kept])
            if self.num_values:
                self.by_value = torch.stack([by_value for *_, by_value in kept]).sum(dim=0)
            return torch.stack([sums for sums, *_ in kept]).sum(dim=0)
        return torch.zeros((NUM_SUMS, num_sources), dtype=torch.float64, device=self.ranks.device)

    @torch.no_grad()
    def apply(self, batches: Sequence[TensorBatch], keep: Callable[[Losses, TensorBatch], Any]) -> list[Any]:
        """All micro-batches through the pipeline, without gradients. Returns what `keep` makes of each, on the last stage."""

        def loss_of(losses: Losses, batch: TensorBatch) -> tuple[Tensor, Any]:
            return losses.total, keep(losses, batch)

        return list(self._run(batches, lambda batch: None, loss_of, backward=False))

    def _run(
        self,
        batches: Sequence[TensorBatch],
        objective_of: Callable[[TensorBatch], Objective | None],
        loss_of: Callable[..., tuple[Tensor, Any]],
        *,
        backward: bool,
    ) -> Any:
        # every model chunk of an interleaved pipeline walks through the micro-batches by itself
        iterators = [iter(batches) for _ in self.chunks]
        return self._schedule(
            forward_step_func=partial(_forward_step, objective_of=objective_of, loss_of=loss_of),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=self.config.train.sequence_length,
            micro_batch_size=self.config.train.micro_batch_size,
            forward_only=not backward,
        )

    @torch.no_grad()
    def _objectives(self, batches: Sequence[TensorBatch]) -> Callable[[TensorBatch], Objective]:
        """What each of a step's micro-batches is trained on: the mean over the labels of the global batch.

        The schedule takes the mean over micro-batches, data parallelism that over ranks, and c ranks that share a sequence add
        up: for that the schedule multiplies by c what data parallelism divides by it. Where labels are masked, ranks and
        micro-batches have unequal numbers of them; of n in M micro-batches of each of D ranks each then weighs M D / n.
        """
        train, micro_batches = self.config.train, len(batches)
        context = self.config.parallel.context_parallel_size
        objective = partial(Objective, grad_scale=context / micro_batches, z_loss=train.z_loss)
        masks = [mask for batch in batches if (mask := batch.own_loss_mask) is not None]
        if not masks:
            shape = train.micro_batch_size, train.sequence_length // context
            weight = 1.0 / (train.micro_batch_size * train.sequence_length)
            weights = torch.full(shape, weight, dtype=torch.float32, device=self.ranks.device)
            return lambda batch: objective(weights)
        labels = torch.stack([mask.sum() for mask in masks]).sum().double()  # fp32 counts to 2^24 alone
        torch.distributed.all_reduce(labels, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        of_each = (micro_batches * parallel_state.get_data_parallel_world_size() / labels.clamp_(min=1)).float()
        return lambda batch: objective(of_each * batch.own_loss_mask)


class _Clock:
    """Seconds from `start` to the call of a function, of the device's work where there is a device."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._begin: Any = None
        self._end: Any = None

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._begin = self._end = self._mark()

    def stopped_by(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which stops the clock before it does its work."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._end = self._mark()
            return function(*args, **kwargs)

        return call

    def seconds(self) -> float:
        """To be asked when the host has waited for the device's work anyway."""
        if self._on_gpu:
            return float(self._begin.elapsed_time(self._end)) / 1000
        return float(self._end - self._begin)


class Stepper(Pipeline):
    """Runs optimizer steps on this rank's model chunks."""

    def __init__(
        self, config: Config, chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer, ranks: Ranks, replicas: int
    ):
        super().__init__(config, chunks, ranks)
        self.optimizer = optimizer
        self.fp8 = recipe.of(chunks)
        # With the distributed optimizer every rank holds a part of the gradients, else every data-parallel rank holds all.
        self.gradient_copies = 1 if config.parallel.use_distributed_optimizer else replicas
        self._clock = _Clock(ranks.device)
        self.average: Average | None = None
        """Of the weights, where one is kept."""
        self.health: Health | None = None
        """What measures the next step, if it is measured."""
        threshold = config.optim.qk_clip
        self.qk_clip = None if threshold is None else QkClip(threshold, chunks, optimizer)
        skip = config.train.skip
        self.guard = None if skip is None else Guard(skip)
        # pinned: a copy to other memory goes through a buffer of the driver's, and the host waits twice
        numbers = 4 if skip is None else 6
        self._agreed = torch.zeros(numbers, dtype=torch.float64, pin_memory=ranks.device.type == "cuda")
        for model in {id(chunk.config): chunk.config for chunk in chunks}.values():
            model.finalize_model_grads_func = self._clock.stopped_by(model.finalize_model_grads_func)

    def step(
        self,
        batches: Sequence[TensorBatch],
        num_sources: int,
        lr: float,
        stop_requested: Callable[[], bool] = lambda: False,
        save_requested: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """One optimizer step at learning rate `lr`.

        `stop_requested` and `save_requested` are asked when the gradients are there; any rank's yes reaches all in the result.
        """
        self._clock.start()
        if self.health is not None:
            self.health.begin()
        if self.qk_clip is not None:
            self.qk_clip.begin()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self.forward(batches, num_sources, backward=True)
        if self.qk_clip is not None:
            self.qk_clip.end()
        optim = self.config.optim
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
            group["weight_decay"] = optim.weight_decay * group["wd_mult"]
            # a checkpoint brings those that it was written with
            group["betas"], group["eps"] = (optim.beta1, optim.beta2), optim.eps
        norm, loss_is_finite, stop, save, loss = self._agree(sums, stop_requested(), save_requested())
        skipped, why = not (loss_is_finite and math.isfinite(norm)), ""
        if self.guard is not None:
            why = self.guard.judge(loss if loss_is_finite else math.nan, norm)
            skipped = bool(why)
        if self.health is not None:
            self.health.before_update()
        if not skipped:
            if self.qk_clip is not None:
                self.qk_clip.apply()
            self._clip(norm)
            self.optimizer.step_with_ready_grads()
            if self.average is not None:
                self.average.update()
        if self.health is not None:
            self.health.after_update()
        if self.fp8 is not None:
            self.fp8.end_step(skipped)
        rows = [batch.samples for batch in batches if batch.samples is not None]
        own_s, numbers = self._clock.seconds(), np.concatenate(rows) if rows else None
        clipped = None if self.qk_clip is None else self.qk_clip.clipped
        return StepResult(
            sums, norm, skipped, stop, own_s, save, self.row_losses, numbers, why, clipped=clipped, by_value=self.by_value
        )

    @torch.no_grad()
    def _agree(self, sums: Tensor, stop_requested: bool, save_requested: bool) -> tuple[float, bool, bool, bool, float | None]:
        """Global gradient norm, is the loss finite, whether to stop, to save: one all-reduce, one wait for the device.

        Last the mean loss, where steps are skipped by it; None: it is not asked for, or no label counts.

        megatron-core's own norm costs the same wait. With the loss and the flags folded in, every rank decides alike
        on a step before any weight changes.
        """
        self.optimizer.prepare_grads()
        gradients = [g for part in self.optimizer.chained_optimizers for g in part.get_main_grads_for_grad_norm()]
        stats = torch.zeros(len(self._agreed), dtype=torch.float64, device=self.ranks.device)
        if gradients:
            stats[0] = square_sum(gradients) / self.gradient_copies
        stats[1] = (~torch.isfinite(sums[LOSS])).sum()
        for place, asked in ((2, stop_requested), (3, save_requested)):
            if asked:  # by a kernel; assigning a number to an element copies it from the host, which waits
                stats[place].fill_(1.0)
        if self.guard is not None:
            stats[4:] = sums[[LOSS, LABELS]].sum(dim=1)
        torch.distributed.all_reduce(stats)
        self._agreed.copy_(stats, non_blocking=True)
        if stats.is_cuda:
            torch.cuda.current_stream().synchronize()
        square, not_finite, stop, save, *mean = self._agreed.tolist()
        loss = mean[0] / mean[1] if mean and mean[1] else None
        return math.sqrt(square) if square >= 0 else math.nan, not_finite == 0, stop > 0, save > 0, loss

    @torch.no_grad()
    def _clip(self, norm: float) -> None:
        limit = self.config.optim.clip_grad
        if limit > 0 and norm > limit:
            parameters = [p for part in self.optimizer.chained_optimizers for p in part.get_parameters()]
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, limit / (norm + 1e-6))
