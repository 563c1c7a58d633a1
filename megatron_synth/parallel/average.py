"""An exponential average of the weights, kept beside the optimizer's own: each rank has that of the values that it updates.

After every update, e <- d e + (1 - d) w in fp32, from the fp32 weights that Adam works on; before the first, e = w. A step that
is skipped leaves it. It is elementwise, so it is the same in every layout in which the weights are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

Range = tuple[torch.nn.Parameter, int, int, Tensor]
"""A parameter of this rank's model, and the values [begin, end) of it, flat, in fp32."""


class Average:
    """The average of this rank's part of the weights."""

    def __init__(self, chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer, decay: float):
        """Begin with the weights as they are. decay: d."""
        (self._inner,) = optimizer.chained_optimizers
        self._chunks, self._decay = chunks, decay
        self._places = list(places(self._inner))
        self._weights = [weights for *_, weights in self._places]
        self._values = [weights.detach().clone() for weights in self._weights]

    @property
    def ranges(self) -> Iterator[Range]:
        """What this rank has of it."""
        for (parameter, begin, end, _), values in zip(self._places, self._values, strict=True):
            yield parameter, begin, end, values.view(-1)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an update."""
        if self._values:
            torch._foreach_lerp_(self._values, [weights.detach() for weights in self._weights], 1.0 - self._decay)

    @contextmanager
    def as_weights(self) -> Iterator[None]:
        """Within, the model has it for weights. To be entered by all ranks, with every rank's weights whole."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weights, values in zip(self._weights, self._values, strict=True):
            kept = weights.detach().clone()
            weights.data.copy_(values)
            values.copy_(kept)
        if hasattr(self._inner, "_copy_main_params_to_model_params"):  # else the weights are the model's own
            self._inner._copy_main_params_to_model_params()
        if isinstance(self._inner, DistributedOptimizer):
            for chunk in self._chunks:
                chunk.start_param_sync(force_sync=True)


def places(inner: object) -> Iterator[Range]:
    """Each parameter with the part of it that this rank's optimizer updates, as that holds it."""
    if isinstance(inner, DistributedOptimizer):
        for ranges in inner.gbuf_ranges:
            for buckets in ranges.values():
                for bucket in buckets:
                    for parameter, place in bucket["param_map"].items():
                        group, order = inner.model_param_group_index_map[parameter]
                        weights = inner.optimizer.param_groups[group]["params"][order]
                        yield parameter, place["param"].start, place["param"].end, weights
        return
    halves = zip(getattr(inner, "float16_groups", ()), getattr(inner, "fp32_from_float16_groups", ()), strict=True)
    for models, mains in halves:
        for parameter, weights in zip(models, mains, strict=True):
            yield parameter, 0, parameter.numel(), weights
    whole = getattr(inner, "fp32_from_fp32_groups", None)
    if whole is None:
        whole = [group["params"] for group in inner.optimizer.param_groups]  # type: ignore[attr-defined]
    for group in whole:
        for parameter in group:
            yield parameter, 0, parameter.numel(), parameter
