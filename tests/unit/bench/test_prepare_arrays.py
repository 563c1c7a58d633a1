"""Figures of preparations by arrays: what is derived from what was measured, and what is refused."""

from __future__ import annotations

import pytest

from benchmarks.prepare import shares
from benchmarks.prepare.cli import main
from benchmarks.prepare.shares import Prepared, SharesBench, render
from megatron_synth.config.errors import UserError

HEAD = {
    "command": "c",
    "date": "d",
    "git": None,
    "device": "x",
    "threads": 1,
    "versions": {"python": "3"},
}


def test_a_table_of_arrays_beside_one_machine() -> None:
    alone = Prepared(None, 12.0, 0.0, 0.0, 10.0, 200 * 2**20)
    four = Prepared(4, 7.0, shares_s=12.0, longest_s=3.5, last_s=0.75, rss=100 * 2**20)
    assert four.last_part(0.5) == pytest.approx(0.25 / 3.25)
    told = render(HEAD, SharesBench(10**6, 1000, 5_100_000, True, True, 0.5, (alone, four)))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in told.splitlines() if line.startswith("|")]
    assert rows[2] == ["one machine", "12", "10.0", "", "", "", "510,000", "1.000", "200"]
    assert rows[3] == ["4", "7", "12.8", "3.5", "0.8", "8%", "400,000", "0.784", "100"]
    assert "all at one time" in told and "shuffled and packed" in told and "each takes 0.5 s before it works" in told


def test_without_slurm_and_with_numbers_that_are_none_it_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(shares.slurm, "available", lambda: False)
    with pytest.raises(UserError, match="--shares: needs a SLURM whose nodes are this machine"):
        main(["--shares", "1,4", "--folder", str(tmp_path)])
    for wrong in ("0", "1,x", ""):
        with pytest.raises(UserError, match="--shares: expected numbers of tasks such as 1,4,16"):
            main(["--shares", wrong])
