"""SwiGLU and its gradient where the results are only ever there in FP8: the definition, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_synth_kernels.torch.fp8 import Source
from megatron_synth_kernels.torch.swiglu import swiglu


class SwiGLU(Source):
    """swiglu(gate_and_up [N, 2F]) -> [N, F], to be quantized."""

    def __init__(self, gate_and_up: Tensor):
        self._x = gate_and_up

    def _make(self) -> Tensor:
        return swiglu(self._x)


class SwiGLUGradient(Source):
    """The gradient of gate_and_up [N, 2F], from that of the output [N, F], to be quantized."""

    def __init__(self, grad: Tensor, gate_and_up: Tensor):
        self._grad, self._x = grad, gate_and_up

    def _make(self) -> Tensor:
        with torch.enable_grad():  # so that it has the bits of an operation that is not fused
            leaf = self._x.detach().requires_grad_()
            (result,) = torch.autograd.grad(swiglu(leaf), leaf, self._grad)
        return result
