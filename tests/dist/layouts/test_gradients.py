"""Gradients and the norm that clips them are the same in every layout, tensor by tensor.

Losses would hide it: Adam does not see by how much a gradient is too large, and a norm that counts a part of the ranks clips a
little less. What others have found in compositions of parallelism is planted here, to see that it would be seen.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from tests.dist.pool import RankPool
from tests.support import LAYOUTS

JOB = "tests.dist.layouts.gradient_jobs.gradients"
COMMON = ("train.steps=1", "optim.warmup_steps=0", "eval.interval=null", "checkpoint.interval=null")
FAMILIES = {
    "tied": ("model.share_embeddings_and_output_weights=true", "model.add_qkv_bias=true", "model.qk_norm=head"),
    "norms": ("model.qk_norm=all_heads", "model.norm_placement=after", "model.add_qkv_bias=true"),
    "documents": ("model.num_query_groups=null", "data.document_masks=true"),
}
LAYOUTS_OF = {
    "tied": ("tp2", "tp2-whole-sequence", "pp2vp2dp2-overlap-both", "cp2dp2-plain"),
    "norms": ("tp2", "tp2-whole-sequence", "pp2vp2dp2-overlap-both"),
    "documents": ("tp2",),
}


MODULES = {
    "ColumnParallelLinear",
    "IdentityFuncOp",
    "IdentityOp",
    "LanguageModelEmbedding",
    "RowParallelLinear",
    "SelfAttention",
    "TransformerBlock",
    "TransformerLayer",
    "VocabParallelEmbedding",
}
"""Classes of megatron-core that docs/megatron-core.md has judged: look another one up there before it is added."""


class Step:
    """The gradients of a step of a run on several ranks."""

    def __init__(self, ranks: RankPool, config: Path, folder: Path, family: str, layout: str, fault: str = ""):
        size, settings = LAYOUTS[layout]
        run = folder / f"{family}-{layout}{fault.replace(' ', '-')}"
        arguments = ["train", str(config), *settings, *COMMON, *FAMILIES[family], "--run-dir", str(run)]
        self.results = [result.value for result in ranks.run(size, JOB, arguments, fault)]
        self.norm = self.results[0]["norm"]

    def tensors(self) -> dict[str, list[tuple[float, float]]]:
        """By tensor, sum of squares and of values: of the whole one where ranks share it, else of each copy of it."""
        sums: dict[tuple[str, int, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for result in self.results:
            tensor_rank, stage = result["place"]
            for name, (is_shared, squares, values) in result["tensors"].items():
                of_copy = sums[name, 0 if is_shared else tensor_rank, stage]
                of_copy[0] += squares / result["copies"]
                of_copy[1] += values / result["copies"]
        found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for (name, _, _), (squares, values) in sums.items():
            found[name].append((squares, values))
        return dict(found)


def differences(found: Step, expected: Step) -> list[str]:
    """Names of tensors whose gradient is another one, and `norm`."""
    tied = "output_layer.weight", "embedding.word_embeddings.weight"
    wanted = expected.tensors()
    names = []
    for name, copies in found.tensors().items():
        (right,) = wanted[name if name in wanted else dict([tied])[name]]
        scale = right[0] ** 0.5
        for squares, values in copies:
            if squares != pytest.approx(right[0], rel=1e-4) or values != pytest.approx(right[1], rel=1e-4, abs=1e-3 * scale):
                names.append(name)
    if found.norm != pytest.approx(expected.norm, rel=1e-5):
        names.append("norm")
    return names


@pytest.fixture(scope="module")
def alone(ranks: RankPool, config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Step]:
    """By family, on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    return {family: Step(ranks, config, folder, family, "single") for family in FAMILIES}


def test_the_model_has_no_module_that_was_not_judged(alone: dict[str, Step]) -> None:
    for step in alone.values():
        assert set(step.results[0]["modules"]) <= MODULES


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_in_every_layout(
    family: str, alone: dict[str, Step], ranks: RankPool, config: Path, tmp_path: Path
) -> None:
    for layout in LAYOUTS_OF[family]:
        assert differences(Step(ranks, config, tmp_path, family, layout), alone[family]) == [], layout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "family", "layout", "seen"),
    [
        ("unmarked", "norms", "tp2", "norm"),
        ("no sum over norms", "tied", "tp2", "0.input_layernorm.weight"),
        ("no sum over norms", "tied", "tp2-whole-sequence", "0.self_attention.q_layernorm.weight"),
        ("no sum over stages", "tied", "tp2pp2", "embedding.word_embeddings.weight"),
    ],
)
def test_planted_faults_are_seen(
    fault: str, family: str, layout: str, seen: str, alone: dict[str, Step], ranks: RankPool, config: Path, tmp_path: Path
) -> None:
    assert seen in differences(Step(ranks, config, tmp_path, family, layout, fault), alone[family])
