"""launch/local.sh with a check and a launcher that send it signals at the moments that count."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


def _run(folder: Path, check: str, launcher: str) -> tuple[int, list[str]]:
    """Exit code, and what the launcher has written down. check: what the dry run is, both in bash."""
    log = folder / "log"
    log.touch()
    # torchrun, or the package's own way to it
    check = f'if [ "$2" = megatron_synth.cluster.agent ]; then exec torchrun "$@"; fi\n{check}'
    for name, body in (("python", check), ("torchrun", launcher)):
        file = folder / name
        file.write_text(f"#!/usr/bin/env bash\nsay() {{ echo $1 >> {log}; }}\n{body}\n")
        file.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    script = ["bash", str(ROOT / "launch" / "local.sh"), "2", "some.yaml", "--run-dir", "x"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("some.yaml: checked, then trained on 2 ranks")
    return done.returncode, log.read_text().split("\n")[:-1]


# A launcher that says by which signal it is asked. Not in bash, which cannot listen to SIGINT in the background.
LISTENS = """
import os, signal
def tell(number, frame):
    print(signal.Signals(number).name, file=open("{log}", "a"), flush=True)
    os._exit(1)
for name in ("USR1", "TERM", "INT"):
    signal.signal(getattr(signal, f"SIG{{name}}"), tell)
os.kill(os.getppid(), signal.SIG{first})
while True:
    signal.pause()
"""


@pytest.mark.parametrize("name", ["USR1", "TERM", "INT", "HUP"])
def test_a_request_before_the_launcher_starts_nothing(name: str, tmp_path: Path) -> None:
    code, log = _run(tmp_path, f"kill -{name} $PPID", "say started")
    assert (code, log) == (75, [])


@pytest.mark.parametrize(("name", "handed_on"), [("USR1", "USR1"), ("TERM", "TERM"), ("INT", "INT"), ("HUP", "TERM")])
def test_a_request_reaches_the_launcher_from_its_first_moment_on(name: str, handed_on: str, tmp_path: Path) -> None:
    (tmp_path / "listens.py").write_text(LISTENS.format(log=tmp_path / "log", first=name))
    code, log = _run(tmp_path, "exit 0", f"exec {sys.executable} {tmp_path / 'listens.py'}")
    assert (code, log) == (75, [f"SIG{handed_on}"])


def test_a_launcher_that_dies_of_a_request_was_stopped_on_request(tmp_path: Path) -> None:
    # torchrun in its first seconds, before it listens
    code, _ = _run(tmp_path, "exit 0", "kill -USR1 $PPID; while :; do sleep 0.05; done")
    assert code == 75


# A launcher with a rank that goes on; the second interrupt comes when the first has arrived here.
INSISTS = """
import os, signal, time
rank = os.fork()
if not rank:
    while True:
        signal.pause()
print(rank, file=open("{log}", "a"), flush=True)
signal.signal(signal.SIGINT, lambda number, frame: os.kill(os.getppid(), signal.SIGINT))
while True:  # bash may come to a signal late that arrives just before it waits: people press again
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(2)
"""


def test_a_second_interrupt_ends_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "insists.py").write_text(INSISTS.format(log=tmp_path / "log"))
    code, log = _run(tmp_path, "exit 0", f"exec {sys.executable} {tmp_path / 'insists.py'}")
    assert code == 130
    rank = int(log[0])
    state = Path(f"/proc/{rank}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    ("check", "launcher", "code"),
    [
        ("exit 2", "say started", 2),
        ("kill -KILL $$", "say started", 70),
        ("exit 0", "exit 0", 0),
        *(("exit 0", f"exit {code}", code) for code in (1, 2, 70, 75)),
        ("exit 0", "kill -KILL $$", 70),
    ],
)
def test_exit_codes(check: str, launcher: str, code: int, tmp_path: Path) -> None:
    found, log = _run(tmp_path, check, launcher)
    assert (found, log) == (code, [])
