"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864), the kind that rotates halves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScaledBase:
    """A period base whose frequencies are scaled, so that a model reads longer texts than it was first trained on."""

    base: float
    """Period base."""
    kind: Literal["linear", "llama3", "yarn"]
    """linear: every frequency is divided (Chen et al., 2023, arXiv 2306.15595). llama3: the low ones are, with a smooth
    passage (Llama 3.1, arXiv 2407.21783). yarn: the same idea, by channels, and all scores grow (Peng et al., 2023, arXiv
    2309.00071)."""
    factor: float
    """What frequencies are divided by; as a rule the new length over the old."""
    original_length: int = 0
    """Tokens of the texts that the model was first trained on; for llama3 and yarn."""
    low: float = 1.0
    """llama3: periods of at least original_length / low tokens are scaled. yarn: so are channels of at most this many turns."""
    high: float = 4.0
    """llama3: periods of at most original_length / high tokens stay. yarn: so do channels of at least this many turns."""
    magnitude: float = 1.0
    """Factor of cos and sin."""
    whole_channels: bool = True
    """yarn: the ends of the passage are rounded to whole channels."""

    def scale(self, frequencies: Tensor) -> Tensor:
        """[D / 2] -> [D / 2], in fp32."""
        slow = frequencies / self.factor
        if self.kind == "linear":
            return slow
        if self.kind == "llama3":
            turns = self.original_length * frequencies / (2 * math.pi)
            stays = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        else:
            count = len(frequencies)
            first, last = self._channel(self.high, count), self._channel(self.low, count)
            if self.whole_channels:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, 2 * count - 1)
            places = torch.arange(count, dtype=torch.float32, device=frequencies.device)
            stays = 1 - ((places - first) / (max(last - first, 0) or 0.001)).clamp(0, 1)
        return slow * (1 - stays) + frequencies * stays

    def _channel(self, turns: float, count: int) -> float:
        """Where among `count` frequencies the one is that makes so many turns in `original_length` tokens."""
        return count * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(self.base)


@lru_cache(maxsize=8)
def rotary_tables(
    length: int, channels: int, base: float | ScaledBase, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of position x base^(-2 i / D) for channels i and i + D/2, each [S, 1, 1, D].

    Angles are computed in fp32 and rounded at the end, as in megatron-core and in Hugging Face's Llama.
    """
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
    frequencies = 1.0 / (base.base if isinstance(base, ScaledBase) else base) ** exponents
    magnitude = 1.0
    if isinstance(base, ScaledBase):
        frequencies, magnitude = base.scale(frequencies), base.magnitude
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    angles = torch.cat((angles, angles), dim=-1)[:, None, None, :]
    cos, sin = angles.cos(), angles.sin()
    if magnitude != 1.0:
        cos, sin = cos * magnitude, sin * magnitude
    return cos.to(dtype), sin.to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """The rotation by `sign` times the angle, [S, B, A, D] -> [S, B, A, D] in memory ordered [B, A, S, D]."""
    sequence, batch, heads, channels = x.shape
    half = channels // 2
    # the order in memory that attention reads: a head's tokens one after the other
    out = torch.empty((batch, heads, sequence, channels), dtype=x.dtype, device=x.device).permute(2, 0, 1, 3)
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # the inverse of a rotation is its transpose, and so is the gradient of one that also stretches
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None


def tables_at(
    x: Tensor, base: float | ScaledBase, positions: Tensor | None, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin for x [S, B, A, D] at its positions, [S, 1, 1, D] or, if they are given, [S, B, 1, D]."""
    cos, sin = rotary_tables(length or x.shape[0], x.shape[-1], base, x.dtype, x.device)
    if positions is None:
        return cos, sin
    own = positions.t()
    return cos[:, 0][own], sin[:, 0][own]


def rotary(x: Tensor, base: float | ScaledBase, positions: Tensor | None = None, length: int | None = None) -> Tensor:
    """Rotate channels (i, i + D/2) of the token at position s by s x base^(-2 i / D).

    Args:
        x: [S, B, A, D]; any strides.
        base: period base, or one whose frequencies are scaled.
        positions: [B, S] integers in [0, length). None: each row counts from 0.
        length: with positions, above all of them. Default: S.

    Returns:
        [S, B, A, D], in memory ordered [B, A, S, D].
    """
    return _Rotary.apply(x, *tables_at(x, base, positions, length))  # type: ignore[no-any-return, no-untyped-call]


def rope(
    query: Tensor,
    key: Tensor,
    base: float | ScaledBase,
    positions: Tensor | None = None,
    inplace: bool = False,
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys; see `rotary`.

    Args:
        query: [S, B, A, D]; any strides.
        key: [S, B, G, D]; any strides.
        base: period base, or one whose frequencies are scaled.
        positions: [B, S] integers in [0, length). None: each row counts from 0.
        inplace: a backend may overwrite query and key: nothing else reads them, nor their backward pass. This one does not.
        length: with positions, above all of them. Default: S.

    Returns:
        [S, B, A, D] and [S, B, G, D], in the order in memory that attention reads on the device.
    """
    return rotary(query, base, positions, length), rotary(key, base, positions, length)
