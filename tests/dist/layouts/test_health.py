"""What `log.health_interval` records is right, and the same in every layout; an evaluation before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_synth.train.record.goodput import goodput
from tests.dist.conftest import Train
from tests.dist.pool import RankPool
from tests.support import read_metrics

COMMON = (
    "train.steps=4",
    "log.health_interval=2",
    "eval.interval=null",
    "model.make_vocab_size_divisible_by=40",  # rows that pad the vocabulary, on two ranks
)


def health(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith("health/")}


def test_it_is_right(ranks: RankPool, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", str(config), *COMMON, "optim.clip_grad=0", "--run-dir", str(run)]
    (result,) = ranks.run(1, "tests.dist.layouts.health_jobs.train_and_compute_health", arguments, 2)
    records = read_metrics(run)
    assert [bool(health(record)) for record in records] == [False, True, False, True]
    found = health(records[1])
    assert found.keys() == result.value.keys()
    for name, expected in result.value.items():
        assert found[name] == pytest.approx(expected, rel=1e-5), name
    assert min(found.values()) > 0
    squares = sum(value**2 for name, value in found.items() if name.startswith("health/grad_norm/"))
    assert squares**0.5 == pytest.approx(records[1]["optim/grad_norm"], rel=1e-9)


LAYOUTS_TRIED = {
    "plain": ("tp2", "tp2-whole-sequence", "pp2vp2", "dp2-plain", "cp2", "tp2pp2"),
    "documents": ("tp2", "cp2", "dp2-overlap-both"),
}
KINDS = {
    "plain": (),
    "documents": ("data.document_masks=true", "model.sliding_window=5", "model.share_embeddings_and_output_weights=true"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_same_in_every_layout(kind: str, train: Train, tmp_path: Path) -> None:
    train(tmp_path / "single", "single", *COMMON, *KINDS[kind])
    expected = read_metrics(tmp_path / "single")
    for layout in LAYOUTS_TRIED[kind]:
        recompute = ("train.recompute=full",) if layout == "cp2" else ()
        train(tmp_path / layout, layout, *COMMON, *KINDS[kind], *recompute)
        records = read_metrics(tmp_path / layout)
        for step in (1, 3):
            found, wanted = health(records[step]), health(expected[step])
            assert found.keys() == wanted.keys(), layout
            for name, value in wanted.items():
                assert found[name] == pytest.approx(value, rel=1e-4), (layout, name)


def test_an_evaluation_before_the_first_step(train: Train, ranks: RankPool, tmp_path: Path) -> None:
    settings = ("train.steps=4", "eval.at_start=true", "eval.interval=null", "checkpoint.interval=2")
    train(tmp_path / "run", "dp2", *settings)
    first, *steps = read_metrics(tmp_path / "run")
    assert first["step"] == first["data/tokens"] == 0 and first["eval/loss"] > steps[-1]["eval/loss"]
    assert first.keys() >= {"eval/loss/val", "eval/loss/val2"}
    assert [record["step"] for record in steps] == [1, 2, 3, 4] and "eval/loss" not in steps[0]
    for verb in (["mix", "audit"], ["report"], ["status"]):
        (result,) = ranks.run(1, "megatron_synth.cli.main.main", [*verb, str(tmp_path / "run")])
        assert result.value == 0, result.stdout + result.stderr
    spent = goodput(tmp_path / "run")
    assert spent is not None and 0 < spent.share < 1
    kinds = {span.kind for span in spent.spans}
    assert kinds == {"kept steps", "waiting for data", "evaluation", "saving", "starting"}
    assert (tmp_path / "run" / "times.png").is_file()  # by `report`
    train(tmp_path / "plain", "dp2", *settings, "eval.at_start=false")
    assert read_metrics(tmp_path / "plain")[-1]["eval/loss"] == steps[-1]["eval/loss"]
