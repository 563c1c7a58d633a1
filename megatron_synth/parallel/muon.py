"""Muon for the matrices of the layers, AdamW for the rest, inside megatron-core's optimizers.

Muon (K. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) updates a matrix by its momentum with all singular
values brought near 1. With momentum m, gradient g, and M = max(rows, columns):

    m <- mu m + (1 - mu) g
    u  = (1 - mu) g + mu m                    (Nesterov)
    w <- w - lr (wd w + 0.2 sqrt(M) NS(u))

NS is the quintic iteration of Newton and Schulz. The factor 0.2 sqrt(M) gives an update the root mean square of AdamW's, so
that learning rate and weight decay are those of AdamW (J. Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982).
What counts as a matrix is each of Hugging Face's: q, k, v, gate and up by themselves, whatever one tensor they are stored in.

A matrix is orthogonalized whole. Tensor-parallel ranks gather their parts of it. With the distributed optimizer a rank
has a flat part of each bucket of gradients: the momenta of a bucket are gathered over the data- and context-parallel ranks, and
each orthogonalizes the matrices that it has a part of. So the result is that of one rank, but for the order of sums. Gathered
are numbers of the run's dtype, and the iteration computes in it, as is usual: it needs no more than bf16.

The optimizer of torch, apex or TransformerEngine that megatron-core has made still updates all else: a hook before its step
updates the matrices, and takes their gradients away. It has no second moments of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from megatron_synth.config.schema import Config

MATRIX = "muon_matrix"
"""Attribute of parameters that Muon updates: their `Matrix`."""
_MUON = "muon"
"""Attribute of megatron-core's optimizer: its `Muon`, if it has one."""
_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Coefficients of the iteration (K. Jordan): steepest at 0, and within 0.7 to 1.2 of 1 after five steps."""
_EPS = 1e-7


@dataclass(frozen=True)
class Matrix:
    """How a parameter of the whole model is made of matrices.

    axis: the one that tensor-parallel ranks share, 0 or 1. blocks: the rows are so many equal blocks. rows: of each matrix in a
    block.
    """

    axis: int
    blocks: int
    rows: tuple[int, ...]


def orthogonalized(matrix: Tensor, steps: int) -> Tensor:
    """NS(matrix) [M, N], in its dtype: singular values near 1 where they are not tiny beside the largest.

    X <- a X + (b X X^T + c (X X^T)^2) X, `steps` times, from the matrix divided by its Frobenius norm.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if tall else x


def update_of(momentum: Tensor, matrix: Matrix, steps: int) -> Tensor:
    """This rank's part of 0.2 sqrt(M) NS(u) of each matrix in a parameter. momentum: u, of this rank's part [R, N]."""
    group = parallel_state.get_tensor_model_parallel_group()
    shared = group.size()
    over_blocks = matrix.axis == 0 and matrix.blocks > 1
    blocks = matrix.blocks // (shared if over_blocks else 1)
    rows = [count // (1 if over_blocks or matrix.axis else shared) for count in matrix.rows]
    columns = momentum.shape[1]
    parts = momentum.reshape(blocks, -1, columns).split(rows, dim=1)
    updates = []
    for part, count in zip(parts, rows, strict=True):
        own = part.reshape(-1, columns).contiguous()
        whole = own
        if shared > 1:
            found = [torch.empty_like(own) for _ in range(shared)]
            torch.distributed.all_gather(found, own, group=group)
            whole = torch.cat(found, dim=matrix.axis)
        made = orthogonalized(whole, steps) * (0.2 * math.sqrt(max(whole.shape)))
        updates.append(made.chunk(shared, dim=matrix.axis)[group.rank()].reshape(blocks, count, -1))
    return torch.cat(updates, dim=1).reshape(momentum.shape)


class Muon:
    """Muon for those parameters of an optimizer that are marked `MATRIX`."""

    def __init__(self, optimizer: MegatronOptimizer, config: Config):
        """Give the optimizer its states, and the hook before its step."""
        self._inner, self._optim = optimizer, config.optim
        self._dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
        inner = optimizer.optimizer
        self._parts = {id(weights): part for part in _parts(optimizer) for weights in [part.weights]}
        for part in self._parts.values():
            inner.state[part.weights]["exp_avg"] = torch.zeros_like(part.weights)
        optimizer.init_state_fn(inner, optimizer.config)  # of all that has none yet: a checkpoint is read into what is there
        inner.register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def _before_step(self, inner: Any, arguments: Any, options: Any) -> None:
        groups = {id(weights): group for group in inner.param_groups for weights in group["params"]}
        if isinstance(self._inner, DistributedOptimizer):
            for buffer, ranges in zip(self._inner.buffers, self._inner.gbuf_ranges, strict=True):
                for buckets in ranges.values():
                    for bucket, own in zip(buffer.buckets, buckets, strict=True):
                        self._update_bucket(buffer, bucket, own["param_map"], groups)
        else:
            for part in self._parts.values():
                momentum = self._momentum(part.weights).to(self._dtype).view(part.parameter.shape)
                self._apply(part, momentum, 0, part.parameter.numel(), groups)
        for part in self._parts.values():
            part.weights.grad = None

    def _momentum(self, weights: Tensor) -> Tensor:
        """u, after the momentum has taken in the gradient."""
        mu = self._optim.muon_momentum
        momentum: Tensor = self._inner.optimizer.state[weights]["exp_avg"]
        assert weights.grad is not None
        momentum.lerp_(weights.grad, 1 - mu)
        return weights.grad.lerp(momentum, mu)

    def _apply(self, part: _Part, momentum: Tensor, begin: int, end: int, groups: dict[int, dict[str, Any]]) -> None:
        """Update values [begin, end) of a parameter, given u of all of it on this tensor-parallel rank."""
        group = groups[id(part.weights)]
        update = update_of(momentum, part.matrix, self._optim.muon_ns_steps).reshape(-1)[begin:end]
        lr, decay = group["lr"], group["weight_decay"]
        part.weights.mul_(1 - lr * decay)
        part.weights.view(-1).add_(update.float(), alpha=-lr)

    def _update_bucket(self, buffer: Any, bucket: Any, own: dict[Any, Any], groups: dict[int, dict[str, Any]]) -> None:
        """Update what this rank has of a bucket. Every data-parallel rank has an equal part of it, in order."""
        if not any(hasattr(parameter, MATRIX) for parameter in bucket.params):
            return
        ranks = self._inner.data_parallel_group
        size = bucket.grad_data.numel()
        part = torch.zeros(size // ranks.size(), dtype=self._dtype, device=bucket.grad_data.device)
        for parameter, place in own.items():
            found = self._part_of(parameter)
            if found is not None:
                local = place["gbuf_local"]
                part[local.start : local.end] = self._momentum(found.weights)
        whole = part
        if ranks.size() > 1:
            whole = torch.empty(size, dtype=part.dtype, device=part.device)
            torch.distributed.all_gather_into_tensor(whole, part, group=ranks)
        for parameter, place in own.items():
            found = self._part_of(parameter)
            if found is not None:
                start, end, _ = buffer.param_index_map[parameter]
                momentum = whole[start - bucket.offset : end - bucket.offset].view(parameter.shape)
                self._apply(found, momentum, place["param"].start, place["param"].end, groups)

    def _part_of(self, parameter: Any) -> _Part | None:
        if not hasattr(parameter, MATRIX):
            return None
        group, order = self._inner.model_param_group_index_map[parameter]
        return self._parts[id(self._inner.optimizer.param_groups[group]["params"][order])]


@dataclass(frozen=True)
class _Part:
    """A parameter, and the weights that this rank's optimizer has of it, fp32."""

    parameter: torch.nn.Parameter
    weights: Tensor
    matrix: Matrix


def _parts(optimizer: MegatronOptimizer) -> Iterator[_Part]:
    from megatron_synth.parallel.average import places

    for parameter, _, _, weights in places(optimizer):
        if hasattr(parameter, MATRIX):
            yield _Part(parameter, weights, getattr(parameter, MATRIX))


def uses_muon(optimizer: ChainedOptimizer) -> bool:
    """Whether Muon updates the matrices of an optimizer."""
    return any(getattr(part, _MUON, None) is not None for part in optimizer.chained_optimizers)


def use_muon(optimizer: ChainedOptimizer, config: Config) -> None:
    """Let Muon update the matrices of an optimizer that was just made."""
    for part in optimizer.chained_optimizers:
        setattr(part, _MUON, Muon(part, config))
