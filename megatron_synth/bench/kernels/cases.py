"""The operations that `bench kernels` times: their inputs, what must be moved or computed, and baselines from elsewhere.

Bytes are the least that an operation can move: each input read once, each output written once. FLOPs of causal attention are
those of the half that is not masked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_synth.model.kernels import Sizes

EPS = 1e-5
BASE = 10_000.0


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    inputs: makes a set of tensors; those that require gradients get them.
    call: (implementation, inputs) -> outputs.
    baselines: name -> a function that makes an implementation, or raises when it cannot.
    forward, backward: bytes moved or, where `flops`, operations; backward 0: there is none.
    """

    operation: str
    sizes: Sizes
    inputs: Callable[[], tuple[Tensor, ...]]
    call: Callable[[Any, tuple[Tensor, ...]], tuple[Tensor, ...]]
    baselines: dict[str, Callable[[], Any]]
    forward: float
    backward: float = 0.0
    flops: bool = False


def cases(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Every case of one model's sizes."""
    s, n, width = sizes, sizes.tokens, dtype.itemsize

    def new(*shape: int, leaf: bool = True, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=kind, device=device).requires_grad_(leaf)

    row = n * s.hidden * width
    yield Case(
        "rms_norm",
        s,
        lambda: (new(n, 1, s.hidden), new(s.hidden)),
        lambda run, x: (run(*x, EPS),),
        {"eager": lambda: eager_norm, "liger": liger_norm},
        2 * row,
        3 * row,
    )
    yield Case(
        "rms_norm_residual",
        s,
        lambda: (new(n, 1, s.hidden), new(n, 1, s.hidden), new(s.hidden)),
        lambda run, x: tuple(run(*x, EPS)),
        {"eager": lambda: eager_residual, "liger": liger_residual},
        4 * row,
        4 * row,
    )
    row = n * s.ffn * width
    yield Case(
        "swiglu",
        s,
        lambda: (new(n, 1, 2 * s.ffn),),
        lambda run, x: (run(*x),),
        {"eager": lambda: eager_swiglu, "liger": liger_swiglu},
        3 * row,
        5 * row,
    )
    scale = torch.ones((), device=device)
    yield Case(
        "quantise_fp8",  # one scale, both orders
        s,
        lambda: (new(n, s.hidden, leaf=False),),
        lambda run, x: run(*x, scale),
        {"eager": lambda: eager_quantize, "compile": partial(compiled, eager_quantize)},
        n * s.hidden * (width + 2),
    )
    yield Case(
        "rms_norm_quantise",
        s,
        lambda: (new(n, s.hidden, leaf=False), new(s.hidden, leaf=False)),
        lambda run, x: run(*x, scale),
        {"eager": lambda: eager_norm_quantize, "compile": partial(compiled, eager_norm_quantize)},
        n * s.hidden * (width + 2),
    )
    yield Case(
        "swiglu_quantise",  # the output, then the gradient of the input
        s,
        lambda: (new(n, 2 * s.ffn, leaf=False), new(n, s.ffn, leaf=False)),
        lambda run, x: run(*x, scale),
        {"eager": lambda: eager_swiglu_quantize, "compile": partial(compiled, eager_swiglu_quantize)},
        n * s.ffn * (2 * width + 2 + 3 * width + 4),
    )
    heads = n * (s.heads + s.groups) * s.head_dim * width
    yield Case(
        "rope",
        s,
        lambda: (new(n, 1, s.heads, s.head_dim), new(n, 1, s.groups, s.head_dim)),
        lambda run, x: tuple(run(*x, BASE)),
        {"eager": lambda: eager_rope},
        2 * heads,
        2 * heads,
    )
    score_scale = s.head_dim**-0.5
    products = 2.0 * n * n * s.heads * s.head_dim
    yield Case(
        "attention",
        s,
        lambda: (new(n, 1, s.heads, s.head_dim), *(new(n, 1, s.groups, s.head_dim) for _ in range(2))),
        lambda run, x: (run(*x, score_scale),),
        {"eager": lambda: eager_attention},
        products,
        2.5 * products,
        flops=True,
    )
    labels = torch.randint(0, s.vocabulary, (n,), device=device)
    yield Case(
        "cross_entropy",
        s,
        lambda: (new(n, s.vocabulary, leaf=False),),
        lambda run, x: run(x[0], labels),
        {
            "eager": lambda: eager_cross_entropy,
            "compile": compiled_cross_entropy,
            "liger": liger_cross_entropy,
            "megatron": megatron_cross_entropy,
        },
        3 * n * s.vocabulary * width,
    )
    weights = s.hidden * s.ffn
    yield Case(
        "adam",
        s,
        lambda: tuple(new(weights, leaf=False, kind=torch.float32) for _ in range(2)),
        lambda run, x: run(*x),
        {"eager": lambda: partial(adam_step, torch.optim.AdamW)},
        28.0 * weights,
    )
    yield Case(
        "wgrad",
        s,
        lambda: (
            new(n, s.hidden, leaf=False),
            new(n, s.ffn, leaf=False),
            new(s.ffn, s.hidden, leaf=False, kind=torch.float32),
        ),
        lambda run, x: (run(*x),),
        {"eager": lambda: eager_wgrad},
        2.0 * n * weights,
        flops=True,
    )


def compiled(function: Callable[..., Any]) -> Any:
    """torch.compile of an eager definition."""
    return torch.compile(function)


def _library(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"{name} is not installed")
    if not torch.cuda.is_available():
        raise RuntimeError("needs a CUDA device")


def eager_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm as models spell it out."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def eager_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Addition, then RMSNorm."""
    total = x + residual
    return eager_norm(total, weight, eps), total


def eager_swiglu(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def eager_quantize(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both orders and the largest magnitude, as spelled out."""
    row = (x.float() * scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return row, row.t().contiguous(), x.abs().amax().float()


def eager_norm_quantize(x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm in fp32, rounded, then quantized: one rounding, as the definition has it."""
    wide = x.float()
    return eager_quantize((wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight).to(x.dtype), scale)


def eager_swiglu_quantize(gate_and_up: Tensor, grad: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """SwiGLU in fp32, rounded, then quantized; and the gradient of its input so."""
    gate, up = gate_and_up.float().chunk(2, dim=-1)
    sigmoid, wide = torch.sigmoid(gate), grad.float()
    to_gate = wide * up * sigmoid * (1 + gate * (1 - sigmoid))
    gradient = torch.cat((to_gate, wide * gate * sigmoid), dim=-1).to(grad.dtype)
    return *eager_quantize((gate * sigmoid * up).to(grad.dtype), scale), *eager_quantize(gradient, scale)


def eager_rope(query: Tensor, key: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """Rotation with the halves swapped by concatenation, as models spell it out."""
    length, half = query.shape[0], query.shape[-1] // 2
    exponents = torch.arange(half, device=query.device, dtype=torch.float32) / half
    angles = torch.outer(torch.arange(length, device=query.device, dtype=torch.float32), base**-exponents)
    angles = torch.cat((angles, angles), dim=-1)[:, None, None, :]
    cos, sin = angles.cos().to(query.dtype), angles.sin().to(query.dtype)

    def turn(x: Tensor) -> Tensor:
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    return turn(query), turn(key)


def eager_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention with its S x S scores in memory."""
    length, _, heads, _ = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (key, value))
    scores = torch.einsum("sbad,tbad->bast", query, key) * scale
    mask = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    weights = scores.masked_fill(mask, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
    return torch.einsum("bast,tbad->sbad", weights, value).flatten(2)


def adam_step(optimizer: Any, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The second and later steps of an optimizer class on one tensor; it is made at the first call for that tensor."""
    made = _OPTIMIZERS.setdefault((optimizer, weight.data_ptr()), None)
    if made is None:
        weight.grad = grad
        made = _OPTIMIZERS[optimizer, weight.data_ptr()] = optimizer([weight], lr=1e-5)
    made.step()
    return (weight,)


_OPTIMIZERS: dict[Any, Any] = {}


def forget_optimizers() -> None:
    """Release the optimizers of `adam_step`, and their states."""
    _OPTIMIZERS.clear()


def eager_wgrad(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> Tensor:
    """A product, and then a sum."""
    return main_grad.add_(grad_output.t() @ inputs)


def two_passes(stats: Any, grad: Any) -> Any:
    """Loss and gradient by the two elementwise passes; the gradient takes the logits' place."""

    def run(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        maximum, total, own = stats(logits, labels, 0)
        log_sum_exp = maximum + total.log()
        scale = torch.full_like(log_sum_exp, 1.0 / len(labels))
        return log_sum_exp - own, grad(logits, labels, 0, log_sum_exp, scale, 0.0)

    return run


def _with_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Loss per token and gradient of their mean."""

    def run(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        leaf = logits.detach().requires_grad_()
        losses = loss(leaf, labels)
        (gradient,) = torch.autograd.grad(losses, leaf, torch.full_like(losses, 1.0 / len(labels)))
        return losses.detach(), gradient

    return run


def eager_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """torch's cross-entropy on fp32 logits, as models spell it out."""
    run = _with_gradient(lambda x, y: F.cross_entropy(x.float(), y, reduction="none"))
    return run(logits, labels)  # type: ignore[no-any-return]


def compiled_cross_entropy() -> Any:
    """torch.compile of torch's cross-entropy."""
    return _with_gradient(torch.compile(lambda x, y: F.cross_entropy(x.float(), y, reduction="none")))


def megatron_cross_entropy() -> Any:
    """megatron-core's fused vocabulary-parallel cross-entropy, on a group of one."""
    if not torch.cuda.is_available():
        raise RuntimeError("needs a CUDA device")
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    group = torch.distributed.group.WORLD
    return _with_gradient(lambda x, y: fused_vocab_parallel_cross_entropy(x[:, None], y[:, None], group).squeeze(1))


def liger_norm() -> Any:
    """Liger-Kernel's RMSNorm; it takes the incoming gradient's memory for its own."""
    _library("liger_kernel")
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, weight, eps: LigerRMSNormFunction.apply(x, weight, eps)  # type: ignore[no-untyped-call]


def liger_residual() -> Any:
    """Liger-Kernel's addition and RMSNorm."""
    _library("liger_kernel")
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda x, residual, weight, eps: LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps)  # type: ignore[no-untyped-call]


def liger_swiglu() -> Any:
    """Liger-Kernel's SwiGLU, which takes two tensors."""
    _library("liger_kernel")
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda x: LigerSiLUMulFunction.apply(*(part.contiguous() for part in x.chunk(2, dim=-1)))  # type: ignore[no-untyped-call]


def liger_cross_entropy() -> Any:
    """Liger-Kernel's cross-entropy: loss and gradient in one call, the gradient in the logits' memory."""
    _library("liger_kernel")
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        out = LigerCrossEntropyFunction.apply(logits, labels, None, -100, 0.0, 0.0, "none")  # type: ignore[no-untyped-call]
        return out[0]  # type: ignore[no-any-return]

    return _with_gradient(loss)
