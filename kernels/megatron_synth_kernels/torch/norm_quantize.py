"""RMSNorm whose output is only ever there in FP8: the definition, in torch."""

from __future__ import annotations

from torch import Tensor

from megatron_synth_kernels.torch import norm
from megatron_synth_kernels.torch.fp8 import Source


class Normalized(Source):
    """rms_norm(x, weight, eps) of x [N, H], to be quantized."""

    def __init__(self, x: Tensor, weight: Tensor, eps: float):
        self._x, self._weight = x, weight
        self.inverse = norm.inverse_rms(x.float(), eps)
        """[N, 1] fp32, for `gradients`."""

    def _make(self) -> Tensor:
        return (self._x.float() * self.inverse * self._weight).to(self._x.dtype)


def gradients(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Of x [N, H] and of the weight [H], from that of the output and the `inverse` of the forward pass."""
    return norm.gradients(grad, x.float() * inverse, inverse, weight, x.dtype)
