"""Operations of NVIDIA's apex behind our signatures. (PyPI's package named apex is something else.)"""

from __future__ import annotations

from apex.normalization.fused_layer_norm import fused_rms_norm_affine
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As norm.rms_norm: x [..., H], weight [H] -> [..., H]."""
    return fused_rms_norm_affine(x.contiguous(), weight.to(x.dtype), weight.shape, eps)  # type: ignore[no-any-return]
