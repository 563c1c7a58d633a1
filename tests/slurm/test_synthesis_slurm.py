"""A synthesis as an array over the nodes of a real SLURM: a server and a client on each, a node lost, the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_synth.config.load import to_yaml
from megatron_synth.synthesis.answers.parts import keys_of
from megatron_synth.synthesis.setup import ANSWERS
from megatron_synth.synthesis.synthesis_file import SynthesisConfig
from tests.slurm.conftest import call
from tests.slurm.lab import Lab
from tests.support import ROOT
from tests.unit.synthesis.conftest import write_parents
from tests.unit.synthesis.test_run import product

DOCUMENTS = 120


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, str]:
    """The environment in which `vllm` is a stub, which answers little as long as a file is there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "vllm"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.unit.synthesis.engines.fake_vllm "$@"\n')
    script.chmod(0o755)
    return {"PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "FAKE_MARK": str(tmp_path / "starts")}


def write(tmp_path: Path, output: str) -> Path:
    parents = tmp_path / "parents.jsonl"
    if not parents.exists():
        write_parents(tmp_path, DOCUMENTS)
    data: dict[str, Any] = {
        "output": str(tmp_path / output),
        "kind": "hq-rephrase",
        "parents": {"web": {"input": str(parents)}},
        "generator": {"model": "stub", "api": "completions"},
        "engine": {"name": "vllm", "concurrency": 4, "backoff_s": 0.02, "startup_s": 100},
        "filters": {"off": ["copy_of_parent", "repetition", "little_of_parent", "wrong_language"]},
    }
    file = tmp_path / f"{output}.yaml"
    file.write_text(to_yaml(SynthesisConfig.model_validate(data)))
    return file


def test_shares_on_nodes_of_which_one_is_lost(four: Lab, fake: dict[str, str], tmp_path: Path) -> None:
    one = write(tmp_path, "one")
    assert call(four, "synthesize", "run", str(one), **fake).code == 0
    file, output = write(tmp_path, "array"), tmp_path / "array"
    dry = call(four, "synthesize", "run", str(file), "--slurm", "--nodes", "2", "--dry-run", **fake)
    assert dry.code == 0 and "--share 1/2" in dry.out and "nothing was submitted" in dry.out, dry.err
    assert not output.exists()

    hold = tmp_path / "hold"
    hold.touch()
    fake = {**fake, "FAKE_HOLD": str(hold)}
    told = call(four, "synthesize", "run", str(file), "--slurm", "--nodes", "2", **fake)
    assert told.code == 0, told.err
    job = told.out.split()[1]
    again = call(four, "synthesize", "run", str(file), "--slurm", "--nodes", "2", **fake)
    assert again.code == 2 and "of this output is" in again.err
    four.wait("answers of both shares", lambda: all(answers_of(output, number) > 3 for number in range(2)))
    listening = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=False).stdout
    servers = [line for line in listening.splitlines() if any(f"pid={number}," in line for number in fake_servers())]
    assert servers and all(line.split()[3].startswith("127.0.0.1:") for line in servers)
    shown = call(four, "synthesize", "status", str(file), **fake)
    assert "share-00001-of-00002" in shown.out and f"{job}_0" in shown.out, shown.out + shown.err

    lost = four.run("squeue", "-h", "-j", f"{job}_1", "-o", "%N").strip()
    four.kill_node(lost)
    hold.unlink()
    four.wait("the corpus", (output / "synthesis.json").exists)
    four.start_node(lost)
    assert product(output) == product(tmp_path / "one"), "the bytes of one machine"
    keys = list(keys_of(output / ANSWERS))
    assert len(keys) == len(set(keys)) == json.loads((output / "synthesis.json").read_text())["account"]["asked"]
    attempts = (output / "slurm").glob(f"*/shares/attempts/{job}_1.jsonl")
    begins = [json.loads(line) for file in attempts for line in file.read_text().splitlines() if '"begin"' in line]
    assert len(begins) >= 2 and begins[-1]["nodes"] != lost
    assert not (ROOT / "vllm.log").exists()


def fake_servers() -> list[str]:
    """Numbers of the processes that stand in for vLLM."""
    return [file.parent.name for file in Path("/proc").glob("[0-9]*/cmdline") if b"fake_vllm\0serve" in file.read_bytes()]


def answers_of(output: Path, share: int) -> int:
    return sum(1 for _ in keys_of(output / ANSWERS / f"share-{share:05d}-of-00002"))
