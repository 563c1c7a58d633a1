"""A short campaign of kills; `make test-faults` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.pool import RankPool
from tests.faults.campaign import Campaign, kills


@pytest.mark.parametrize(("layout", "count"), [("single", 12), ("dp2", 3)])
def test_kills_at_any_moment_lose_nothing(layout: str, count: int, ranks: RankPool, config: Path, tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, ranks, config, seed=2)
    kills(campaign, layout, count)
    assert sum(row.survived for row in campaign.rows) == sum(row.tried for row in campaign.rows) == count
