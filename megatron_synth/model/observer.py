"""What a forward pass shows of the model's health: activations, attention logits, the distribution of the output.

All of it is read beside the pass, which it does not change. Activations are those of every token; attention logits and the
output's distribution cost products of their own and are those of a sample: places evenly spread over the first row of the
first micro-batch of the first data-parallel rank, which is the same sequence in every layout.

S tokens of a row, B rows, H hidden size, A query heads, G key/value heads, D channels of a head, V entries of a
rank's part of the vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_synth.model.build import LlamaModel

SAMPLED = 128
"""Places of the sampled row, at most."""
_NUMBERS = 2**24
"""Scores, or logits, that are in memory at once: 64 MiB."""
ENTROPY, PADDING, PLACES = range(3)
"""Of `Observer.output`, sums over sampled places: entropy in nats, probability that padding would have, number of places."""


class Observer:
    """Watches this rank's chunks from `begin` to `end`, over one step."""

    def __init__(self, chunks: list[LlamaModel], layers: int, sequence_length: int, device: torch.device):
        """layers: of the whole model. sequence_length: tokens of a row, over all ranks."""
        self._chunks = chunks
        self._stride = -(-sequence_length // SAMPLED)
        config = chunks[0].config
        self._recomputed = config.recompute_granularity == "full"
        self._counts = config.sequence_parallel or parallel_state.get_tensor_model_parallel_rank() == 0
        self._samples = parallel_state.get_data_parallel_rank() == 0
        self._hooks: list[Any] = []
        self._seen: set[int] = set()
        self.activations = torch.zeros((layers, 2), dtype=torch.float64, device=device)
        """By layer: sum of the squares of its output, and how many numbers that are; of this rank's share."""
        self.logits = torch.full((layers,), -torch.inf, dtype=torch.float64, device=device)
        """By layer: the largest attention logit of this rank's heads and tokens."""
        self.output = torch.zeros(3, dtype=torch.float64, device=device)
        """ENTROPY, PADDING, PLACES; of this rank's share."""

    def begin(self) -> None:
        """Forget what was seen, and watch."""
        self.activations.zero_()
        self.logits.fill_(-torch.inf)
        self.output.zero_()
        self._seen.clear()
        for chunk in self._chunks:
            for layer in chunk.decoder.layers:
                self._hooks.append(layer.register_forward_hook(partial(self._see_layer, layer.layer_number - 1)))
                if self._samples:
                    attention = layer.self_attention.core_attention
                    see = partial(self._see_attention, layer.layer_number - 1)
                    self._hooks.append(attention.register_forward_pre_hook(see, with_kwargs=True))
            if self._samples and chunk.post_process:
                chunk.see_output = partial(self._see_output, chunk)

    def end(self) -> None:
        """Watch no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for chunk in self._chunks:
            chunk.see_output = None

    def _is_repetition(self) -> bool:
        """Whether this is the second pass of a recomputed layer: the first one makes no gradients."""
        return self._recomputed and torch.is_grad_enabled()

    @torch.no_grad()
    def _see_layer(self, layer: int, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if self._is_repetition() or not self._counts:
            return
        hidden = output[0]  # the second is an encoder's context
        norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
        self.activations[layer, 0] += norms.double().square().sum()
        self.activations[layer, 1] += hidden.numel()

    @torch.no_grad()
    def _see_attention(self, layer: int, module: Any, inputs: Any, keywords: Any) -> None:
        if layer in self._seen or self._is_repetition():
            return
        self._seen.add(layer)
        found = largest_logits(module, attention_arguments(inputs, keywords), stride=self._stride)
        largest = self.logits[layer]
        largest.copy_(torch.maximum(largest, found.amax()))

    @torch.no_grad()
    def _see_output(self, chunk: LlamaModel, hidden: Tensor, weight: Tensor) -> None:
        if id(chunk) in self._seen:
            return
        self._seen.add(id(chunk))
        group = parallel_state.get_tensor_model_parallel_group()
        row = hidden[:, :1].contiguous()
        if chunk.config.sequence_parallel:
            row = gather_from_sequence_parallel_region(row, group=group)
        row = row.squeeze(1)
        attention = chunk.decoder.layers[0].self_attention.core_attention
        places = attention.places(len(row), row.device)
        row = row[_chosen(places, self._stride, attention.context_group is not None)]
        valid = min(len(weight), max(0, chunk.tokens - group.rank() * len(weight)))
        for part in row.split(max(1, _NUMBERS // len(weight))):
            logits = (part @ weight.t()).float()
            largest = logits.amax(dim=-1)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
            logits -= largest[:, None]
            powers = logits.exp()
            tokens, padding = (x.sum(-1, dtype=torch.float64) for x in (powers[:, :valid], powers[:, valid:]))
            sums = torch.stack([tokens, padding, powers.mul_(logits)[:, :valid].sum(-1, dtype=torch.float64)])
            torch.distributed.all_reduce(sums, group=group)
            tokens, padding, weighted = sums
            if group.rank() == 0:
                entropy = tokens.log() - weighted / tokens  # of the tokens: -sum p log p with p = e^z / sum e^z
                found = entropy.sum(), (padding / (tokens + padding)).sum(), tokens.new_full((), len(part))
                self.output += torch.stack(found)


def attention_arguments(inputs: Any, keywords: Any) -> dict[str, Any]:
    """By name, what the attention is called with, as a hook is told of it."""
    return {**dict(zip(("query", "key", "value", "attention_mask"), inputs, strict=False)), **keywords}


@torch.no_grad()
def largest_logits(module: Any, given: dict[str, Any], row: int = 0, *, stride: int = 1) -> Tensor:
    """[A] fp64: the largest attention logit of each of this rank's heads over visible pairs of a row.

    Of queries every `stride`-th of the row counts. Where ranks share it, these are queries of this rank and all keys.

    Args:
        module: the attention, an `ops.CoreAttention`.
        given: what its `forward` is called with (`attention_arguments`).
        row: which.
        stride: 1 for all queries.
    """
    query, key, places, begins = module.sampled(given["query"], given["key"], given.get("packed_seq_params"), row)
    group = module.context_group
    chosen = _chosen(places, stride, group is not None)
    query, of_query, begins_of_query = query[chosen], places[chosen], begins[chosen]
    if group is not None:
        key, places, begins = (_gathered(x, group) for x in (key, places, begins))
    grouped = query.unflatten(1, (key.shape[1], -1)).movedim(1, 0)  # [G, n, A / G, D]
    keys = key.movedim(1, 0).transpose(1, 2)  # [G, D, S]
    heads = grouped.shape[0], grouped.shape[2]
    largest = torch.full(heads, -torch.inf, dtype=torch.float64, device=query.device)
    rows = max(1, _NUMBERS // (len(query[0]) * keys.shape[2]))
    for first in range(0, grouped.shape[1], rows):
        part = slice(first, first + rows)
        # keys after the last query of the part are not visible; which these are is known where no ranks share the row
        end = keys.shape[2] if group is not None else min(keys.shape[2], (first + rows - 1) * stride + 1)
        visible = (begins_of_query[part, None] == begins[:end]) & (places[:end] <= of_query[part, None])
        if module.window is not None:
            visible &= of_query[part, None] - places[:end] < module.window
        scores = (grouped[:, part].flatten(1, 2) @ keys[:, :, :end]).float().unflatten(1, (-1, heads[1]))  # [G, n, A / G, S]
        found = scores.masked_fill_(~visible[:, None], -torch.inf).amax(dim=(1, 3))
        largest = torch.maximum(largest, found.double())
    scale: float = module.scale
    return scale * largest.flatten()


def _chosen(places: Tensor, stride: int, shared: bool) -> Any:
    """Which of the tokens at these places of the row are sampled; where ranks share it, the host waits for the device."""
    if stride == 1:
        return slice(None)
    return places % stride == 0 if shared else slice(None, None, stride)


def _gathered(x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """[S / c, ...] of each rank -> [S, ...], rank after rank."""
    x = x.contiguous()
    out = x.new_empty((group.size() * len(x), *x.shape[1:]))
    torch.distributed.all_gather_into_tensor(out, x, group=group)
    return out
