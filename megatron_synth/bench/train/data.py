"""Batches as training gets them: read by the loader, ahead of the step, and counted with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import overload

import torch

from megatron_synth.config.schema import Config
from megatron_synth.data.loading.prefetch import Prefetcher
from megatron_synth.data.loading.run_data import RunData, open_data
from megatron_synth.parallel.groups import Ranks
from megatron_synth.parallel.plan import Layout
from megatron_synth.train.batch import TensorBatch, part_of, prefetcher_of, to_device


class RealBatches(Sequence[Sequence[TensorBatch]]):
    """The steps of a run, one after another whatever the index: each is read when it is asked for."""

    def __init__(self, config: Config, prefetcher: Prefetcher, ranks: Ranks):
        self._config, self._prefetcher, self._ranks = config, prefetcher, ranks
        self._samples = self._steps = 0

    def __len__(self) -> int:
        return self._config.train.steps

    @overload
    def __getitem__(self, index: int) -> Sequence[TensorBatch]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sequence[TensorBatch]]: ...
    def __getitem__(self, index: int | slice) -> Sequence[TensorBatch] | Sequence[Sequence[TensorBatch]]:
        assert isinstance(index, int)
        with torch.profiler.record_function("data loading"):
            batches = [
                to_device(batch, self._ranks.device, self._config.data, part=part_of(self._ranks, self._config))
                for batch in self._prefetcher.step(self._samples)
            ]
        self._samples += self._config.samples_of_step(self._steps)
        self._steps += 1
        return batches


def with_data(config: Config, steps: int) -> tuple[Config, RunData]:
    """The configuration of a run of `steps` steps with the vocabulary of its sources, and these, opened."""
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
    data = open_data(config)
    model = config.model.model_copy(update={"vocab_size": data.vocab_size})
    return config.model_copy(update={"model": model}), data


@contextmanager
def real_batches(
    config: Config, layout: Layout, ranks: Ranks, data: RunData, *, read_ahead: bool = True
) -> Iterator[RealBatches]:
    """The loader of a run from its first sample; `config.train.steps` must suffice for all that is timed."""
    with prefetcher_of(config, layout, ranks, data, read_ahead=read_ahead) as prefetcher:
        yield RealBatches(config, prefetcher, ranks)
