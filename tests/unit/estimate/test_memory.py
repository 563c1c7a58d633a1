"""Memory per rank: the count against published rules, and against what an optimizer step really allocates."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from megatron_synth.config.load import validate
from megatron_synth.config.schema import Config
from megatron_synth.estimate import memory
from megatron_synth.estimate.flops import count_parameters
from megatron_synth.estimate.memory import memory_per_rank
from tests.support import LLAMA3_8B

SMALL = ["train.sequence_length=128", "model.num_layers=4", "model.vocab_size=2048", "model.hidden_size=128"]


def run(
    dtype: str = "bf16",
    tied: bool = False,
    distributed: bool = True,
    micro: int = 1,
    recompute: str = "none",
    fp8: str = "off",
    **parallel: int | bool,
) -> Config:
    model = LLAMA3_8B.model_copy(update={"share_embeddings_and_output_weights": tied}).model_dump()
    data: dict[str, Any] = {
        "model": model,
        "data": {"sources": {"web": {"path": "a", "ratio": 1}}},
        "train": {
            "steps": 9,
            "global_batch_size": 64,
            "micro_batch_size": micro,
            "sequence_length": 4096,
            "recompute": recompute,
        },
        "precision": {"dtype": dtype, "fp8": fp8},
        "parallel": {"use_distributed_optimizer": distributed, **parallel},
    }
    data["train"]["recompute"] = recompute
    return validate(Config, data, "test")


def test_the_fused_loss_has_chunks_of_the_size_that_is_counted() -> None:
    from megatron_synth_kernels.torch.linear_cross_entropy import LOGITS_BYTES

    assert memory.FUSED_LOSS_BYTES == LOGITS_BYTES


def test_memory_of_states_per_parameter() -> None:
    total = count_parameters(LLAMA3_8B).total
    [bf16] = memory_per_rank(run(), 1)
    assert bf16.weights + bf16.gradients + bf16.optimizer == 18 * total
    [sharded] = memory_per_rank(run(), 4)
    assert sharded.weights + sharded.gradients + sharded.optimizer == (6 + 3) * total
    [replicated] = memory_per_rank(run(distributed=False), 4)
    assert replicated.optimizer == bf16.optimizer
    [fp32] = memory_per_rank(run("fp32"), 1)
    assert fp32.weights + fp32.gradients + fp32.optimizer == 16 * total


def test_muon_has_no_second_moments_of_the_matrices_of_layers() -> None:
    adamw = run()
    muon = adamw.model_copy(update={"optim": adamw.optim.model_copy(update={"name": "muon"})})
    parameters = count_parameters(LLAMA3_8B)
    for data in (1, 4):
        [before], [after] = memory_per_rank(adamw, data), memory_per_rank(muon, data)
        assert before.optimizer - after.optimizer == 4 * (parameters.attention + parameters.mlp) // data


def test_health_copies_the_weights_that_a_rank_updates() -> None:
    config = run()
    watched = config.model_copy(update={"log": config.log.model_copy(update={"health_interval": 50})})
    parameters = count_parameters(LLAMA3_8B).total
    for data, device in ((1, "gpu"), (4, "gpu"), (4, "cpu")):
        [plain], [with_copy] = (memory_per_rank(one, data, device=device) for one in (config, watched))  # type: ignore[arg-type]
        assert with_copy.health == 4 * parameters // data and with_copy.static == plain.static
        passes = plain.total - plain.static
        if device == "gpu":  # when activations are gone
            assert with_copy.total == plain.static + max(passes, with_copy.health)
        else:
            assert with_copy.total == plain.total + with_copy.health
    assert with_copy.health < passes < 4 * parameters  # both cases of the maximum were there


def test_fp8_keeps_quantized_copies_of_the_matrices_of_layers() -> None:
    [plain], [quantized] = memory_per_rank(run(), 1), memory_per_rank(run(), 1, fp8=True)
    parameters = count_parameters(LLAMA3_8B)
    assert quantized.weights - plain.weights == 2 * (parameters.attention + parameters.mlp)
    assert memory_per_rank(run(fp8="current"), 1) == [quantized]


def test_memory_over_stages_holds_every_parameter_once() -> None:
    stages = memory_per_rank(run(pipeline_model_parallel_size=4), 1)
    parameters = count_parameters(LLAMA3_8B)
    assert sum(stage.gradients for stage in stages) == 4 * parameters.total
    # chunks of logits are less than what a layer's backward pass needs; whole logits are more
    assert not any(stage.logits for stage in stages)
    config = run(pipeline_model_parallel_size=4)
    whole = config.model_copy(update={"train": config.train.model_copy(update={"fused_loss": False})})
    assert [stage.logits > 0 for stage in memory_per_rank(whole, 1)] == [False, False, False, True]
    # a tied output layer lives on the last stage too
    tied = memory_per_rank(run(tied=True, pipeline_model_parallel_size=4), 1)
    assert sum(stage.gradients for stage in tied) == 4 * parameters.total
    [alone] = memory_per_rank(run(tied=True), 1)
    assert alone.gradients == 4 * (parameters.total - parameters.head)


def test_activations_follow_the_schedule_and_the_layout() -> None:
    [whole] = memory_per_rank(run(), 1)
    # 32 layers x 4096 tokens: norms in and out, query-key-value, regrouped queries, attention's output, log-sum-exp, MLP
    layer = 2 * (4 * 4096 + 48 * 128 + 32 * 128 + 32 * 128 + 3 * 14336) + 4 * 32
    last_norm = 2 * 4096 * 4096 * 2
    assert whole.activations == 32 * 4096 * layer + last_norm
    [double] = memory_per_rank(run(micro=2), 1)
    assert double.activations == 2 * whole.activations
    # 1F1B: the first stage holds as many micro-batches as there are stages, that is as much as one rank alone
    stages = memory_per_rank(run(pipeline_model_parallel_size=4), 1)
    assert [stage.activations for stage in stages[:3]] == [8 * n * 4096 * layer for n in (4, 3, 2)]
    # interleaved, first stage: 1 + (p - 1) / (p v) of it (Korthikanti et al. 2022, section 4.2)
    chunked = run(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2)
    assert memory_per_rank(chunked, 1)[0].activations == 32 * 4096 * layer * 11 // 8
    # sequence parallelism divides everything by the tensor-parallel size; without it norms and inputs stay whole
    [parallel] = memory_per_rank(run(tensor_model_parallel_size=8), 1)
    assert parallel.activations * 8 == whole.activations
    [unsplit] = memory_per_rank(run(tensor_model_parallel_size=8, sequence_parallel=False), 1)
    assert unsplit.activations - parallel.activations == (32 * 4096 * 2 * 4 * 4096 + last_norm) * 7 // 8


def test_recomputation_keeps_less() -> None:
    kept = {how: memory_per_rank(run(recompute=how), 1)[0] for how in ("none", "selective", "full")}
    assert kept["none"].activations > kept["selective"].activations > kept["full"].activations
    dropped = 32 * 4096 * 2 * (2 * 4096 + 14336)  # outputs of two norms and of SwiGLU
    assert kept["none"].activations - kept["selective"].activations == dropped
    assert kept["full"].activations == 32 * 4096 * 2 * 4096 + 2 * 4096 * 4096 * 2  # a layer's input; the last norm
    assert kept["none"].total > kept["selective"].total > kept["full"].total


# ranks, settings over bench/tiny-7m.yaml
MEASURED = {
    "fp32": [],
    "small vocabulary": ["model.vocab_size=256"],
    "bf16, grouped": ["precision.dtype=bf16", "model.num_query_groups=2"],
    "selective": ["model.vocab_size=256", "train.recompute=selective"],
    "full": ["train.recompute=full", "optim.lr=1e-4"],
    "fp8": ["precision.dtype=bf16", "precision.fp8=current"],
    "plain optimizer, wide": [
        "parallel.use_distributed_optimizer=false", "model.hidden_size=384", "model.num_layers=4", "train.micro_batch_size=1",
    ],
}  # fmt: skip


@pytest.mark.slow
def test_estimates_are_what_tensors_take() -> None:
    """Within 10 %, against the allocator, in a process of its own."""
    settings = [[*SMALL, *more] for more in MEASURED.values()]
    code = (
        "import json, sys; from megatron_synth.bench.train.memory import predicted_and_measured\n"
        "print(json.dumps([predicted_and_measured('bench/tiny-7m.yaml', s)[0] for s in json.loads(sys.argv[1])]))"
    )
    command = [sys.executable, "-c", code, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for case, rank in zip(MEASURED, json.loads(done.stdout.splitlines()[-1]), strict=True):
        # quantized copies of weights are predicted with the weights, and measured with the rest
        for kind in ("weights", "gradients", "optimizer")[case == "fp8" :]:
            assert rank["predicted"][kind] == pytest.approx(rank["measured"][kind], rel=0.01), (case, kind)
        assert rank["predicted_total"] == pytest.approx(rank["measured"]["peak"], rel=0.1), (case, rank)
