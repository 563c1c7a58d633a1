"""Initial weights as a function of (seed, parameter name, global index): one seed is one model in every layout.

A generator that each rank draws from gives other weights in other layouts. Here every element is the hash of its place in
the whole, unsharded parameter, so that a rank computes just its shard, and equally on 1 or 512 ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

from megatron_synth.config.schema import ModelConfig
from megatron_synth.model.architecture import Weight, by_key
from megatron_synth.parallel import fp8_params
from megatron_synth.parallel.muon import MATRIX, Matrix
from megatron_synth.parallel.wrap import NO_WEIGHT_DECAY

_BLOCK = 1 << 20  # elements hashed at a time; bounds temporary memory to some 50 MB


def _signed(value: int) -> int:
    """An unsigned 64-bit constant as the int64 with the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): int64 -> int64, a bijection that scatters its input."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _uniform(x: Tensor) -> Tensor:
    """Hashes to fp64 in (0, 1), 53 bits."""
    return (_shift_right(x, 11).double() + 0.5) * 2.0**-53


def normal_at(index: Tensor, key: int) -> Tensor:
    """Standard normal fp64 numbers at the given positions of an endless sequence named by `key`.

    Box-Muller over two independent hashes of each position.

    Args:
        index: int64, any shape; positions.
        key: 64-bit name of the sequence.
    """
    state = (index * 2 + 1) * _GOLDEN + _signed(key)
    radius = torch.sqrt(-2.0 * torch.log(_uniform(_splitmix64(state))))
    return radius * torch.cos(2.0 * math.pi * _uniform(_splitmix64(state + _GOLDEN)))


def _global_index(start: int, stop: int, shard: ShardedTensor, device: torch.device) -> Tensor:
    """Positions in the whole parameter of the local elements [start, stop), both counted in row-major order."""
    local = torch.arange(start, stop, dtype=torch.int64, device=device)
    index = torch.zeros_like(local)
    lead = shard.prepend_axis_num
    stride = 1
    for axis in reversed(range(len(shard.global_shape))):
        if axis >= lead:
            size = shard.local_shape[axis - lead]
            index += (local % size + shard.global_offset[axis]) * stride
            local = local // size
        else:
            index += shard.global_offset[axis] * stride
        stride *= shard.global_shape[axis]
    return index


@torch.no_grad()
def fill_normal(shard: ShardedTensor, seed: int, std: float) -> None:
    """Fill a shard with its part of the parameter's N(0, std^2) values."""
    digest = hashlib.blake2b(f"{seed}/{shard.key}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little")
    data = shard.data
    assert data is not None and data.is_contiguous()
    flat = data.view(-1)
    for start in range(0, flat.numel(), _BLOCK):
        stop = min(start + _BLOCK, flat.numel())
        values = normal_at(_global_index(start, stop, shard, data.device), key)
        flat[start:stop] = (values * std).to(data.dtype)


def parameter_shards(model: GPTModel) -> Iterator[ShardedTensor]:
    """The parameters of one model chunk with their global names and places; the two halves of a SwiGLU matrix apart."""
    for entry in model.sharded_state_dict().values():
        yield from _shards(entry)


def _shards(entry: Any) -> list[ShardedTensor]:
    parts = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
    # the rest is TransformerEngine's extra state
    return [part for part in (parts if isinstance(parts, list) else [parts]) if isinstance(part, ShardedTensor)]


def _mark(parameter: torch.nn.Parameter, weight: Weight) -> None:
    """Tell megatron-core what the table says of a parameter.

    It marks shared ones itself in the initialization that we replace, and TransformerEngine does; without the marks it counts
    one rank's part alone in the gradient norm.
    """
    if weight.axis is not None and not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, True, weight.axis, 1)
    setattr(parameter, NO_WEIGHT_DECAY, not weight.decays)
    if weight.is_product:
        assert weight.axis is not None
        setattr(parameter, MATRIX, Matrix(weight.axis, weight.blocks, tuple(rows for _, rows in weight.hf)))


def _in_table(entry: ShardedTensor | ShardedTensorFactory, table: dict[str, Weight], layers: int) -> Weight:
    """The row of a tensor of the model that was built; the two must agree."""
    weight = table[entry.key]
    found = {tuple(shard.global_shape) for shard in _shards(entry)}
    expected = weight.saved_shape(layers)
    assert found == {expected}, f"{entry.key} is {found} in the model, {expected} in the table"
    return weight


@torch.no_grad()
def initialize_weights(chunks: Iterable[GPTModel], model: ModelConfig, vocab_size: int, *, seed: int) -> None:
    """Give every parameter the initial values, and the marks, that the architecture's table names.

    Norms are one, biases zero, matrices N(0, std^2), those that write to the residual stream N(0, std^2 / (2 num_layers)). The
    scaling by depth is GPT-2's (Radford et al., 2019, section 2.3), the whole scheme megatron-core's default. With
    `mup_base_hidden_size` the matrices of the layers are divided by sqrt(m).
    """
    table = by_key(model, vocab_size)
    std = model.init_method_std
    narrower = math.sqrt(model.mup_factor)
    deviations = {"normal": std, "residual": std / math.sqrt(2 * model.num_layers)}
    for chunk in chunks:
        for entry in chunk.sharded_state_dict().values():
            if not isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
                continue  # TransformerEngine's extra state
            parameter = entry.data
            quantized = fp8_params.is_quantized(parameter)
            if quantized:  # parts of it cannot be written
                entry = replace(entry, data=torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device))
            weight = _in_table(entry, table, model.num_layers)
            _mark(parameter, weight)
            for shard in _shards(entry):
                assert shard.data is not None
                if weight.initial in ("ones", "zeros"):
                    shard.data.fill_(1.0 if weight.initial == "ones" else 0.0)
                else:
                    fill_normal(shard, seed, deviations[weight.initial] / (narrower if weight.is_product else 1.0))
            if quantized:
                fp8_params.fill(parameter, entry.data)
