"""Bytes that our FP8 layers move besides their products: what quantizing costs, apart from and inside what makes the tensors.

Counted per token and layer of one rank, in bf16, without tensor parallelism; a tensor is assumed not to stay in the cache. Only
what FP8 adds or changes is in it: attention, rotation, residual sums and the norms' gradients are the same in any precision.

A quantizer reads 2 bytes of a number and writes it twice, as it is and transposed: 4 (the scales of blocks, 3 % of what is
written, are left out). `current` scaling must have seen all of a tensor before it can scale any of it, and reads it once more,
or makes it once more where it is made from something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megatron_synth.config.schema import ModelConfig

Scaling = Literal["delayed", "current", "blockwise"]


@dataclass(frozen=True)
class Ways:
    """Bytes for each number."""

    apart: int
    """The tensor is made in bf16, then quantized: `precision.fp8_fused: false`."""
    fused: int
    """As our kernels do it."""
    floor: int
    """The least: everything that is needed is read once, the result written once; with `current`, read twice."""


@dataclass(frozen=True)
class Place:
    """Where a layer quantizes."""

    name: str
    symbol: str
    """Of `numbers`: H hidden size, F MLP width, A D and G D channels of queries and of keys."""
    numbers: Callable[[ModelConfig], int]
    """Per token and layer; of weights, per layer."""
    known: Ways
    """`delayed` and `blockwise`: the scale is known before, or needs the numbers of a block alone."""
    current: Ways
    per_token: bool = True

    def ways(self, scaling: Scaling) -> Ways:
        """By recipe."""
        return self.current if scaling == "current" else self.known


def _queries(model: ModelConfig) -> int:
    return model.num_attention_heads * model.head_dim


def _in_products(model: ModelConfig) -> int:
    attention = 2 * _queries(model) + 2 * model.query_groups * model.head_dim
    return model.hidden_size * (attention + 3 * model.ffn_hidden_size)


_QUANTISED, _LOOKED_AT = Ways(4, 4, 4), Ways(6, 6, 6)
PLACES = (
    # apart: 2 read, 2 written, quantized. Fused: rows are read for their mean square, then tiles for both orders.
    Place("RMSNorm, twice", "2 H", lambda model: 2 * model.hidden_size, Ways(8, 6, 4), Ways(10, 6, 6)),
    # apart: 4 read, 2 written, quantized. Fused: 4 read, 2 written; for `current` 4 more to see the magnitude
    Place("SwiGLU", "F", lambda model: model.ffn_hidden_size, Ways(10, 6, 6), Ways(12, 10, 10)),
    # apart: 6 read, 4 written, two numbers quantized. Fused: 6 read, 4 written; for `current` 6 more
    Place("SwiGLU's gradient", "F", lambda model: model.ffn_hidden_size, Ways(18, 10, 10), Ways(22, 16, 16)),
    Place("attention's output", "A D", _queries, _QUANTISED, _LOOKED_AT),
    Place(
        "gradient of queries, keys and values",
        "(A + 2 G) D",
        lambda model: _queries(model) + 2 * model.query_groups * model.head_dim,
        _QUANTISED,
        _LOOKED_AT,
    ),
    Place("gradients of the residual stream", "2 H", lambda model: 2 * model.hidden_size, _QUANTISED, _LOOKED_AT),
    Place("weights, once per step", "W", _in_products, _QUANTISED, _LOOKED_AT, per_token=False),
)
"""All places of a layer but the weights' gradients, which `GRADIENT` is for."""

GRADIENT = Ways(16, 16, 8)
"""A weight's gradient in each micro-batch: written in fp32 by the product, read with main_grad's, which is written. The floor
is a product that accumulates; torch's FP8 products cannot."""


def bytes_per_step(model: ModelConfig, scaling: Scaling, tokens: int, micro_batches: int) -> Ways:
    """Of one layer in an optimizer step over `tokens` tokens of a rank."""
    counted = [(place.ways(scaling), place.numbers(model) * (tokens if place.per_token else 1)) for place in PLACES]
    counted.append((GRADIENT, _in_products(model) * micro_batches))
    return Ways(
        sum(ways.apart * numbers for ways, numbers in counted),
        sum(ways.fused * numbers for ways, numbers in counted),
        sum(ways.floor * numbers for ways, numbers in counted),
    )
