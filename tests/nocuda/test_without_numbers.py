"""What else is for a GPU and asks for no numbers: `bench kernels`, and those tests of a GPU that only look.

All other tests of a GPU hold numbers of kernels against definitions, or losses of runs against each other; numbers.py has
runs of its own.
Run by `make gpu-rehearsal`, in its environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.nocuda.build import build, environment
from tests.nocuda.rehearse import ROOT

LOOKING = ("test_kernels_gpu.py::test_a_gpu_gets_the_triton_kernels",)


def on_device(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    given = {**environment(build(ROOT / "build/nocuda")), "PYTHONPATH": paths, "TRITON_INTERPRET": "0", **more}
    done = subprocess.run([sys.executable, *arguments], env=given, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_every_kernel_is_timed_and_no_launch_is_impossible(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    done = on_device("-m", "megatron_synth", "bench", "kernels", "--smoke", "--vs", "eager", "--json", str(file))
    assert "nocuda:" not in done.stderr, "an operand on the host, or a launch that the chip refuses"
    rows = json.loads(file.read_text())["rows"]
    triton = {row["operation"] for row in rows if row["contender"] == "triton" and row["seconds"] is not None}
    assert {"rms_norm", "rms_norm_residual", "swiglu", "rope", "quantise_fp8", "rms_norm_quantise"} <= triton


def test_what_only_looks_passes() -> None:
    done = on_device("-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(ROOT / "tests/gpu" / one) for one in LOOKING))
    assert f"{len(LOOKING)} passed" in done.stdout, done.stdout
