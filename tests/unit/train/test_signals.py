"""Requests to stop, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LISTEN = "import os, signal, threading; from megatron_synth.train.signals import listen\nstop = listen()\n"


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_before_the_first_step_it_ends_at_once(name: str, tmp_path: Path) -> None:
    code = f"os.kill(os.getpid(), signal.{name}); threading.Event().wait()"
    done = _python(LISTEN + code, MEGATRON_SYNTH_OUTCOMES=str(tmp_path), RANK="0")
    assert done.returncode == 75 and f"stopped on request ({name}) before the first step" in done.stdout
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["code"] == 75


def test_only_rank_0_says_so() -> None:
    done = _python(LISTEN + "os.kill(os.getpid(), signal.SIGTERM); threading.Event().wait()", RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "")


def test_later_it_is_a_flag() -> None:
    code = "stop.hold(); assert not stop.requested\n"
    code += "for _ in range(3): os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "assert stop.requested and listen() is stop; print(stop.signal_name)"
    done = _python(LISTEN + code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "SIGTERM\n", "")


def test_a_second_interrupt_ends_at_once() -> None:
    # the second one when the first was answered: signals of one kind that wait are one
    code = "stop.hold(); reader, writer = os.pipe(); out = os.dup(1); os.dup2(writer, 1)\n"
    code += "os.kill(os.getpid(), signal.SIGINT); os.write(out, os.read(reader, 1000)); os.dup2(out, 1)\n"
    code += "assert stop.requested; os.kill(os.getpid(), signal.SIGINT); threading.Event().wait()"
    done = _python(LISTEN + code)
    assert done.returncode == 130
    first, second = done.stdout.splitlines()
    assert first.startswith("Ctrl-C: saves after this step") and second.startswith("ended by a second Ctrl-C")


def test_a_process_forked_from_one_that_listens_has_its_own() -> None:
    code = "child = os.fork()\nif not child:\n    listen(); os.kill(os.getpid(), signal.SIGTERM); threading.Event().wait()\n"
    code += "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stop.requested)"
    assert _python(LISTEN + code).stdout.splitlines()[-1] == "75 False"


def test_train_listens_before_its_imports(tmp_path: Path) -> None:
    (tmp_path / "pydantic.py").write_text(
        f"import os, threading\nos.kill(os.getpid(), {int(signal.SIGUSR1)})\nthreading.Event().wait()\n"
    )
    command = [sys.executable, "-m", "megatron_synth", "train", "some.yaml"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75, done.stderr
    assert "the same command starts again" in done.stdout


def test_an_error_of_a_lost_rank_waits_for_a_signal_that_is_late() -> None:
    code = "threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()\n"
    code += "with stop.before_failing():\n    raise RuntimeError('Connection closed by peer')"
    assert _python(LISTEN + code, WORLD_SIZE="2").returncode == 75
    for setting in ("", "stop.hold()\n"):  # alone, and in a run that has begun, the error is what it is
        alone = _python(
            LISTEN + setting + "with stop.before_failing():\n    raise RuntimeError('a fault')",
            WORLD_SIZE="1" if not setting else "2",
        )
        assert alone.returncode == 1 and "a fault" in alone.stderr
