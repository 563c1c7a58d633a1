"""Tokens drawn with a seed for each row of a batch: what a row gets depends on its own seed and probabilities alone.

`generate` of transformers draws for the whole batch from one generator, so that a text depends on its neighbors. Here the
library decodes greedily, and this processor, the last one, puts the drawn token where the greatest score is looked for: the
token at which the cumulative probability passes a uniform number, of which each row has its own sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def uniforms(seeds: Sequence[int], steps: int) -> np.ndarray:
    """Numbers of [0, 1) by row and step [B, T], fp64; a row's are those of Philox with its seed as the key."""
    return np.stack([np.random.Generator(np.random.Philox(key=seed)).random(steps) for seed in seeds])


class SeededDraw:
    """A logits processor: scores [B, V] become 0 at the drawn token and -inf elsewhere.

    temperature 0 leaves the most likely token; top_k and top_p are those of transformers.
    """

    def __init__(self, seeds: Sequence[int], steps: int, temperature: float, top_p: float, top_k: int, device: Any):
        import torch
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self._greedy = temperature == 0
        self._uniforms = torch.from_numpy(uniforms(seeds, steps)).to(device)
        self._warpers: list[Any] = []
        if not self._greedy:
            if temperature != 1:
                self._warpers.append(TemperatureLogitsWarper(temperature))
            if top_k:
                self._warpers.append(TopKLogitsWarper(top_k))
            if top_p < 1:
                self._warpers.append(TopPLogitsWarper(top_p))
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called once for each token."""
        import torch

        if self._greedy:
            return scores
        scores = scores.float()
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        cumulative = torch.softmax(scores, -1, dtype=torch.float64).cumsum(-1)
        wanted = self._uniforms[:, self._step, None] * cumulative[:, -1:]
        self._step += 1
        # right: a token without probability has the sum of the one before it, and must not be found
        token = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)
