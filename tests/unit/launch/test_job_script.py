"""launch/job.sh with commands of Slurm that send it signals at the moments that count; the real ones are in tests/slurm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT

REQUEST = 'kill -USR1 "$JOB_SHELL"'


@pytest.mark.parametrize(("scontrol", "ran"), [("", ["echo", "started"]), (REQUEST, ["bash", "-c", "exit 75"])])
def test_a_request_before_there_is_a_step(scontrol: str, ran: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    for name, body in (
        ("scontrol", f"{scontrol}\necho NodeAddr=127.0.0.1"),
        ("srun", f'printf "%s\\n" "$@" > {log}'),
        ("python", 'if [ "$3" = end ]; then echo exit 75; fi'),
    ):
        file = tmp_path / name
        file.write_text(f"#!/usr/bin/env bash\n{body}\n")
        file.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": "python",
        "JOB_DIR": str(tmp_path),
        "LAUNCH": str(ROOT / "launch"),
        "RANKS_PER_NODE": "1",
        "SAVE_WAIT": "1",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
    }
    code = 'export JOB_SHELL=$$; set -uo pipefail; source "$LAUNCH/job.sh"; run_step echo started'
    done = subprocess.run(["bash", "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75, done.stderr
    assert log.read_text().splitlines()[-len(ran) :] == ran
