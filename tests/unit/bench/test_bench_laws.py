"""`python -m benchmarks laws --goals` says of every goal what was found, at which commit, and whether it is met."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.laws import cli
from benchmarks.laws.intervals import KINDS
from megatron_synth.config.errors import UserError


def measured(**found: Any) -> dict[str, Any]:
    return {part: {"git": {"commit": "0123456789abcdef", "dirty": False}, "found": one} for part, one in found.items()}


def shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], **found: Any) -> dict[str, list[str]]:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(measured(**found)))
    assert cli.main(["--goals", "--json", str(file)]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines[2:]}


def rates(rate: float, errors: str, cluster: str | None) -> dict[str, Any]:
    return {"errors": errors, "cluster": cluster, "draws": 100, **dict.fromkeys(("B", "beta", "E", "far"), rate)}


def test_every_goal_is_held_against_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = [rates(0.9, "independent", None), rates(0.95, "checkpoints", "seed")]
    untold = rates(0.4, "checkpoints", None)  # what a fit that is not told does is no goal
    times = [{"runs": 150, "processor_seconds": 12.0}, {"runs": 450, "processor_seconds": 31.0}]
    goals = shown(tmp_path, capsys, intervals=[*right, untold], report=times)
    (told, met, commit), (took, fast, _) = goals.values()
    assert told == "92.5% in the mean, 90% to 95%; 100% of 8 within" and met == "yes" and commit == "0123456789"
    assert took == "150 runs 12 s, 450 runs 31 s" and fast == "**no**"
    missed = shown(tmp_path, capsys, intervals=[*right, rates(0.7, "independent", None)])
    assert [cells[1] for cells in missed.values()] == ["**no**"]


def test_what_it_needs_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown part 'interval'; any of regmix,.*intervals, report"):
        cli.main(["--parts", "interval"])
    with pytest.raises(UserError, match="--data: needed for all parts but designs, coverage, intervals, report"):
        cli.main(["--parts", "regmix"])
    with pytest.raises(UserError, match="--json names the file"):
        cli.main(["--goals"])
    assert {kind.cluster for kind in KINDS.values()} == {None, "budget", "seed"}
