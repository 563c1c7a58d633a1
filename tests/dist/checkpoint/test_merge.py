"""Means of checkpoints, whatever layout wrote them, and what reads them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_synth.train.checkpoint import files
from tests.dist.conftest import Run, Train
from tests.dist.pool import RankPool
from tests.support import STEPS, child_environment, read_metrics

MAIN = "megatron_synth.cli.main.main"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of the newest checkpoint, in whole."""
    from megatron_synth.train.checkpoint.format.stored import Stored

    with Stored(files.candidates(folder)[0]) as stored:
        keys = [key for key in stored.shapes if not key.startswith("optimizer.")]
        return {key: stored.read(key, (0,) * len(stored.shapes[key]), stored.shapes[key]) for key in keys}


@pytest.fixture
def merge(ranks: RankPool) -> Callable[..., str]:
    def call(*arguments: object, code: int = 0) -> str:
        (result,) = ranks.run(1, MAIN, ["checkpoint", "merge", *map(str, arguments)])
        assert result.value == code, result.stdout + result.stderr
        return result.stdout + result.stderr

    return call


def test_means_of_checkpoints(
    merge: Callable[..., str], trained: Callable[..., Run], train: Train, ranks: RankPool, tmp_path: Path
) -> None:
    one, other = trained("single").path, trained("tp2pp2").path
    # with itself, and of two layouts; blocks that cut rows and layers
    merge(other, other, other, "--weights", "1/7,0.3,2", "--out", tmp_path / "self")
    for key, value in weights(tmp_path / "self").items():
        assert torch.equal(value, weights(other)[key]), key
    merge(f"{one}@10", f"{other}@{STEPS}", "--weights", "1,2", "--out", tmp_path / "mean")
    first = shutil.copytree(one, tmp_path / "first", ignore=shutil.ignore_patterns(f"step_{STEPS:08d}"))
    mean, a, b = weights(tmp_path / "mean"), weights(first), weights(other)
    assert mean.keys() == a.keys() and len(a) > 8
    for key, value in mean.items():
        assert torch.equal(value, ((a[key].double() + 2 * b[key].double()) / 3).float()), key
    record = json.loads((tmp_path / "mean" / "merge.json").read_text())["parts"]
    assert [(part["step"], part["weight"]) for part in record] == [(10, "1/3"), (STEPS, "2/3")]
    # what reads it: verify, eval, export, another run's beginning, in any layout
    for words in (["checkpoint", "verify", "mean"], ["eval", "self"], ["convert", "to-hf", "mean", "exported"]):
        done = ranks.run(1, MAIN, [*words[: len(words) - (2 if words[0] == "convert" else 1)], *paths(tmp_path, words)])
        assert done[0].value == 0, done[0].stderr
    evaluated = json.loads((tmp_path / "self" / "eval.json").read_text())
    assert evaluated["eval/loss"] == pytest.approx(read_metrics(other)[-1]["eval/loss"], rel=1e-5)
    train(tmp_path / "run", "tp2", f"checkpoint.init_from={tmp_path / 'self'}", "train.steps=1", "optim.warmup_steps=0")
    # a weight of its own that counts nothing
    merge(one, "--steps", f"10,{STEPS}", "--weights", "1,0", "--out", tmp_path / "alone")
    assert all(torch.equal(value, a[key]) for key, value in weights(tmp_path / "alone").items())


def paths(folder: Path, words: list[str]) -> list[str]:
    count = 2 if words[0] == "convert" else 1
    return [str(folder / word) for word in words[-count:]]


def test_what_has_no_mean_is_refused(
    merge: Callable[..., str], trained: Callable[..., Run], train: Train, tmp_path: Path
) -> None:
    run = trained("single").path
    train(tmp_path / "wide", "single", "model.ffn_hidden_size=64", "train.steps=3", "eval.interval=null")
    other = shutil.copytree(run, tmp_path / "other")
    for file in other.glob("checkpoints/*/trainer.json"):
        state = json.loads(file.read_text())
        file.write_text(json.dumps({**state, "tokenizer_fingerprint": "f" * 64}))
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / "checkpoints" / f"step_{STEPS:08d}" / "__0_0.distcp").write_bytes(b"")
    out = ("--out", tmp_path / "out")
    refused = {
        (run, "--steps", "10,11", *out): "there is no checkpoint of step 11",
        (run, tmp_path / "wide", *out): "model.ffn_hidden_size was 64 and is now 128",
        (run, other, *out): "was trained with another tokenizer",
        (run, damaged, *out): "damaged: ",
        (run, "--weights", "1,2", *out): "--weights: 2 for 1 checkpoints",
        (tmp_path / "nothing", *out): "expected a run directory with checkpoints, found none",
        (run, "--out", run): "exists already",
    }
    for arguments, message in refused.items():
        told = merge(*arguments, code=2)
        assert message in told and "Traceback" not in told, told
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_links_of_a_stranger_s_run_are_refused(merge: Callable[..., str], trained: Callable[..., Run], tmp_path: Path) -> None:
    run, out = trained("single").path, ("--out", tmp_path / "out")
    assert "RUN: expected RUN@STEP" in merge(f"{run}@{'9' * 100}", *out, code=2)
    (tmp_path / "secret").write_text("a key of mine\n")
    for name in ("config.yaml", "tokenizer.json", "huggingface.json"):
        stranger = shutil.copytree(run, tmp_path / name.partition(".")[0])
        (stranger / name).unlink(missing_ok=True)
        (stranger / name).symlink_to(tmp_path / "secret")
        assert f"{name}: is a link, expected a file of the run's own" in merge(stranger, *out, code=2)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_full_disk_is_one_message_that_names_the_file(
    ranks: RankPool, trained: Callable[..., Run], tmp_path: Path
) -> None:
    words = ["checkpoint", "merge", str(trained("single").path), "--out", str(tmp_path / "out")]
    (result,) = ranks.run(1, "tests.dist.jobs.with_small_files", words, 20_000)
    assert result.value == 2
    assert "__0_0.distcp: File too large" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.merge.tmp"))


@pytest.mark.slow
def test_a_killed_merge_leaves_nothing_that_counts(
    merge: Callable[..., str], trained: Callable[..., Run], tmp_path: Path
) -> None:
    run, out = trained("single").path, tmp_path / "out"
    words = [sys.executable, "-m", "megatron_synth", "checkpoint", "merge", str(run), "--steps", f"10,{STEPS}", "--out", str(out)]
    program = subprocess.Popen(words, env=child_environment(OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL)
    while program.poll() is None and not (tmp_path / ".out.merge.tmp").exists():
        time.sleep(0.001)
    os.kill(program.pid, signal.SIGKILL)
    program.wait()
    if not out.exists():  # else it was faster
        merge(run, "--steps", f"10,{STEPS}", "--out", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
