"""Memory per rank on several ranks: the estimate against what their tensors take."""

from __future__ import annotations

import pytest

from tests.dist.pool import RankPool

SETTINGS = ["model.num_layers=4", "train.sequence_length=128", "train.global_batch_size=16", "model.vocab_size=2048"]
TENSOR, PIPELINE = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
CASES = {
    "tp2pp2": (4, [TENSOR, PIPELINE]),
    "tp2pp2vp2-selective": (
        4,
        [TENSOR, PIPELINE, "parallel.virtual_pipeline_model_parallel_size=2", "train.recompute=selective"],
    ),
    "dp2-bf16-full": (2, ["precision.dtype=bf16", "train.recompute=full"]),
}


@pytest.mark.parametrize("case", CASES)
def test_estimates_are_what_tensors_take(ranks: RankPool, case: str) -> None:
    world_size, more = CASES[case]
    results = ranks.run(
        world_size, "megatron_synth.bench.train.memory.predicted_and_measured", "bench/tiny-7m.yaml", [*SETTINGS, *more]
    )
    assert [len(result.value) for result in results] == [world_size, *[0] * (world_size - 1)]
    for rank in results[0].value:
        assert rank["predicted_total"] == pytest.approx(rank["measured"]["peak"], rel=0.1), rank
        for kind in ("weights", "gradients", "optimizer"):
            assert rank["predicted"][kind] == pytest.approx(rank["measured"][kind], rel=0.01), (kind, rank)
