"""FP8 of a rank: the recipe, the layers' scales and their history.

Three tensors of a linear layer are quantized: its input and its weight in e4m3, the gradient of its output in e5m2 or e4m3.
What tensor-parallel ranks hold in parts gets one scale from all parts, so that a layout does not change the numbers.

delayed scaling: every rank notes the largest magnitude of each tensor over the micro-batches of an optimizer step. At the
step's end these are reduced over tensor- and data-parallel ranks, as TransformerEngine does, and enter a history, whose largest
sets the scale. So scales depend on the global batch alone, not on the layout, and every rank computes the same. The first step,
without a history, scales as current scaling does; TransformerEngine's has scale 1, at which small gradients are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_synth.config.schema import PrecisionConfig
from megatron_synth.model import ops
from megatron_synth.model.fp8.statistics import Statistics
from megatron_synth.model.ops import E4M3, E5M2, Pair, Quantized, Scaling, Source

ROLES = INPUT, WEIGHT, GRAD = ("input", "weight", "grad")


class Plain:
    """A matrix that exists, to be quantized; see `fp8.Source` for those that do not."""

    def __init__(self, quantizer: Any, x: Tensor):
        self._quantizer, self._x = quantizer, x
        self.amax = partial(quantizer.amax_of, x)
        self.tensorwise = partial(quantizer.quantize_tensorwise, x)
        self.blocks = partial(quantizer.quantize_1x128, x)

    def value(self) -> Tensor:
        """The matrix."""
        return self._x


@dataclass(frozen=True)
class Recipe:
    """How tensors are scaled."""

    scaling: str
    """delayed, current or blockwise."""
    backward: torch.dtype
    """Format of gradients; everything else is e4m3."""
    history_len: int
    """delayed: steps that are remembered."""
    margin: int
    """delayed: scales are divided by 2 to this power."""

    @classmethod
    def of(cls, precision: PrecisionConfig) -> Recipe:
        """The recipe that a configuration asks for."""
        assert precision.fp8 != "off"
        backward = E5M2 if precision.fp8_number_format == "hybrid" else E4M3
        margin = precision.fp8_margin if precision.fp8 == "delayed" else 0
        return cls(precision.fp8, backward, precision.fp8_amax_history_len, margin)

    @property
    def tensorwise(self) -> bool:
        """One scale for a tensor."""
        return self.scaling != "blockwise"

    def format(self, role: str) -> torch.dtype:
        """Number format of a tensor."""
        return self.backward if role == GRAD else E4M3

    def largest(self, role: str) -> float:
        """What a tensorwise scale brings the largest magnitude to."""
        return ops.fp8.LARGEST[self.format(role)] / 2.0**self.margin


class Fp8Run:
    """What the FP8 layers of a rank share. Built before them; `seal` once they exist."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self.layers: list[Fp8Layer] = []
        self.version = 0
        """Counts optimizer steps since the start of the process; quantized weights of another version are stale."""
        self.updates = 0
        """Steps in the history since the run began."""
        self.statistics = Statistics()
        self.scalars = ops.fp8.Scalars(device)
        self.quantizer = ops.quantizer()
        self.swiglu, self.rms_norm = ops.quantizing_swiglu(), ops.quantizing_rms_norm()

    def add(self, name: str, sharded: frozenset[str], group: Any) -> Fp8Layer:
        """A new layer.

        Args:
            name: place in the whole model, equal in every layout.
            sharded: roles whose tensors the ranks of `group` hold in parts.
            group: the tensor-parallel ranks.
        """
        self.layers.append(Fp8Layer(self, len(self.layers), name, sharded, group))
        return self.layers[-1]

    def seal(self) -> None:
        """Make the state of all layers that were added, one tensor for all."""
        shape = (len(self.layers), len(ROLES))
        self.amax = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self.scale = torch.ones(shape, dtype=torch.float32, device=self.device)
        self.history = torch.zeros((*shape, self.recipe.history_len), dtype=torch.float32, device=self.device)
        # by layer and role: taking one out of a tensor costs the host more than launching a kernel
        self.noted = [row.unbind() for row in self.amax.unbind()]
        self.known = [row.unbind() for row in self.scale.unbind()]
        self._largest = torch.tensor([self.recipe.largest(role) for role in ROLES], dtype=torch.float32, device=self.device)

    @property
    def uses_history(self) -> bool:
        """Whether scales come from the history in this step."""
        return self.recipe.scaling == "delayed" and self.updates > 0

    @torch.no_grad()
    def end_step(self, skipped: bool) -> None:
        """Take in the magnitudes of a finished optimizer step. Called by all ranks; one small all-reduce, no wait.

        A skipped step leaves no trace: its magnitudes may be those of what was not finite.
        """
        self.version += 1
        if self.recipe.scaling != "delayed":
            return
        if not skipped:
            if self.layers:
                group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
                torch.distributed.all_reduce(self.amax, torch.distributed.ReduceOp.MAX, group=group)
                # one rank's infinity that the loss did not see must not stay for the length of the history
                self.history[:, :, self.updates % self.recipe.history_len] = self.amax.nan_to_num(0.0, 0.0, 0.0)
            self.updates += 1
            self._rescale()
        self.amax.zero_()

    def _rescale(self) -> None:
        self.scale.copy_(ops.fp8.scale_to(self._largest, self.history.amax(dim=2)))

    def sharded_state(self) -> dict[str, Any]:
        """The history, for checkpoints that any layout can read; empty where scales have none.

        Tensors are by layer, under its name in the whole model, and equal on all ranks that hold the layer.
        """
        if self.recipe.scaling != "delayed":
            return {}
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        state = {
            layer.name: _replicated(f"{_KEY}{layer.name}", self.history[layer.index], (0, tensor_rank, data_rank))
            for layer in self.layers
        }
        updates = torch.tensor([self.updates], dtype=torch.int64, device=self.device)
        return state | {"updates": _replicated(f"{_KEY}updates", updates, (stage, tensor_rank, data_rank))}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `sharded_state` saved."""
        for layer in self.layers:
            self.history[layer.index] = state[layer.name].to(self.device)
        self.updates = int(state["updates"].item())
        self.version += 1
        self.amax.zero_()
        if self.uses_history:
            self._rescale()


_KEY = "fp8.amax_history."


def is_state(key: str) -> bool:
    """Whether a tensor of a checkpoint is FP8's history, and no weight."""
    return key.startswith(_KEY)


def _replicated(key: str, value: Tensor, replica: tuple[int, int, int]) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, value, replica_id=replica)


class Fp8Layer:
    """The quantized tensors of one linear layer."""

    def __init__(self, run: Fp8Run, index: int, name: str, sharded: frozenset[str], group: Any):
        self.run, self.index, self.name = run, index, name
        self._sharded, self._group = sharded if group.size() > 1 else frozenset(), group
        self._weight: tuple[Any, Quantized, Quantized] | None = None
        self._handed: tuple[Tensor, Pair] | None = None
        self._nan: Tensor | None = None

    def weight(self, weight: Tensor) -> tuple[Quantized, Quantized]:
        """[N, K] -> it and its transpose, quantized once per optimizer step (or when the weight was otherwise changed)."""
        version = (self.run.version, weight._version, weight.data_ptr())
        if self._weight is None or self._weight[0] != version:
            row, transposed = self.quantize(WEIGHT, weight.detach())
            assert row is not None and transposed is not None
            self._weight = version, row, transposed
        return self._weight[1:]

    def quantize(
        self, role: str, x: Tensor | Source, *, row: bool = True, transposed: bool = True, recorded: bool = True
    ) -> Pair:
        """x [N, K] and its transpose [K, N], each None where not wanted.

        `x`: a matrix, or what one is made from while it is quantized.
        `recorded`: whether delayed scaling takes note of its magnitude; evaluations leave no trace.
        """
        recipe, run = self.run.recipe, self.run
        source = Plain(run.quantizer, x) if isinstance(x, Tensor) else x
        dtype = recipe.format(role)
        if not recipe.tensorwise:
            blocks = partial(run.quantizer.quantize_128x128, x) if role == WEIGHT else source.blocks
            result: Pair = blocks(dtype, row=row, transposed=transposed)
        else:
            place, inverse = ROLES.index(role), run.scalars.take()
            noted = run.noted[self.index][place] if recorded and recipe.scaling == "delayed" else None
            if run.uses_history:
                scaling = Scaling(inverse, scale=run.known[self.index][place], noted=noted)
            else:
                amax = source.amax(run.scalars.take())
                if role in self._sharded:
                    torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=self._group)
                scaling = Scaling(inverse, amax=amax, noted=noted, margin=recipe.margin)
            data, other = source.tensorwise(scaling, dtype, row=row, transposed=transposed)
            result = (
                None if data is None else Quantized(data, inverse),
                None if other is None else Quantized(other, inverse),
            )
        if run.statistics.observing and recorded:
            as_it_is, other = result
            quantized = as_it_is if as_it_is is not None else other
            assert quantized is not None
            run.statistics.add(self.name, role, source.value() if as_it_is is not None else source.value().t(), quantized)
        return result

    def hand_gradient(self, source: Source, shape: torch.Size, like: Tensor) -> Tensor:
        """Quantize the gradient of this layer's output where it is made, and keep it for the backward pass, which comes next.

        Returns:
            What autograd is to carry from there to here: no number of it is ever read, and all are NaN.
        """
        assert self._handed is None, f"{self.name}: a gradient was handed over and not taken"
        if self._nan is None or self._nan.dtype != like.dtype:
            self._nan = torch.full((1,), torch.nan, dtype=like.dtype, device=like.device)
        placeholder = self._nan.expand(shape)
        self._handed = placeholder, self.quantize(GRAD, source)
        return placeholder

    def gradient(self, grad: Tensor, *, transposed: bool) -> Pair:
        """The quantized gradient of the output: the one that was handed over, or made from `grad` [.., N] itself."""
        if self._handed is not None:
            (placeholder, pair), self._handed = self._handed, None
            assert grad.data_ptr() == placeholder.data_ptr(), (
                f"{self.name}: its output is used elsewhere than in what handed a gradient over"
            )
            return pair
        return self.quantize(GRAD, grad.reshape(-1, grad.shape[-1]).contiguous(), transposed=transposed)


def of(chunks: Sequence[Any]) -> Fp8Run | None:
    """The FP8 of wrapped model chunks; None where there is none of ours."""
    run: Fp8Run | None = getattr(chunks[0].module, "fp8", None)
    return run
