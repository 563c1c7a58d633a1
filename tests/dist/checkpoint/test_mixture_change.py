"""A mixture that changes in the middle of a run: forward only, recorded, and audited to the token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dist.conftest import Run, Train
from tests.dist.pool import RankPool
from tests.support import GLOBAL_BATCH_SIZE, SEQUENCE_LENGTH, assert_same_losses, read_ledger, read_metrics, rewound

CONSUMED = 10 * GLOBAL_BATCH_SIZE


def phases(until_samples: int) -> str:
    return f"data.phases=[{{until: {until_samples * SEQUENCE_LENGTH}}}, {{ratios: {{web: 1/4, qa: 3/4}}}}]"


@pytest.mark.parametrize("layout", ["single", "tp2pp2"])
def test_an_appended_phase_goes_on_from_what_was_consumed(
    ranks: RankPool, train: Train, trained: Callable[..., Run], tmp_path: Path, layout: str
) -> None:
    before = trained("single")
    run = rewound(before.path, tmp_path / "run", 10)
    train(run, layout, phases(CONSUMED), "data.sources.qa.max_epochs=8")
    records = read_metrics(run)
    assert_same_losses(records[:10], before.records[:10], 0)
    web, qa = (read_ledger(run)["sources"][name]["samples"] for name in ("web", "qa"))
    assert web + qa == 2 * CONSUMED
    # 80 samples at 2/3 and 1/3, then 80 at 1/4 and 3/4, each within one sample
    assert abs(qa - (CONSUMED / 3 + CONSUMED * 3 / 4)) < 2
    assert f"mixture changed from sample {CONSUMED} on" in (run / "events.log").read_text()
    (audit,) = ranks.run(1, "megatron_synth.cli.main.main", ["mix", "audit", str(run)])
    assert audit.value == 0, audit.stdout + audit.stderr


def test_the_past_cannot_be_changed(train: Train, trained: Callable[..., Run], tmp_path: Path) -> None:
    run = rewound(trained("single").path, tmp_path / "run", 10)
    (result,) = train(run, "single", phases(CONSUMED - 1), "data.sources.qa.max_epochs=8", code=2)
    assert "add a phase to data.phases" in result.stderr and str(CONSUMED * SEQUENCE_LENGTH) in result.stderr
