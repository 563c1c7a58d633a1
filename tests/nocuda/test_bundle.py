"""The folder of `make gpu-bundle` on a machine that has torch with CUDA and nothing else, without a network.

Run by `make gpu-rehearsal`, in its environment.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import bundle
from tests.nocuda.build import build, environment
from tests.nocuda.rehearse import ROOT


def bare_environment(folder: Path) -> Path:
    """Python in an environment that has torch, what torch needs, and numpy."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in bundle.needed_by(bundle.PRESENT):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            source, target = Path(str(distribution.locate_file(top))), site / top
            if source.exists() and not target.exists():
                target.symlink_to(source)
    return folder / "bin/python"


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("carried") / "bundle"
    assert bundle.make(out, None) < bundle.LIMIT
    return out


def without_network() -> list[str]:
    """What a command begins with that is to have no network; nothing where that is not allowed."""
    command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]  # gloo wants the loopback
    try:
        return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else []
    except FileNotFoundError:
        return []


def test_it_measures_where_only_torch_is(carried: Path, tmp_path: Path) -> None:
    python = bare_environment(tmp_path / "bare")
    library = build(ROOT / "build/nocuda")
    given = {key: value for key, value in environment(library).items() if key != "PYTHONPATH"}
    given |= {"PYTHON": str(python), "OUT": str(tmp_path), "PATH": os.environ["PATH"]}

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*without_network(), str(carried / "start.sh"), *arguments]
        return subprocess.run(command, env=given, capture_output=True, text=True, cwd=tmp_path)

    lacking = subprocess.run([str(python), "-c", "import megatron.core, pydantic"], capture_output=True, text=True)
    assert "No module named" in lacking.stderr, "the environment is not bare"
    collected = start("tests", "--collect-only", "-q")
    assert collected.returncode == 0 and "test_engine_gpu.py" in collected.stdout, collected.stdout + collected.stderr

    done = start("bench", "gpu", "--smoke", "--only", "tiny-1m bf16", "--json", str(tmp_path / "gpu.json"))
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["device"] == "NVIDIA H200" and document["git"]["commit"], document
    first = document["parts"]["tiny-1m bf16"]
    assert first["status"] == "done" and first["result"]["rows"][0]["tokens_per_s_per_rank"] > 0, first
    assert done.returncode == 0, done.stdout + done.stderr


def test_another_python_is_refused(carried: Path, tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    refused = subprocess.run(
        [carried / "start.sh"], env={"PYTHON": str(other), "PATH": os.environ["PATH"]}, capture_output=True
    )
    assert refused.returncode == 2 and b"set PYTHON" in refused.stderr
