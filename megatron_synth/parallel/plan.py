"""From parallel sizes and a number of ranks to a checked layout. Pure arithmetic: no torch, no ranks needed."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_synth.config.errors import ConfigError, Problem
from megatron_synth.config.rules import batch_sizes, check, nearest_multiples
from megatron_synth.config.schema import Config


@dataclass(frozen=True)
class Layout:
    """How the ranks share the work."""

    tensor: int
    """Ranks that share each layer's matrices."""
    pipeline: int
    """Stages that share the layers."""
    virtual: int
    """Model chunks per stage; 1 without interleaving."""
    data: int
    """Copies of the model."""
    num_microbatches: int
    """Micro-batches of each copy in an optimizer step."""
    layers_per_stage: int
    """Layers of one stage, over all its chunks."""
    sequence_parallel: bool
    """Whether norms and residuals are split over the tensor-parallel ranks."""
    context: int = 1
    """Ranks that share each sequence."""

    @classmethod
    def single(cls) -> Layout:
        """One process that holds whole tensors: for tools that train nothing."""
        return cls(1, 1, 1, 1, num_microbatches=1, layers_per_stage=1, sequence_parallel=False)

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, and share the optimizer's states."""
        return self.context * self.data

    @property
    def layers_per_chunk(self) -> int:
        """Layers of one model chunk."""
        return self.layers_per_stage // self.virtual

    def describe(self) -> str:
        """One line, such as `TP2 x PP2 x DP1 (SP), 4 ranks, 8 micro-batches`."""
        sizes = [f"TP{self.tensor}", f"PP{self.pipeline}", f"DP{self.data}"]
        if self.virtual > 1:
            sizes.insert(2, f"VP{self.virtual}")
        if self.context > 1:
            sizes.insert(1, f"CP{self.context}")
        text = " x ".join(sizes) + (" (SP)" if self.sequence_parallel else "")
        return f"{text}, {_count(self.world_size, 'rank')}, {_count(self.num_microbatches, 'micro-batch')}"


def plan(config: Config, world_size: int) -> Layout:
    """The layout of `config` on `world_size` ranks.

    Raises:
        ConfigError: with every reason why it cannot be, those of `config.rules` included, and the nearest sizes
            that can.
    """
    assert world_size >= 1
    parallel, train = config.parallel, config.train
    tensor, pipeline, chunks = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_stages,
    )
    context = parallel.context_parallel_size
    problems = check(config)
    copy = tensor * context * pipeline
    data, rest = divmod(world_size, copy)
    if rest:
        shared = f" x CP{context}" if context > 1 else ""
        size = f"TP{tensor}{shared} x PP{pipeline} = {copy} ranks per copy of the model"
        message = f"{world_size} ranks are not a multiple of {size}"
        problems.append(Problem("parallel", f"{message}; nearest: {nearest_multiples(world_size, copy)} ranks"))
        raise ConfigError(f"{_count(world_size, 'rank')}", problems)

    micro = train.micro_batch_size
    per_round = micro * data
    for key, batch in batch_sizes(config):
        if batch % per_round:
            # a batch that the micro-batch does not divide is already among the problems of the rules
            if batch % micro == 0:
                message = f"{batch} is not divisible by micro_batch_size {micro} x {data} data-parallel ranks = {per_round}"
                problems.append(Problem(key, f"{message}; nearest: {nearest_multiples(batch, per_round)}"))
        elif chunks > 1 and (batch // per_round) % pipeline:
            message = (
                f"{batch} gives {_count(batch // per_round, 'micro-batch')} per step, but the interleaved schedule needs "
                f"a multiple of the {pipeline} pipeline stages"
            )
            problems.append(Problem(key, f"{message}; nearest: {nearest_multiples(batch, per_round * pipeline)}"))
    if problems:
        raise ConfigError(f"{_count(world_size, 'rank')}", problems)
    return Layout(
        tensor=tensor,
        pipeline=pipeline,
        virtual=chunks,
        data=data,
        num_microbatches=train.global_batch_size // per_round,
        layers_per_stage=config.model.num_layers // pipeline,
        sequence_parallel=parallel.uses_sequence_parallel,
        context=context,
    )


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{number} {noun if number == 1 else plural}"
