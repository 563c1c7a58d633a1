"""What torch.compile makes of the elementwise operations, against fp64 and beside the plain versions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_synth_kernels.registry import COMPILE, OPERATIONS
from megatron_synth_kernels.torch import norm, rope, swiglu

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]], dtype=torch.int32)


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    """Every second column of a wider tensor."""
    return torch.randn(*shape[:-1], shape[-1] * 2).to(dtype)[..., ::2].detach().requires_grad_()


def norm_in_fp64(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    # the norm is that of the sum as it is stored
    total = x + residual
    return total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight, total


CASES: dict[str, tuple[list[tuple[int, ...]], Any, Any]] = {
    "rms_norm_residual": (
        [(3, 2, 40), (3, 2, 40), (40,)],
        lambda run, x, residual, weight: run(x, residual, weight, 1e-5),
        norm_in_fp64,
    ),
    "swiglu": (
        [(5, 2, 34)],
        lambda run, x: (run(x),),
        lambda x: (swiglu.swiglu(x),),
    ),
    "rope": (
        [(7, 2, 3, 8), (7, 2, 3, 8)],
        lambda run, query, key: run(query, key, 100.0, POSITIONS),
        lambda query, key: rope.rope(query, key, 100.0, POSITIONS),
    ),
}


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, inputs, [grad.to(out.dtype) for grad, out in zip(given, outputs, strict=True)]))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CASES), ("rms_norm_residual", torch.bfloat16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_the_compiled_operation_is_the_defined_one(name: str, dtype: torch.dtype) -> None:
    backend = OPERATIONS[name].backend(COMPILE)
    problem = backend.why_not(CPU, dtype)
    if problem is not None:
        pytest.skip(problem)
    torch.manual_seed(0)
    shapes, call, definition = CASES[name]
    inputs = [leaf(*shape, dtype=dtype) for shape in shapes]
    wide = [value.detach().double().requires_grad_() for value in inputs]
    found, expected = call(backend.load(), *inputs), definition(*wide)
    given = [torch.randn(out.shape).to(dtype) for out in found]
    pairs = zip([*found, *gradients(found, inputs, given)], [*expected, *gradients(expected, wide, given)], strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == dtype
        scale = theirs.abs().max().clamp(min=1).item()
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=TOLERANCE[dtype] * scale)
    if name == "rms_norm_residual":
        assert torch.equal(found[1], norm.rms_norm_residual(*inputs, 1e-5)[1])
