"""QK-clip scales the heads whose logits exceed the threshold, by the right factors, and the same in every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_synth.train.record import metrics
from tests.dist.conftest import Run, Train
from tests.dist.pool import RankPool
from tests.support import STEPS, assert_same_losses, read_metrics, rewound

THRESHOLD = 0.15
CLIP = f"optim.qk_clip={THRESHOLD}"
LONG = ("optim.lr=1e-2", "eval.interval=null")
OWN_KEYS = "model.num_query_groups=4"


@pytest.mark.parametrize("groups", [2, 4])
def test_heads_are_scaled_by_their_largest_logit(groups: int, ranks: RankPool, config: Path, tmp_path: Path) -> None:
    """Against logits by plain torch: shared keys stay, keys of their own take half of the exponent."""
    more = (f"model.num_query_groups={groups}", "train.steps=3", *LONG)
    arguments = ["train", str(config), *more, "--run-dir", str(tmp_path / "run")]
    (result,) = ranks.run(1, "tests.dist.layouts.qk_clip_jobs.train_and_compute_clips", arguments, THRESHOLD)
    clipped, kept = 0, 0
    for step in result.value:
        for logits, scaled in zip(step["logits"], step["scaled"], strict=True):
            heads, channels = len(logits), len(scaled) // (len(logits) + 2 * groups)
            of_rows = [scaled[row * channels] for row in range(heads + 2 * groups)]
            assert [value for value in of_rows for _ in range(channels)] == pytest.approx(scaled, rel=1e-5)
            each = heads // groups
            for group in range(groups):
                *queries, key, value = of_rows[group * (each + 2) : (group + 1) * (each + 2)]
                own = logits[group * each : (group + 1) * each]
                factors = [min(1.0, THRESHOLD / logit) for logit in own]
                assert value == 1.0
                if each > 1:
                    assert key == 1.0 and queries == pytest.approx(factors, rel=1e-5)
                else:
                    assert queries == pytest.approx([factors[0] ** 0.5], rel=1e-5) and key == queries[0]
                clipped += sum(factor < 1 for factor in factors)
                kept += sum(factor == 1 for factor in factors)
    assert clipped and kept
    assert read_metrics(tmp_path / "run")[-1][metrics.CLIPPED] == clipped


LAYOUTS = {
    "tp2dp2": ("parallel.ddp_bucket_size=30000",),
    "pp2vp2": (),
    "cp2": ("train.recompute=full",),
    "dp2-overlap-both": (),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_run(layout: str, trained: Callable[..., Run]) -> None:
    settings = (CLIP, OWN_KEYS) if layout == "cp2" else (CLIP,)
    masks = ("data.document_masks=true",) if layout == "tp2dp2" else ()
    reference = trained("single", *settings, *masks)
    run = trained(layout, *settings, *masks, *LAYOUTS[layout])
    assert_same_losses(run.records, reference.records, 1e-5)
    counts = [record.get(metrics.CLIPPED) for record in reference.records]
    assert counts == [record.get(metrics.CLIPPED) for record in run.records] and counts[-1] > 0
    without = trained("single", *settings[1:], *masks)
    assert run.records[-1][metrics.LOSS] != without.records[-1][metrics.LOSS]


def test_with_muon_it_resumes_to_the_bit_and_bounds_logits(trained: Callable[..., Run], train: Train, tmp_path: Path) -> None:
    settings, clip = ("optim.name=muon", "log.health_interval=1", "optim.lr=1e-2"), "optim.qk_clip=0.06"
    reference, free = trained("tp2dp2", *settings, clip), trained("tp2dp2", *settings)
    run = rewound(reference.path, tmp_path / "run", STEPS // 2)
    train(run, "tp2dp2", *settings, clip)
    assert_same_losses(read_metrics(run), reference.records, 0)

    def largest(made: Run) -> float:
        return max(value for record in made.records[STEPS // 2 :] for value in metrics.parts(record, metrics.MAX_LOGITS).values())

    assert largest(reference) < 0.7 * largest(free)


def test_it_is_refused_where_norms_bound_the_logits(train: Train, tmp_path: Path) -> None:
    (result,) = train(tmp_path / "run", "single", CLIP, "model.qk_norm=head", code=2)
    assert "optim.qk_clip: has no effect with model.qk_norm: head" in result.stderr
