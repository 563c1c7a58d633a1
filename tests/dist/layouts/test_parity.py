"""One seed is one run, whatever the layout: losses, gradient norms, evaluations and sample counts.

Layouts that drift apart silently are the commonest fault of parallel training, so these tests are the backbone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.train.record import metrics
from tests.dist.conftest import Run
from tests.dist.pool import RankPool
from tests.support import CLIP_GRAD, GLOBAL_BATCH_SIZE, LAYOUTS, RATIOS, STEPS, assert_same_losses

RTOL = 1e-5
TIED = "model.share_embeddings_and_output_weights=true"


def test_the_reference_learns_and_clips_in_some_steps_only(trained: Callable[..., Run]) -> None:
    records = trained("single").records
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[-1]["train/loss"] < records[0]["train/loss"] - 0.5
    norms = [record["optim/grad_norm"] for record in records]
    assert min(norms) < 0.95 * CLIP_GRAD and max(norms) > 1.05 * CLIP_GRAD
    assert sum(norm > CLIP_GRAD for norm in norms) >= 3 and sum(norm < CLIP_GRAD for norm in norms) >= 3
    for domain in ("val", "val2"):
        assert records[-1][f"eval/loss/{domain}"] < records[STEPS // 2 - 1][f"eval/loss/{domain}"]
    ledger = trained("single").ledger
    assert ledger["samples"] == STEPS * GLOBAL_BATCH_SIZE
    assert {name: source["ratio"] for name, source in ledger["sources"].items()} == RATIOS
    assert all(source["epochs"] > 1 for source in ledger["sources"].values())


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_every_layout_is_the_same_run(layout: str, trained: Callable[..., Run]) -> None:
    reference, run = trained("single"), trained(layout)
    assert_same_losses(run.records, reference.records, RTOL)
    assert run.ledger == reference.ledger


def test_tied_embeddings(trained: Callable[..., Run]) -> None:
    reference, run = trained("single", TIED), trained("tp2pp2", TIED)
    assert_same_losses(run.records, reference.records, RTOL)
    assert run.ledger == reference.ledger
    assert reference.records[-1]["train/loss"] != trained("single").records[-1]["train/loss"]


@pytest.mark.parametrize("more", [(), (TIED,), ("train.fused_loss=false",)])
@pytest.mark.parametrize("layout", ["single", "tp2pp2"])
def test_nothing_depends_on_the_padding_of_the_vocabulary(
    layout: str, more: tuple[str, ...], trained: Callable[..., Run]
) -> None:
    """256 tokens in 384 rows and, of two tensor-parallel ranks, 256 rows of which the second has no token."""
    reference = trained("single", *more)
    for multiple in (384, 512):
        run = trained(layout, *more, f"model.make_vocab_size_divisible_by={multiple}")
        assert_same_losses(run.records, reference.records, RTOL)


@pytest.mark.parametrize("layout", ["single", "tp2pp2"])
def test_loss_from_whole_logits(layout: str, trained: Callable[..., Run]) -> None:
    """The output layer and cross-entropy of megatron-core; everywhere else here they are one, chunk by chunk."""
    reference, run = trained("single"), trained(layout, "train.fused_loss=false")
    assert_same_losses(run.records, reference.records, RTOL)


def test_z_loss(trained: Callable[..., Run]) -> None:
    settings = ("train.z_loss=0.3", TIED)
    reference, run = trained("single", *settings), trained("tp2pp2", *settings)
    assert_same_losses(run.records, reference.records, RTOL)
    plain = trained("single", TIED).records
    # the first losses are of the same weights; an untrained model's logits are near 0, so that log_sum_exp is near log(V)
    assert reference.records[0][metrics.LOSS] == plain[0][metrics.LOSS]
    assert math.isclose(reference.records[0][metrics.Z_LOSS], 0.3 * math.log(256) ** 2, rel_tol=0.02)
    assert reference.records[0][metrics.GRAD_NORM] != plain[0][metrics.GRAD_NORM]
    for ours, single in zip(run.records, reference.records, strict=True):
        assert math.isclose(ours[metrics.Z_LOSS], single[metrics.Z_LOSS], rel_tol=RTOL)
    assert reference.records[-1][metrics.Z_LOSS] < 0.9 * reference.records[0][metrics.Z_LOSS] and metrics.Z_LOSS not in plain[0]


def test_only_rank_0_talks(trained: Callable[..., Run]) -> None:
    first, *others = trained("tp2pp2").results
    assert f"step {STEPS}/{STEPS}" in first.stdout and "layout TP2 x PP2 x DP1 (SP)" in first.stdout
    assert [result.stdout for result in others] == [""] * 3
    # nothing about absent libraries, deprecations or unknown modules
    assert [result.stderr for result in (first, *others)] == [""] * 4


def test_bf16_trains_on_tensor_parallel_ranks(trained: Callable[..., Run]) -> None:
    records = trained("tp2", "precision.dtype=bf16").records
    reference = trained("single").records
    assert all(math.isfinite(record["train/loss"]) and math.isfinite(record["optim/grad_norm"]) for record in records)
    assert records[-1]["train/loss"] < records[0]["train/loss"] - 0.5
    # 8 bits of mantissa: the same run, but for rounding
    for ours, theirs in zip(records, reference, strict=True):
        assert math.isclose(ours["train/loss"], theirs["train/loss"], rel_tol=0.02)


@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights_are_bit_equal_in_every_layout(tied: bool, ranks: RankPool, config: Path) -> None:
    settings = (TIED,) if tied else ()
    expected: dict[str, np.ndarray] = {}
    for layout in ("single", "tp2", "pp2", "pp2vp2", "tp2pp2"):
        world_size, layout_settings = LAYOUTS[layout]
        results = ranks.run(world_size, "tests.dist.jobs.initial_weights", str(config), [*layout_settings, *settings])
        whole = _gathered([piece for result in results for piece in result.value])
        if not expected:
            expected = whole
            continue
        assert whole.keys() == expected.keys(), layout
        for name, values in whole.items():
            assert values.tobytes() == expected[name].tobytes(), (layout, name)
    assert ("output_layer.weight" in expected) is not tied
    matrices = {name: values for name, values in expected.items() if np.ptp(values)}
    assert len(matrices) == (5 if tied else 6)
    # no two parameters, layers or halves of a matrix share their numbers
    rows = [row for values in matrices.values() for row in values.reshape(-1, values.shape[-1])[:, :32].round(7).tolist()]
    assert len({tuple(row) for row in rows}) == len(rows)


def _gathered(pieces: list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]) -> dict[str, np.ndarray]:
    """Whole parameters from the ranks' pieces, which must cover them, and agree where several hold the same."""
    whole: dict[str, np.ndarray] = {}
    seen: dict[str, np.ndarray] = {}
    for name, shape, offset, values in pieces:
        target = whole.setdefault(name, np.zeros(shape, np.float32))
        covered = seen.setdefault(name, np.zeros(shape, bool))
        assert target.shape == shape
        place = tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=True))
        twice = covered[place]
        np.testing.assert_array_equal(target[place][twice], values[twice], err_msg=name)
        target[place] = values
        covered[place] = True
    missing = [name for name, covered in seen.items() if not covered.all()]
    assert not missing
    return whole
