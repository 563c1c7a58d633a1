"""`generate` from a run: exported once, again when the weights are others, and shown by the run's report."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dist.conftest import Run
from tests.dist.pool import RankPool


def _cli(ranks: RankPool, *arguments: str, code: int = 0) -> str:
    (result,) = ranks.run(1, "megatron_synth.cli.main.main", list(arguments))
    assert result.value == code, result.stdout + result.stderr
    return result.stdout if code == 0 else result.stderr


def test_a_run_is_exported_once_and_its_texts_stand_in_its_report(
    trained: Callable[..., Run], ranks: RankPool, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained("single").path, run)
    ask = ("generate", str(run), "--prompt", "a\x1b[2Jb", "--max-tokens", "6", "--device", "cpu")
    first = _cli(ranks, *ask)
    folder = run / "exported" / "step_00000020"
    assert f"exported to {folder}" in first
    made = os.stat(folder / "model.safetensors").st_ino
    second = _cli(ranks, *ask)
    assert f"as exported before to {folder}" in second
    assert second.partition("\n")[2] == first.partition("\n")[2]
    assert os.stat(folder / "model.safetensors").st_ino == made
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[0]["text"] == lines[1]["text"] and lines[0]["step"] == 20

    # the same name with other weights: those of the step before, as after a run that went back and came there again
    other = run / "checkpoints" / "step_00000010"
    shutil.rmtree(run / "checkpoints" / "step_00000020")
    shutil.copytree(other, run / "checkpoints" / "step_00000020")
    third = _cli(ranks, *ask)
    assert f"exported to {folder}" in third and "before" not in third
    assert os.stat(folder / "model.safetensors").st_ino != made or json.loads((folder / "exported-from.json").read_text())["step"] == 10
    shutil.rmtree(run / "checkpoints" / "step_00000020")
    _cli(ranks, *ask)
    assert [path.name for path in (run / "exported").iterdir()] == ["step_00000010"]  # of other weights nothing is kept

    report = _cli(ranks, "report", str(run))
    assert "what the weights of step 10 write:\n  | a\\x1b[2Jb >> " in report
    (run / "samples.jsonl").write_text('{"prompt": "half", "text": "a"}\n')
    damaged = _cli(ranks, "report", str(run), code=2)
    assert "samples.jsonl, line 1: damaged: time is missing" in damaged
