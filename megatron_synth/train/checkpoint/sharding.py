"""What this rank writes of a checkpoint: pieces of tensors by their place in the whole, found without a word to other ranks.

megatron-core saves the distributed optimizer by gathering all its states on every data-parallel rank, on the host, and lets the
first of them write. Here each rank writes what it owns: the weights, master weights and moments of its own range of each
parameter. The range is flat, so in the whole tensor it is a box of full rows and at most a box more at either end; the
format takes any boxes. What is on the disk can be read by megatron-core in every layout, as before.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    is_main_replica,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_synth.model.fp8 import recipe
from megatron_synth.parallel import fp8_params
from megatron_synth.parallel.average import Average, Range
from megatron_synth.parallel.muon import MATRIX, uses_muon
from megatron_synth.train.checkpoint.format.boxes import boxes

# Optimizer states are stored by parameter, not by buffer, so that tensor-, pipeline- and data-parallel sizes may change.
# Handed out in copies: megatron-core puts process groups into it.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
_STATE = "optimizer.state"
_SECOND = "exp_avg_sq"
AVERAGE = "ema."
"""What the names of the average of the weights begin with."""


@dataclass(frozen=True)
class Piece:
    """A box of a whole tensor.

    key: name of the whole. size: its shape. offset, shape: place and shape of the box in it.
    data: its values, flat, on the device; current until the next optimizer step.
    """

    key: str
    size: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True)
class LocalState:
    """What this rank writes.

    objects: what is neither tensor nor equal on all ranks, serialized, by name.
    common: what is equal on all ranks; rank 0 writes it.
    """

    pieces: list[Piece]
    objects: dict[str, bytes]
    common: dict[str, Any]


def names_of(chunks: list[DistributedDataParallel]) -> list[str]:
    """What megatron-core calls the model chunks of a rank."""
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]


def sharded_model(chunks: list[DistributedDataParallel]) -> dict[str, Any]:
    """megatron-core's description of the model chunks."""
    return {
        name: chunk.module.sharded_state_dict(metadata=dict(METADATA))
        for name, chunk in zip(names_of(chunks), chunks, strict=True)
    }


def sharded_optimizer(optimizer: ChainedOptimizer, model: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    """megatron-core's description of the optimizer of `sharded_model`."""
    chunks = model["model"] if list(model) == ["model"] else dict(model)
    matrices = {f"{_STATE}.{_SECOND}.{key}" for key in _keys_of_muon(optimizer, model)}
    found: dict[str, Any] = optimizer.sharded_state_dict(chunks, is_loading=loading, metadata=dict(METADATA))
    for states in found.get("param_state", {}).values():  # of the distributed optimizer, which describes Adam's
        if _SECOND in states and states[_SECOND].key in matrices:
            del states[_SECOND]
    return found


def _keys_of_muon(optimizer: ChainedOptimizer, model: dict[str, Any]) -> set[str]:
    """Names of the parameters that Muon updates, which have no second moments."""
    if not uses_muon(optimizer):
        return set()
    return {entry.key for entry in nested_values(model) if _is_parameter(entry) and hasattr(entry.data, MATRIX)}


def sharded_fp8(chunks: list[DistributedDataParallel]) -> dict[str, Any]:
    """The histories of FP8 scales of the model chunks, {"fp8": ...}; empty where the recipe has none."""
    run = recipe.of(chunks)
    history = run.sharded_state() if run else {}
    return {"fp8": history} if history else {}


def collect(chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer, average: Average | None = None) -> LocalState:
    """This rank's part of the model, the optimizer and the average of the weights. Copies nothing, sends nothing."""
    model = sharded_model(chunks)
    pieces: list[Piece] = []
    (inner,) = optimizer.chained_optimizers
    if isinstance(inner, DistributedOptimizer):
        state: dict[str, Any] = dict(model)
        state["optimizer"] = {**inner.state_dict(), "param_state_sharding_type": METADATA["distrib_optim_sharding_type"]}
        pieces += _owned(inner, model)
    else:
        state = {**model, "optimizer": sharded_optimizer(optimizer, model, loading=False)}
    state |= sharded_fp8(chunks)
    local = _extracted(state, pieces, owned_elsewhere=bool(pieces) or isinstance(inner, DistributedOptimizer))
    if average is not None:
        # data-parallel ranks have ranges of their own, or copies
        split = isinstance(inner, DistributedOptimizer)
        model = sharded_model(chunks)  # anew: what was described above has been taken apart
        local.pieces.extend(average_pieces(model, average.ranges, lambda id: is_main_replica((*id[:-1], 0) if split else id)))
    return local


def average_pieces(
    model: dict[str, Any], ranges: Iterable[Range], chosen: Callable[[tuple[int, ...]], bool] = lambda id: True
) -> Iterator[Piece]:
    """The boxes of the average of the weights that values of parameters are.

    Args:
        model: as `sharded_model` describes it.
        ranges: parameters, and the values of the average for a range of each; the pieces' data are views of these.
        chosen: which replicas, by their ids.
    """
    described = {id(entry.data): entry for entry in nested_values(model) if _is_parameter(entry)}
    for parameter, begin, end, values in ranges:
        entry = described[id(parameter)]
        if chosen(entry.replica_id):
            yield from _range(entry, f"{AVERAGE}{entry.key}", begin, end, values)


def collect_tensors(state: dict[str, Any]) -> LocalState:
    """The same of a nest of megatron-core's sharded tensors."""
    return _extracted(state, [], owned_elsewhere=False)


def _extracted(state: dict[str, Any], pieces: list[Piece], *, owned_elsewhere: bool) -> LocalState:
    """Add what is described in `state`; `owned_elsewhere`: but for parameters, which `pieces` hold already."""
    state = dict(state, content_metadata=dict(METADATA))
    if owned_elsewhere:
        _, state = extract_matching_values(state, _is_parameter)
    apply_factories(state)
    _, state = extract_matching_values(state, lambda value: isinstance(value, LocalNonpersistentObject))
    sharded, common = extract_matching_values(state, lambda value: isinstance(value, ShardedBase))
    objects = {}
    for entry in nested_values(sharded):
        if not is_main_replica(entry.replica_id):
            continue
        if isinstance(entry, ShardedTensor):
            pieces.append(_whole(entry))
        else:
            assert isinstance(entry, ShardedObject), entry
            content = io.BytesIO()
            torch.save([entry.data], content)
            objects[entry.unique_key] = content.getvalue()
    return LocalState(pieces, objects, common)


def _is_parameter(value: Any) -> bool:
    return isinstance(value, (ShardedTensor, ShardedTensorFactory)) and isinstance(value.data, torch.nn.Parameter)


def _whole(tensor: ShardedTensor) -> Piece:
    assert tensor.flattened_range is None and tensor.data is not None, tensor.key
    shape = (*(1 for _ in range(tensor.prepend_axis_num)), *tensor.data.shape)
    return Piece(tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), shape, tensor.data.detach().reshape(-1))


def _owned(optimizer: DistributedOptimizer, model: dict[str, Any]) -> Iterator[Piece]:
    """The weights, master weights and moments of this rank's range of each parameter."""
    assert optimizer.init_state_fn is not None
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)  # no step may have been made yet: all were skipped
    described = {id(entry.data): entry for entry in nested_values(model) if _is_parameter(entry)}
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, place in bucket["param_map"].items():
                    entry = described[id(parameter)]
                    # the last number of a replica's id is its data-parallel rank; this one has a range of its own
                    if not is_main_replica((*entry.replica_id[:-1], 0)):
                        continue
                    begin, end = place["param"].start, place["param"].end
                    states = optimizer._get_main_param_and_optimizer_states(parameter)
                    if fp8_params.is_quantized(parameter):
                        # What a run with bf16 weights has there, and what these were quantized from.
                        weights = states["param"].detach().to(parameter.dtype).reshape(-1)
                        entry = replace(entry, data=fp8_params.shape_of(parameter))
                    else:
                        weights = parameter.detach().reshape(-1)[begin:end]
                    yield from _range(entry, entry.key, begin, end, weights)
                    for name in ("param", "exp_avg", _SECOND):
                        if name not in states:  # Muon has no second moments
                            continue
                        yield from _range(entry, f"{_STATE}.{name}.{entry.key}", begin, end, states[name].detach().reshape(-1))


def _range(entry: ShardedTensor | ShardedTensorFactory, key: str, begin: int, end: int, values: Tensor) -> Iterator[Piece]:
    """The values [begin, end) of a parameter, which may be stored as several tensors (the halves of a gated MLP)."""
    parameter = entry.data
    assert values.numel() == end - begin and parameter.is_contiguous(), key
    if isinstance(entry, ShardedTensorFactory):
        parts = list(nested_values(replace(entry, key=key).build()))
    else:
        parts = [replace(entry, key=key)]
    for part in parts:
        assert part.data.is_contiguous() and part.flattened_range is None, key
        start = part.data.storage_offset() - parameter.storage_offset()  # of the part in the parameter
        low, high = max(begin, start), min(end, start + part.data.numel())
        at = low - begin
        for offset, shape in boxes(part.data.shape, low - start, high - start):
            lead = part.prepend_axis_num
            base = part.global_offset
            yield Piece(
                part.key,
                tuple(part.global_shape),
                (*base[:lead], *(whole + local for whole, local in zip(base[lead:], offset, strict=True))),
                (*(1 for _ in range(lead)), *shape),
                values[at : at + math.prod(shape)],
            )
            at += math.prod(shape)
