"""Which tokens of a row a rank has where ranks share the sequence.

S tokens of a row, c context-parallel ranks: a row is 2 c chunks, of which a rank has an early one and a late one, so that
causal attention is as much work for each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_synth_kernels.torch.attention.context import chunks_of


@dataclass(frozen=True)
class SequencePart:
    """A rank's part of every row."""

    rank: int = 0
    """Among the ranks that share the sequence."""
    size: int = 1
    """How many share it."""

    def take(self, whole: Tensor) -> Tensor:
        """[B, S, ...] -> [B, S / c, ...], the early chunk and the late one; of one rank, `whole` itself."""
        if self.size == 1:
            return whole
        chunks = whole.unflatten(1, (2 * self.size, -1))
        return torch.cat([chunks[:, chunk] for chunk in chunks_of(self.rank, self.size)], dim=1)

    def put(self, part: Tensor) -> Tensor:
        """[B, S / c, ...] -> [B, S, ...], zeros elsewhere: the inverse of `take`."""
        if self.size == 1:
            return part
        halves = part.unflatten(1, (2, -1))
        whole = part.new_zeros((len(part), 2 * self.size, *halves.shape[2:]))
        for place, chunk in enumerate(chunks_of(self.rank, self.size)):
            whole[:, chunk] = halves[:, place]
        return whole.flatten(1, 2)


WHOLE = SequencePart()
"""The part of a rank that shares the sequence with none."""
