"""Layouts: every possible one is planned, every impossible one is refused with values that work."""

from __future__ import annotations

import itertools
import re

import pytest

from megatron_synth.config.errors import ConfigError
from megatron_synth.config.load import validate
from megatron_synth.config.schema import Config
from megatron_synth.parallel.plan import plan


def config(tensor: int = 1, pipeline: int = 1, virtual: int | None = None, batch: int = 16, micro: int = 2) -> Config:
    return validate(
        Config,
        {
            "model": {"num_layers": 8, "hidden_size": 256, "ffn_hidden_size": 768, "num_attention_heads": 4},
            "data": {"sources": {"web": {"path": "a", "ratio": 1}}},
            "train": {"steps": 9, "global_batch_size": batch, "micro_batch_size": micro, "sequence_length": 128},
            "parallel": {
                "tensor_model_parallel_size": tensor,
                "pipeline_model_parallel_size": pipeline,
                "virtual_pipeline_model_parallel_size": virtual,
            },
        },
        "test",
    )


def with_context(context: int, tensor: int = 1, pipeline: int = 1, sequence_length: int = 128) -> Config:
    base = config(tensor, pipeline)
    parallel = base.parallel.model_copy(update={"context_parallel_size": context})
    return base.model_copy(
        update={"parallel": parallel, "train": base.train.model_copy(update={"sequence_length": sequence_length})}
    )


def test_ranks_that_share_a_sequence_are_part_of_a_copy() -> None:
    layout = plan(with_context(2, tensor=2, pipeline=2), 16)
    assert layout.describe() == "TP2 x CP2 x PP2 x DP2 (SP), 16 ranks, 4 micro-batches"
    assert (layout.data, layout.context, layout.replicas, layout.world_size) == (2, 2, 4, 16)


@pytest.mark.parametrize(
    ("wanted", "world", "message"),
    [
        (with_context(4), 6, "6 ranks are not a multiple of TP1 x CP4 x PP1 = 4 ranks per copy"),
        (
            with_context(2, sequence_length=130),
            2,
            "130 is not divisible by 2 x 2 context-parallel ranks = 4; nearest: 128 or",
        ),
        (
            with_context(2, tensor=4, sequence_length=136),
            8,
            "136 is not divisible by 2 x 2 context-parallel ranks x 4 of sequence parallelism = 16; nearest: 128 or 144",
        ),
    ],
)
def test_a_sequence_that_ranks_cannot_share_is_refused(wanted: Config, world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan(wanted, world)


@pytest.mark.parametrize(
    ("sizes", "world_size", "text"),
    [
        ((2, 2), 4, "TP2 x PP2 x DP1 (SP), 4 ranks, 8 micro-batches"),
        ((1, 1), 1, "TP1 x PP1 x DP1, 1 rank, 8 micro-batches"),
        ((1, 1), 8, "TP1 x PP1 x DP8, 8 ranks, 1 micro-batch"),
        ((2, 2, 2), 8, "TP2 x PP2 x VP2 x DP2 (SP), 8 ranks, 4 micro-batches"),
    ],
)
def test_a_layout_is_described_in_one_line(sizes: tuple[int, ...], world_size: int, text: str) -> None:
    assert plan(config(*sizes), world_size).describe() == text


def test_every_planned_layout_adds_up_and_every_refusal_has_a_reason() -> None:
    planned = 0
    choices = itertools.product((1, 2, 4), (1, 2, 4), (None, 2), (8, 12), range(1, 17))
    for tensor, pipeline, virtual, batch, world in choices:
        wanted = config(tensor, pipeline, virtual, batch, 1)
        data, rest = divmod(world, tensor * pipeline)
        possible = rest == 0 and batch % data == 0 and (virtual is None or (pipeline > 1 and batch // data % pipeline == 0))
        if not possible:
            with pytest.raises(ConfigError):
                plan(wanted, world)
            continue
        layout = plan(wanted, world)
        planned += 1
        assert layout.world_size == world
        assert layout.data * layout.num_microbatches == batch
        assert layout.layers_per_chunk * layout.virtual * layout.pipeline == 8
        assert layout.sequence_parallel == (tensor > 1)
    assert planned > 50


def test_wrong_numbers_of_ranks_name_the_nearest_that_work() -> None:
    with pytest.raises(ConfigError, match=r"6 ranks are not a multiple of TP2 x PP2 = 4 .* nearest: 4 or 8 ranks"):
        plan(config(2, 2), 6)
    with pytest.raises(ConfigError, match="nearest: 4 ranks"):
        plan(config(2, 2), 3)
    with pytest.raises(
        ConfigError, match=r"1 rank is not a multiple of .* nearest: 4 ranks; start them by `launch/local.sh 4 CONFIG`"
    ):
        plan(config(2, 2), 1)


def test_the_advised_batch_sizes_work() -> None:
    for wanted, world in ((config(batch=18), 4), (config(1, 2, 2, batch=18), 2), (config(1, 4, 2, batch=20), 8)):
        with pytest.raises(ConfigError) as caught:
            plan(wanted, world)
        [problem] = caught.value.problems
        assert problem.path == "train.global_batch_size"
        advised = [int(number) for number in re.findall(r"\d+", problem.message.split("nearest:")[1])]
        assert advised
        for batch in advised:
            train = wanted.train.model_copy(update={"global_batch_size": batch})
            assert plan(wanted.model_copy(update={"train": train}), world).num_microbatches >= 1


def test_broken_rules_are_reported_with_the_layout() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(config(8, 3), 25)
    paths = {problem.path for problem in caught.value.problems}
    assert paths == {"parallel", "parallel.tensor_model_parallel_size", "model.num_layers"}
