"""The command line on the device that computes nothing, with the CPU computing what the device was asked to.

    python -m tests.nocuda.numbers train CONFIG ...

Device memory is memory of this process. So each operation of torch runs twice: on the device, whose launches and copies are
recorded and compute nothing, and by the CPU on the very same memory. Training, checkpoints, resumes and evaluations then have
the numbers that a GPU would give them, up to rounding; streams and their order are not rehearsed.

Triton's kernels do not run, so a run names torch for each operation: `TORCH_KERNELS`.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.nocuda.ordered import ordered

TORCH_KERNELS = tuple(
    f"kernels.{name}=torch"
    for name in (
        *("rms_norm", "rms_norm_residual", "swiglu", "rope", "cross_entropy_stats", "cross_entropy_grad", "adam"),
        *("quantise_fp8", "swiglu_quantise", "rms_norm_quantise"),
    )
)
_LEFT_ALONE = {"record_stream", "_pin_memory", "is_pinned", "empty", "empty_like", "empty_strided", "new_empty", "set_"}


def _on_host(value: Any) -> Any:
    """The same memory as a tensor of the CPU."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if not isinstance(value, Tensor) or not value.is_cuda:
        return value
    storage = value.untyped_storage()
    if not storage.nbytes():
        return torch.empty(value.shape, dtype=value.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    empty = torch.empty(0, dtype=value.dtype)
    return empty.set_(flat.untyped_storage(), value.storage_offset(), value.shape, value.stride())


class Numbers(TorchDispatchMode):
    """Within, operations on the device are computed, by the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name, space = str(func.overloadpacket).partition(".")[2], func.namespace
        flat, _ = tree_flatten((args, kwargs, result))
        if not any(isinstance(value, Tensor) and value.is_cuda for value in flat):
            return result
        if space not in ("aten", "torch_attn") or func.is_view or name in _LEFT_ALONE:
            return result
        given, options = tree_map(_on_host, (args, kwargs))
        replaced = _REPLACED.get(f"{name}.{func._overloadname}", _REPLACED.get(name, func))
        with _device_at_work():
            return _written(result, replaced(*given, **options))


@contextmanager
def _device_at_work() -> Iterator[None]:
    """Within, this process does what the device would: memory that is guarded from the host (order.c) is open to it."""
    library = ctypes.CDLL(None)
    library.nocuda_open(1)
    try:
        yield
    finally:
        library.nocuda_open(0)


def _written(result: Any, computed: Any) -> Any:
    """`computed` in the memory of `result`; what is no tensor is taken as it was computed."""
    if isinstance(result, Tensor):
        place = _on_host(result)
        if place.data_ptr() != computed.data_ptr():
            place.copy_(computed)
        return result
    if isinstance(result, (list, tuple)):
        done = list(result)
        for index, value in enumerate(computed or ()):
            if isinstance(value, Tensor):
                _written(result[index], value)
        return type(result)(done)
    return computed


# ---- attention, which has other operations on a CPU


def _attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Of [B, A, S, D] and [B, G, S, D], in fp32: the output, and log-sum-exp [B, A, S]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query.float() @ key.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def _attention_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of query, key and value; written out, since autograd is not to be had inside an operation."""
    groups = query.shape[1] // key.shape[1]
    q, grad = query.float(), grad.float()
    k, v = (x.float().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = q @ k.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    weights = scores.softmax(-1)
    to_weights = grad @ v.transpose(-1, -2)
    to_scores = weights * (to_weights - (to_weights * weights).sum(-1, keepdim=True)) * scale
    to_keys = (to_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad)
    to_key, to_value = (x.unflatten(1, (key.shape[1], groups)).sum(2) for x in to_keys)
    return to_scores @ k, to_key, to_value


def _scale(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _flash(
    query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, debug: bool = False, *, scale: Any = None
) -> Any:
    return _attention(query, key, value, None, causal, _scale(query, scale))


def _flash_backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, a: Any, b: Any, c: Any, d: Any, dropout: Any, causal: bool,
    *seeds: Any, scale: Any = None
) -> Any:  # fmt: skip
    return _attention_gradients(grad, query, key, value, None, causal, _scale(query, scale))


def _efficient(
    query: Any, key: Any, value: Any, bias: Any, with_lse: Any, dropout: float = 0.0, causal: bool = False, *, scale: Any = None
) -> Any:
    return _attention(query, key, value, bias, causal, _scale(query, scale))[:1]


def _efficient_backward(
    grad: Any, query: Any, key: Any, value: Any, bias: Any, out: Any, lse: Any, seed: Any, offset: Any, dropout: Any, mask: Any,
    causal: bool = False, *, scale: Any = None
) -> Any:  # fmt: skip
    return _attention_gradients(grad, query, key, value, bias, causal, _scale(query, scale))


def _apart(starts: Tensor, tokens: int) -> Tensor:
    """[T, T]: -infinity between tokens of different documents."""
    document = torch.searchsorted(starts, torch.arange(tokens, dtype=starts.dtype), right=True)
    return torch.zeros(tokens, tokens).masked_fill(document[:, None] != document[None, :], -math.inf)


def _by_head(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(0, 1)[None] for x in tensors]  # [T, A, D] -> [1, A, T, D]


def _varlen(query: Any, key: Any, value: Any, starts: Any, *rest: Any, **options: Any) -> Any:
    scale = _scale(query, _scale_among(rest, options))
    out, _ = _attention(*_by_head(query, key, value), _apart(starts, len(query)), True, scale)
    return (out[0].transpose(0, 1),)


def _varlen_backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, starts: Any, *rest: Any, **options: Any
) -> Any:
    scale = _scale(query, _scale_among(rest, options))
    found = _attention_gradients(*_by_head(grad, query, key, value), _apart(starts, len(query)), True, scale)
    return tuple(x[0].transpose(0, 1) for x in found)


def _scale_among(rest: Sequence[Any], options: dict[str, Any]) -> float | None:
    """The scale; releases of torch have it at other places, and no other number is a fraction."""
    return next((value for value in (*rest, *options.values()) if isinstance(value, float)), None)


def _rms_norm_backward(grad: Any, x: Any, shape: Any, inverse: Any, weight: Any, mask: Any) -> Any:
    normalized = x.float() * inverse
    scaled = grad.float() * weight.float()
    grad_x = (scaled - normalized * (scaled * normalized).mean(-1, keepdim=True)) * inverse
    return grad_x, (grad.float() * normalized).flatten(0, -2).sum(0)


def _mm_into(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    product = (a.float() @ b.float()).to(out_dtype)
    return product if out is None else out.copy_(product)


def _addmm_into(
    x: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Tensor:
    total = (beta * x.float() + alpha * (a.float() @ b.float())).to(out_dtype)
    return total if out is None else out.copy_(total)


def _scaled_mm(a: Any, b: Any, scale_a: Any, scale_b: Any, *rest: Any, out_dtype: Any = None, **options: Any) -> Tensor:
    return (a.float() @ b.float() * (scale_a * scale_b)).to(out_dtype)


_REPLACED: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "_varlen_attn": _varlen,
    "_varlen_attn_backward": _varlen_backward,
    "_fused_rms_norm_backward": _rms_norm_backward,
    "mm.dtype": _mm_into,
    "mm.dtype_out": _mm_into,
    "addmm.dtype": _addmm_into,
    "addmm.dtype_out": _addmm_into,
    "_scaled_mm": _scaled_mm,
}


def main() -> int:
    assert "NOCUDA_NUMBERS" in os.environ, "set NOCUDA_NUMBERS=1: the device must hand out what the CPU has computed"
    from megatron_synth.cli.main import main as run

    with Numbers(), ordered() if "NOCUDA_ORDER" in os.environ else nullcontext():
        return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
