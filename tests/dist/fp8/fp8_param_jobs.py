"""Training with weights in FP8, without TransformerEngine: a stand-in for its quantized tensor and its linear layers.

The stand-in keeps what makes such tensors unlike others: one byte per number and a transpose, one scale for the whole, no views,
a storage offset of 0, `copy_` that quantizes, any other operation on the dequantized numbers.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import fp8_utils
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.utils._pytree import tree_map

from megatron_synth_kernels.torch import fp8

aten = torch.ops.aten


class Quantized(torch.Tensor):
    """[N, K] in e4m3, as Float8Tensor is."""

    @staticmethod
    def __new__(cls, data: Tensor, transpose: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Quantized:
        made = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=dtype, device=data.device)
        made._data, made._transpose, made._scale_inv = data, transpose, scale_inv
        return made  # type: ignore[no-any-return]

    @classmethod
    def of(cls, values: Tensor) -> Quantized:
        empty = torch.empty(values.shape, dtype=torch.uint8)
        made = cls(empty, torch.empty_like(empty.t()).contiguous(), torch.ones(1), values.dtype)
        made.write(values)
        return made

    def write(self, values: Tensor, begin: int = 0, amax: Tensor | None = None) -> None:
        amax = fp8.amax_of(values) if amax is None else amax
        scale = fp8.scale_for(amax, fp8.E4M3)
        scaling = fp8.Scaling(torch.zeros(()), amax=amax)
        data, _ = fp8.quantize_tensorwise(values.reshape(1, -1), scaling, fp8.E4M3, transposed=False)
        assert data is not None
        self._data.view(-1)[begin : begin + values.numel()] = data.view(torch.uint8).view(-1)
        self._scale_inv.fill_(1 / scale)
        if values.numel() == self._data.numel():
            self.renew()

    def renew(self) -> None:
        self._transpose = self._data.t().contiguous()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return (self._data.view(fp8.E4M3).float() * self._scale_inv).to(dtype or self.dtype)

    def detach(self) -> Quantized:
        return Quantized(self._data, self._transpose, self._scale_inv, self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.detach.default:
            return args[0].detach()
        if func is aten.copy_.default and isinstance(args[0], Quantized):
            source = args[1]
            args[0].write(source.dequantize() if isinstance(source, Quantized) else source)
            return args[0]
        if func in (aten.view.default, aten.slice.Tensor, aten.split.Tensor):
            raise NotImplementedError(f"{func} of a quantized tensor")
        if func is aten.t.default:  # read from the transpose, so that one which is not renewed is noticed
            transposed = (args[0]._transpose.view(fp8.E4M3).float() * args[0]._scale_inv).to(args[0].dtype)
            # laid out in memory as the transpose of an ordinary weight is: the order in which a product sums may depend on it
            return transposed.t().contiguous().t()
        assert not func._schema.is_mutable, func
        plain = lambda x: x.dequantize() if isinstance(x, Quantized) else x  # noqa: E731
        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    __torch_function__ = torch._C._disabled_torch_function_impl


class _Through(torch.autograd.Function):
    """A bf16 weight as FP8 would have it; its gradient goes into main_grad by the product itself."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return Quantized.of(weight.detach()).dequantize()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _linears(in_fp8: bool) -> Any:
    from megatron_synth.model.spec import Linears

    def quantize(self: Any) -> None:
        quantizer = SimpleNamespace(with_amax_reduction=False)
        self.quantizers = {"scaling_fwd": [quantizer, quantizer], "scaling_bwd": [quantizer]}
        if in_fp8:
            old = self.weight
            self.weight = torch.nn.Parameter(Quantized.of(torch.zeros(old.shape, dtype=old.dtype)))
            self.weight.__dict__.update(old.__dict__)
            self.weight.get_high_precision_init_val = lambda: self.weight._high_precision_init_val
            self.weight.clear_high_precision_init_val = lambda: delattr(self.weight, "_high_precision_init_val")
            return
        product = self._forward_impl

        def through(input: Tensor, weight: Tensor, **others: Any) -> Any:
            rounded = _Through.apply(weight)
            rounded.main_grad = weight.main_grad
            return product(input=input, weight=rounded, **others)

        self._forward_impl = through

    class Column(ColumnParallelLinear):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            quantize(self)

    class Row(RowParallelLinear):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            quantize(self)

    return Linears(Column, Row, Column, Row)


def _quantize_shards(weights: Any, masters: Any, begins: Any, group: Any, fsdp: Any = None) -> None:
    """cast_master_weights_to_fp8: with the largest magnitude of the whole, reduced over the ranks, and without transposes."""
    for weight, master, begin in zip(weights, masters, begins, strict=True):
        part = torch.zeros(1, dtype=weight.dtype) if master is None else master.detach().to(weight.dtype)
        amax = fp8.amax_of(part)
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=group)
        if master is not None:
            weight.write(part, begin, amax)
        else:
            weight._scale_inv.fill_(1 / fp8.scale_for(amax, fp8.E4M3))


def _storage(weight: Quantized, data: Tensor) -> None:
    data.copy_(weight._data)
    weight._data = data


class _OneByOne:
    """Collectives as they come. gloo joins those of a `_coalescing_manager` as if they all had the type of the first."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.wait = lambda: None

    def __enter__(self) -> _OneByOne:
        return self

    def __exit__(self, *args: object) -> None:
        return None


def _at_once(collective: Any) -> Any:
    return lambda *args, **kwargs: collective(*args, **{**kwargs, "async_op": False})


def train(arguments: list[str]) -> int:
    """`megatron-synth train` with TransformerEngine's place taken."""
    from megatron_synth.cli.main import main
    from megatron_synth.model.fp8 import te as te_module

    put: Any = fp8_utils
    put.HAVE_TE_FP8_TENSOR_CLASS, put.FP8_TENSOR_CLASS = True, Quantized
    put._modify_underlying_storage_impl, put._quantize_param_shard_impl = _storage, _quantize_shards
    put.te_post_all_gather_processing = lambda weights: [weight.renew() for weight in weights]
    put.is_te_min_version = lambda *args, **kwargs: True
    buffer: Any = param_and_grad_buffer
    buffer._coalescing_manager = _OneByOne
    buffer.dist_all_gather_func = _at_once(buffer.dist_all_gather_func)
    buffer.dist_reduce_scatter_func = _at_once(buffer.dist_reduce_scatter_func)
    te: Any = te_module
    te.problem, te.check, te._recomputing = (lambda device: None), (lambda *args: None), (lambda: False)
    te.linears = lambda: _linears("precision.fp8_param_gather=true" in arguments)
    return main(arguments)


def weights(run: str) -> dict[str, Any]:
    """What a run's newest checkpoint holds, as fp32 arrays by name: whole tensors, as they are exported."""
    from pathlib import Path

    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import Layout

    with process_group(Layout.single(), 0):
        from megatron_synth.train.checkpoint import resume

        path = resume.newest_sound(Path(run), "checksums")
        assert path is not None
        return {name: weight.float().numpy() for name, weight in resume.full_weights(path).items()}
