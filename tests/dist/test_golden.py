"""Every layout reproduces the first losses of the quickstart, those of this machine and those written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_synth.train.record import metrics
from tests.dist.pool import RankPool
from tests.golden import quickstart
from tests.support import LAYOUTS

# Relative. Rounding differs between layouts and between processors. Gradient norms are compared in test_parity.py, at a
# learning rate that does not magnify rounding as the quickstart's does (to 1e-4 of a norm within 20 steps).
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return quickstart.prepared(tmp_path_factory.mktemp("quickstart"))


@pytest.fixture(scope="module")
def single(ranks: RankPool, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return quickstart.first_steps(ranks, 1, settings, tmp_path_factory.mktemp("golden") / "single")


def test_golden_losses(single: list[dict[str, Any]], settings: list[str]) -> None:
    golden = json.loads(quickstart.FILE.read_text())
    assert quickstart.data_digest(settings) == golden["data"]
    assert [record[metrics.LOSS] for record in single] == pytest.approx(golden["loss"], rel=TOLERANCE)


@pytest.mark.parametrize("layout", ["tp2", "pp2vp2", "dp2", "tp2pp2"])
def test_layouts(ranks: RankPool, single: list[dict[str, Any]], settings: list[str], tmp_path: Path, layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    records = quickstart.first_steps(ranks, world_size, [*settings, *parallel], tmp_path / layout)
    expected = [record[metrics.LOSS] for record in single]
    assert [record[metrics.LOSS] for record in records] == pytest.approx(expected, rel=TOLERANCE)
