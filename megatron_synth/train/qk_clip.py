"""QK-clip: queries and keys of a head shrink when its largest attention logit exceeds a threshold (MuonClip).

With S the largest logit of a head over all visible pairs of the step's tokens, and threshold t (Kimi K2, arXiv 2507.20534,
algorithm 1): where S > t, with g = t / S,

    W_q <- sqrt(g) W_q,  W_k <- sqrt(g) W_k      where a head has keys of its own
    W_q <- g W_q                                 where heads share keys, which then stay: as the paper's shared rotary keys do

Either way the head's logits are multiplied by g, and those of other heads by 1. Biases of queries and keys follow their
weights. The weights are scaled before the optimizer's update of the step in place of after it: what the update adds is not
scaled, and the optimizer then hands the weights on as it always does. A step that is skipped scales nothing.

Logits are those of every row of every micro-batch, computed beside the pass, which does not give them. All ranks take the
largest over data and context parallelism, so that every layout scales alike. There is no state.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_synth.model.observer import attention_arguments, largest_logits
from megatron_synth.parallel.average import places


class _Part(NamedTuple):
    """A flat range of a layer's weights or biases of queries, keys and values, as this rank's optimizer has it."""

    layer: int
    columns: int
    """Numbers of a row; 1 for biases."""
    begin: int
    """The first number, of the whole parameter."""
    values: Tensor


class QkClip:
    """QK-clip for this rank's layers and heads."""

    def __init__(self, threshold: float, chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer):
        self._threshold = threshold
        self._layers = [layer.self_attention for chunk in chunks for layer in chunk.module.decoder.layers]
        attention = self._layers[0]
        heads, self._groups = attention.num_attention_heads_per_partition, attention.num_query_groups_per_partition
        self._channels = attention.hidden_size_per_attention_head
        self._shares_keys = heads > self._groups
        device = attention.linear_qkv.weight.device
        self._largest = torch.zeros((len(self._layers), heads), dtype=torch.float64, device=device)
        self._recomputed = attention.config.recompute_granularity == "full"
        self._hooks: list[Any] = []
        wanted = {
            id(parameter): number for number, layer in enumerate(self._layers) for parameter in layer.linear_qkv.parameters()
        }
        self._parts = [
            _Part(wanted[id(parameter)], parameter[0].numel(), begin, weights.detach().view(-1))
            for inner in optimizer.chained_optimizers
            for parameter, begin, _, weights in places(inner)
            if id(parameter) in wanted
        ]
        self.clipped = torch.zeros((), dtype=torch.float64, device=device)
        """Heads that were scaled since the start, counted by one of the ranks that have them."""
        self._counts = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0

    def begin(self) -> None:
        """Before the forward pass of a step."""
        self._largest.fill_(-torch.inf)
        for number, layer in enumerate(self._layers):
            see = partial(self._see, number)
            self._hooks.append(layer.core_attention.register_forward_pre_hook(see, with_kwargs=True))

    def end(self) -> None:
        """After its backward pass."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _see(self, layer: int, module: Any, inputs: Any, keywords: Any) -> None:
        if self._recomputed and torch.is_grad_enabled():  # the second pass of a recomputed layer
            return
        given = attention_arguments(inputs, keywords)
        largest = self._largest[layer]
        for row in range(given["query"].shape[1]):
            largest.copy_(torch.maximum(largest, largest_logits(module, given, row)))

    @torch.no_grad()
    def apply(self) -> None:
        """Scale this rank's weights. Called by all ranks."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(self._largest, torch.distributed.ReduceOp.MAX, group=group)
        over = self._largest > self._threshold
        factors = torch.where(over, self._threshold / self._largest, 1.0)
        if self._counts:
            self.clipped += over.sum()
        for part in self._parts:
            _scale_rows(part, self._of_rows(factors[part.layer]))

    def _of_rows(self, factors: Tensor) -> Tensor:
        """[A] of heads -> [(A + 2 G) D] of rows: a weight has for each group its queries, its key and its value."""
        of_groups = factors.view(self._groups, -1)
        ones = torch.ones_like(of_groups[:, :1])
        queries, keys = (of_groups, ones) if self._shares_keys else (of_groups.sqrt(), of_groups.sqrt())
        return torch.cat([queries, keys, ones], dim=1).float().repeat_interleave(self._channels, dim=1).flatten()


def _scale_rows(part: _Part, factors: Tensor) -> None:
    """Multiply a range of a matrix by the factors of its rows; the range may begin and end within one."""
    begin, end, columns = part.begin, part.begin + part.values.numel(), part.columns
    first, last = -(-begin // columns), end // columns
    if first > last:  # all of it within one row
        part.values.mul_(factors[begin // columns])
        return
    head, tail = first * columns - begin, end - last * columns
    if head:
        part.values[:head].mul_(factors[first - 1])
    if tail:
        part.values[len(part.values) - tail :].mul_(factors[last])
    part.values[head : len(part.values) - tail].view(-1, columns).mul_(factors[first:last, None])
