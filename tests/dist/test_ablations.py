"""What must not happen in a step, and what must not change it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from megatron_synth.train.garbage import ManualCollection
from tests.dist.conftest import Run
from tests.dist.pool import RankPool
from tests.support import assert_same_losses

SMALL = ["model.num_layers=4", "model.hidden_size=64", "train.sequence_length=32", "model.vocab_size=256"]
LAYOUTS = {
    "single": (1, []),
    "single bf16 selective": (1, ["precision.dtype=bf16", "train.recompute=selective"]),
    "tp2pp2": (4, ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_host_waits_once_per_step(ranks: RankPool, layout: str) -> None:
    """For gradient norm, loss and stop flag together, whatever the number of micro-batches."""
    world_size, more = LAYOUTS[layout]
    for result in ranks.run(world_size, "tests.dist.ablations.host_waits", [*SMALL, *more]):
        assert result.value == {"tolist": 1}


@pytest.mark.parametrize("layout", ["single", "tp2pp2vp2"])
@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_changes_no_bit(trained: Callable[..., Run], layout: str, how: str) -> None:
    assert_same_losses(trained(layout, f"train.recompute={how}").records, trained(layout).records, rtol=0)


TENSOR, PIPELINE = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
# of 4 layers and 2 micro-batches (4 in a pipeline): norms by themselves, and those that add first, by rank
NORMS = {
    "single": (1, [], [(2, 16)]),
    "tp2": (2, [TENSOR, "precision.dtype=bf16"], [(4, 32)] * 2),
    "pp2vp2": (2, [PIPELINE, "parallel.virtual_pipeline_model_parallel_size=2"], [(8, 8), (8, 12)]),
    "full": (1, ["train.recompute=full"], [(2 * (4 + 4 + 1), 16)]),
    "selective": (1, ["train.recompute=selective"], [(2 * (8 + 8 + 1), 0)]),
}


@pytest.mark.parametrize("layout", NORMS)
def test_additions_join_the_norms_after_them_and_change_no_bit(ranks: RankPool, layout: str) -> None:
    world_size, more, expected = NORMS[layout]
    settings = [*SMALL, "train.micro_batch_size=2" if world_size > 1 else "train.micro_batch_size=4", *more]
    joined, apart = (ranks.run(world_size, "tests.dist.ablations.norms", settings, together) for together in (True, False))
    assert [result.value[1:] for result in joined] == expected
    assert all(result.value[2] == 0 for result in apart)
    assert [result.value[0] for result in joined] == [result.value[0] for result in apart]


def test_garbage_is_collected_between_steps_only() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.me = self

    alive: list[int] = []
    assert gc.isenabled()
    with ManualCollection(2) as collection:
        assert not gc.isenabled()
        gc.collect()
        for step in (1, 2):
            Cycle()
            collection.after_step(step)
            alive.append(sum(type(found) is Cycle for found in gc.get_objects()))
    assert alive == [1, 0] and gc.isenabled()
    with ManualCollection(None):
        assert gc.isenabled()
