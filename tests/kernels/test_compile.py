"""Every Triton kernel compiles for Hopper at the shapes of real models, and fits in its registers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_synth.cli import kernels
from megatron_synth.config.errors import UserError
from megatron_synth_kernels.registry import OPERATIONS, TRITON
from tests.support import ROOT, child_environment

pytest.importorskip("triton")
MODELS = list(kernels.COMPILED_FOR)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """What --json wrote and what was printed; in a process without the interpreter."""
    file = tmp_path_factory.mktemp("compile") / "kernels.json"
    environment = child_environment(TRITON_INTERPRET="0")
    command = [sys.executable, "-m", "megatron_synth", "kernels", "--compile", "--json", str(file)]
    # 100 s of processor time: on a busy machine several minutes
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


def test_nothing_is_spilled_and_enough_runs_at_once(compiled: tuple[list[dict[str, Any]], str]) -> None:
    for kernel in compiled[0]:
        assert kernel["stack"] == 0, f"{kernel} keeps registers in memory"
        assert 0 < kernel["registers"] <= 128 and kernel["shared"] <= 16384, kernel
        assert kernel["warps_per_processor"] >= 16, f"{kernel}: too few warps to hide memory's latency"
        if "blocks" in kernel["kernel"]:
            assert kernel["issue"] <= 0.8, f"{kernel}: bound by instructions instead of memory"


def test_every_kernel_of_every_operation_is_there_for_every_model(compiled: tuple[list[dict[str, Any]], str]) -> None:
    found = {(kernel["operation"], kernel["shape"]) for kernel in compiled[0]}
    with_triton = [name for name, operation in OPERATIONS.items() if any(b.name == TRITON for b in operation.backends)]
    assert found == {(name, model) for name in with_triton for model in MODELS}
    # every function named *_kernel, which are those that are launched
    modules = {b.target.partition(":")[0].lstrip(".") for o in OPERATIONS.values() for b in o.backends if b.name == TRITON}
    launched = set()
    for module in modules:
        file = ROOT.joinpath("kernels", "megatron_synth_kernels", *module.split(".")).with_suffix(".py")
        source = file.read_text()
        launched |= {line.split("(")[0].removeprefix("def ") for line in source.splitlines() if line.startswith("def ")}
    expected = {name.removesuffix("_kernel") for name in launched if name.endswith("_kernel")}
    assert {kernel["kernel"] for kernel in compiled[0]} == expected


def test_the_table_says_the_same(compiled: tuple[list[dict[str, Any]], str]) -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in compiled[1].splitlines()[2:]]
    assert [(row[0].strip("`"), row[2], int(row[4])) for row in rows] == [
        (kernel["kernel"], kernel["shape"], kernel["registers"]) for kernel in compiled[0]
    ]


def test_mistakes_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="TRITON_INTERPRET is set"):
        kernels.main(["--compile"])
    with pytest.raises(UserError, match="--json goes with --compile"):
        kernels.main(["--json", "x.json"])
    with pytest.raises(UserError, match="is not a folder"):
        kernels.main(["--compile", "--json", str(tmp_path / "no" / "x.json")])
    with pytest.raises(UserError, match=r"takes no configuration, found 'train/quickstart.yaml'"):
        kernels.main(["--compile", "train/quickstart.yaml"])
