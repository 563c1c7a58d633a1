"""The attention of `causal.py`, held to one kernel: if it cannot be had there is an error, and never another in its place.

torch's own choice is cuDNN's on compute capability 9.0 and 10.0, where its cuDNN is above 9.15, then FlashAttention 2, then
kernels that take fp32 or write the scores (`check_prefer_cudnn_attention` in sdp_utils.cpp, torch 2.11 to 2.13). Its function
for sequences of unequal length is FlashAttention in either of them (`_should_use_cudnn` in varlen.py is False).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_synth_kernels.torch.attention.causal import causal_attention


def cudnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
) -> Tensor:
    """As attention.causal_attention, by cuDNN; whole rows only."""
    assert cu_seqlens is None and window is None, "cuDNN's attention is for whole rows"
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return causal_attention(query, key, value, scale)


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
) -> Tensor:
    """As attention.causal_attention, by torch's FlashAttention: 2, or 3 where it has been activated."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return causal_attention(query, key, value, scale, cu_seqlens, max_seqlen, window)


def why_not_cudnn(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch would not take cuDNN's attention on this device; None if it would."""
    if dtype != torch.bfloat16:
        return "takes bf16"
    if os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED"):
        return "TORCH_CUDNN_SDPA_DEPRIORITIZED is set"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) not in ((9, 0), (10, 0)):
        return f"needs compute capability 9.0 or 10.0, this device has {major}.{minor}"
    found = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if found is None or found <= 91500:
        return f"needs cuDNN above 9.15, found {found or 'none'}"
    return None


def why_not_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there is no FlashAttention for this data type."""
    return None if dtype == torch.bfloat16 else "takes bf16"


def why_not_heads(channels: int) -> str | None:
    """Why none of them takes heads of so many channels; None if they do."""
    if channels % 8 or channels > 256:
        return f"takes heads of a multiple of 8 and at most 256 channels, not {channels}"
    return None
