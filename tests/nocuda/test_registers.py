"""The kernels as the oldest Triton that is allowed compiles them; tests/kernels/test_compile.py does it with the newest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.nocuda.rehearse import ROOT


def test_nothing_is_spilled_and_enough_runs_at_once(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "megatron_synth", "kernels", "--compile", "--json", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kernel in json.loads(file.read_text()):
        assert kernel["stack"] == 0, f"{kernel} keeps registers in memory"
        assert 0 < kernel["registers"] <= 128 and kernel["shared"] <= 32768, kernel
        assert kernel["warps_per_processor"] >= 16, f"{kernel}: too few warps to hide memory's latency"
        if "blocks" in kernel["kernel"]:
            assert kernel["issue"] <= 0.8, f"{kernel}: bound by instructions instead of memory"
