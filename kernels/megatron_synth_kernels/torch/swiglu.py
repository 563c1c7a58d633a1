"""SwiGLU (Shazeer, 2020, arXiv 2002.05202): the gated activation between the two linear layers of an MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up, with silu(x) = x / (1 + exp(-x)).

    Args:
        gate_and_up: [..., 2F], the gate in the first half of the last axis.

    Returns:
        [..., F].
    """
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up
