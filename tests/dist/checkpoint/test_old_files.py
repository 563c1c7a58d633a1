"""Files that version 0.1.0 wrote still open; tests/fixtures/make_v0_1_0.sh says how they were made.

Its losses gave the rows that pad the vocabulary a part of the probability, and its exports kept them. What is right now is what
transformers says of its export over the tokens alone.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_synth.cli.main import main
from megatron_synth.data.shards.source import open_source
from tests.support import ROOT, SEQUENCE_LENGTH, checkpoint_names, read_metrics, snapshot

FIXTURES = ROOT / "tests" / "fixtures"
EXPECTED: dict[str, Any] = json.loads((FIXTURES / "v0.1.0.json").read_text())
# what arithmetic promises across processors after a few steps in fp32
RTOL = 1e-5


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files, in a folder of the test's own that is also the current one."""
    with tarfile.open(FIXTURES / "v0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def command(old: Path, *arguments: str) -> str:
    """What a command that trains or evaluates prints: a process of its own, so that no process group is left here."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_synth", *arguments], cwd=old, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_sources_verify(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "verify", "--sha256", "data/plain", "data/packed"]) == 0
    shard = old / "data/packed/qa/shard-00000.bin"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    assert main(["prepare", "verify", "data/packed"]) != 0, capsys.readouterr()


def test_a_finished_run_is_read(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mix", "audit", "runs/finished"]) == 0
    assert "equal: the run consumed what was planned" in capsys.readouterr().out
    assert main(["checkpoint", "ls", "runs/finished"]) == 0
    for run in ("finished", "stopped", "tp2pp2"):
        assert main(["checkpoint", "verify", f"runs/{run}"]) == 0
    assert main(["status", "--json", "runs/finished", "runs/tp2pp2"]) == 0
    assert "finished" in capsys.readouterr().out
    assert main(["report", "runs/finished"]) == 0
    assert (old / "runs/finished/report.png").is_file()


def loss_of_export(old: Path, domain: str, vocab_size: int | None) -> float:
    """What transformers says of the old export on a validation domain, over so many of its rows; nats per token."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(old / "exported")
    source = open_source(old / "data/plain" / f"{domain}-valid", domain)
    tokens = np.empty(source.num_tokens, np.int64)
    source.read(0, tokens)
    count = (len(tokens) - 1) // SEQUENCE_LENGTH
    rows = torch.from_numpy(np.stack([tokens[i * SEQUENCE_LENGTH : (i + 1) * SEQUENCE_LENGTH + 1] for i in range(count)]))
    with torch.no_grad():
        logits = model(input_ids=rows[:, :-1]).logits.double()[..., :vocab_size]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


@pytest.mark.parametrize("run", ["finished", "tp2pp2"])
def test_eval_on_one_rank_gives_the_losses_over_the_tokens(old: Path, run: str) -> None:
    (old / "runs" / run / "eval.json").unlink()
    command(old, "eval", f"runs/{run}")
    found, expected = json.loads((old / "runs" / run / "eval.json").read_text()), dict(EXPECTED["eval"][run])
    for domain in ("natural", "qa"):
        loss, bpb = f"eval/loss/{domain}", f"eval/bpb/{domain}"
        assert loss_of_export(old, domain, None) == pytest.approx(expected[loss], rel=RTOL)
        now = loss_of_export(old, domain, vocab_size(old))
        assert now < expected[loss] - 0.1
        expected[bpb] *= now / expected[loss]
        expected[loss] = now
    total = sum(expected[f"eval/loss/{domain}"] * expected[f"eval/tokens/{domain}"] for domain in ("natural", "qa"))
    now = total / sum(expected[f"eval/tokens/{domain}"] for domain in ("natural", "qa"))
    expected["eval/bpb"] *= now / expected["eval/loss"]
    expected["eval/loss"] = now
    assert_close(found, expected)


def vocab_size(old: Path) -> int:
    size: int = json.loads((old / "data/plain/natural/manifest.json").read_text())["tokenizer"]["vocab_size"]
    return size


def test_a_stopped_run_goes_on(old: Path) -> None:
    command(old, "train", "train.yaml", "--run-dir", "runs/stopped")
    losses = {str(record["step"]): record["train/loss"] for record in read_metrics(old / "runs/stopped")}
    assert_close({step: losses[step] for step in "1234"}, {step: EXPECTED["losses"][step] for step in "1234"})
    rows, tokens = load_file(safetensors(old / "exported"))["lm_head.weight"].shape[0], vocab_size(old)
    for step in "5678":  # the padding had a little less than the share of equal rows
        fall = EXPECTED["losses"][step] - losses[step]
        assert 0.8 * math.log(rows / tokens) < fall < math.log(rows / tokens)
    assert checkpoint_names(old / "runs/stopped") == ["step_00000004", "step_00000008"]


def test_export_gives_the_same_weights(old: Path) -> None:
    command(old, "convert", "to-hf", "runs/finished", "again")
    then, now = load_file(safetensors(old / "exported")), load_file(safetensors(old / "again"))
    assert then.keys() == now.keys()
    for name, weight in now.items():  # without the rows that pad the vocabulary
        assert torch.equal(weight, then[name][: weight.shape[0]]), name
        assert weight.shape == then[name].shape or len(weight) == vocab_size(old)
    command(old, "convert", "from-hf", "exported", "weights")
    assert any((old / "weights").iterdir())


def test_a_study_is_read_and_has_nothing_left_to_do(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = old / "runs/study/small/runs"
    before = {name: content for name, content in snapshot(runs).items() if name.endswith(("result.json", "metrics.jsonl"))}
    assert len(before) == 8
    assert main(["study", "status", "study.yaml"]) == 0
    assert main(["study", "submit", "study.yaml", "--local", "--jobs", "1"]) == 0
    after = {name: content for name, content in snapshot(runs).items() if name.endswith(("result.json", "metrics.jsonl"))}
    assert after == before, capsys.readouterr().out
    assert main(["study", "report", "study.yaml"]) == 0


def safetensors(folder: Path) -> Path:
    return folder / "model.safetensors"


def assert_close(found: Any, expected: Any) -> None:
    """Equal keys, texts and integers; floats within RTOL."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_close(found[key], expected[key])
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=RTOL)
    else:
        assert found == expected
