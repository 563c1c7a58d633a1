"""What FP8 makes of the tensors of its layers: largest magnitudes, scales, what is lost (`precision.fp8_log_every`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_synth.model import ops
from megatron_synth.model.ops import Quantized


class Statistics:
    """What a rank has seen while `observing`."""

    def __init__(self) -> None:
        self.observing = False
        """Whether this step is watched."""
        self.saturated: dict[str, float] = {}
        """By layer, of what was last observed: the share of the numbers of all its tensors that were cut to the format's
        largest. Tensors that exist in FP8 alone are not in it."""
        self._seen: dict[tuple[str, str], Tensor] = {}

    def add(self, layer: str, role: str, x: Tensor, quantized: Quantized) -> None:
        """Take in a tensor x [N, K] of a layer, and what it was quantized to."""
        largest = ops.fp8.LARGEST[quantized.data.dtype]
        back = quantized.dequantized()
        numbers = x != 0
        # block scales fit their blocks; the tolerance is for the rounding of the scale and its inverse
        scale = quantized.scale
        reach = largest * scale * (1 + 2.0**-20) if quantized.block is None else torch.inf
        if quantized.block is not None:  # blocks of zeros, and what pads the scales, have 1, which means nothing
            rows, columns = quantized.block
            filled = numbers.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns).any(dim=3).any(dim=1)
            scale = torch.where(filled, scale[:, : filled.shape[1]], 0.0)
            scale = torch.where(filled.any(), scale, 1.0)
        counts = [numbers.sum(), ((back == 0) & numbers).sum(), (x.abs().float() > reach).sum()]
        self._merge(layer, role, [x.abs().max(), 1.0 / scale.max().double(), *counts])

    def add_quantized(self, layer: str, role: str, amax: Tensor, scale: Tensor) -> None:
        """Take in a tensor of which only the quantized numbers exist: what was lost is not known."""
        self._merge(layer, role, [amax, scale])

    def has(self, layer: str, role: str) -> bool:
        """Whether that tensor was seen in this step."""
        return (layer, role) in self._seen

    def _merge(self, layer: str, role: str, parts: list[Tensor]) -> None:
        seen = torch.stack([part.reshape(()).double() for part in parts])
        known = self._seen.setdefault((layer, role), seen)
        if known is not seen:
            known[0] = torch.maximum(known[0], seen[0])
            known[1] = torch.minimum(known[1], seen[1])
            known[2:] += seen[2:]

    def observed(self) -> dict[str, float]:
        """What all ranks have seen of all layers since `observing` was set; clears it. Called by all ranks, which wait.

        Returns:
            `fp8/<layer>/<tensor>/` + `amax`, `scale` (the largest block's, where there are several), `underflow` (share of
            the numbers other than 0 that became 0) and `overflow` (share that was cut to the format's largest number). The
            last two are left out of tensors that exist in FP8 alone.
        """
        mine = [(layer, role, seen.tolist()) for (layer, role), seen in self._seen.items()]
        self._seen.clear()
        self.observing = False
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, mine)
        merged: dict[tuple[str, str], list[float]] = {}
        for layer, role, (amax, scale, *counts) in (entry for part in ranks for entry in part):
            known = merged.setdefault((layer, role), [amax, scale, *(0.0 for _ in counts)])
            known[:2] = max(known[0], amax), min(known[1], scale)
            known[2:] = [a + b for a, b in zip(known[2:], counts, strict=True)]
        result: dict[str, float] = {}
        cut: dict[str, list[float]] = {}
        for (layer, role), (amax, scale, *counts) in sorted(merged.items()):
            values = {"amax": amax, "scale": scale}
            if counts:
                numbers, under, over = counts
                sums = cut.setdefault(layer, [0.0, 0.0])
                sums[0], sums[1] = sums[0] + over, sums[1] + numbers
                values |= {"underflow": under / max(numbers, 1.0), "overflow": over / max(numbers, 1.0)}
            for key, value in values.items():
                result[f"fp8/{layer}/{role}/{key}"] = value
        self.saturated = {layer: over / max(numbers, 1.0) for layer, (over, numbers) in cut.items()}
        return result
