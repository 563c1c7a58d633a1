"""Full disks, closed pipes, terminals and odd environments: one message and an exit code, never a traceback."""

from __future__ import annotations

import errno
import io
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_synth.cli import main as cli
from megatron_synth.config.errors import EXIT_UNREAD
from megatron_synth.core import log
from megatron_synth.core.files import append_line, write_atomic, write_json
from tests.support import ROOT

QUICKSTART = str(ROOT / "configs" / "train" / "quickstart.yaml")


def command(*words: str, buffered: bool = True, **environment: str) -> subprocess.CompletedProcess[bytes]:
    line = f"{sys.executable} -m megatron_synth {' '.join(words)}; echo exit $? >&2"
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    variables |= environment | ({} if buffered else {"PYTHONUNBUFFERED": "1"})
    return subprocess.run(["bash", "-c", line], capture_output=True, env=variables, cwd=ROOT)


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("words", [("--help",), ("config", "show", QUICKSTART)])
def test_standard_output_on_a_full_disk(words: tuple[str, ...], buffered: bool) -> None:
    done = command(*words, ">", "/dev/full", buffered=buffered)
    assert done.stderr.decode() == "error: standard output: No space left on device\nexit 2\n"


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("words", ["--help", "train --help", f"config show {QUICKSTART}"])
def test_a_reader_that_has_seen_enough(words: str, buffered: bool) -> None:
    # the reader is gone before the first write
    reading, writing = os.pipe()
    os.close(reading)
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    variables |= {} if buffered else {"PYTHONUNBUFFERED": "1"}
    line = [sys.executable, "-m", "megatron_synth", *words.split()]
    done = subprocess.run(line, stdout=writing, stderr=subprocess.PIPE, env=variables, cwd=ROOT)
    os.close(writing)
    assert done.stderr.decode() == ""
    # argparse itself passes over what it could not write of a help text
    assert done.returncode == EXIT_UNREAD or ("--help" in words and not buffered and done.returncode == 0)


@pytest.mark.parametrize(
    ("raised", "code", "printed"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/a.png"), 2, "error: /data/a.png: No space left on device\n"),
        (OSError(errno.EROFS, "Read-only file system", "a", None, "b"), 2, "error: a -> b: Read-only file system\n"),
        (PermissionError(errno.EACCES, "Permission denied", b"x"), 2, "error: x: Permission denied\n"),
    ],
)
def test_what_the_system_refuses_is_a_message(
    raised: OSError, code: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: list[str]) -> int:
        raise raised

    assert cli.guarded(run, []) == code
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize("raised", [ConnectionResetError(104, "reset"), TimeoutError(110, "late"), BrokenPipeError(32, "pipe")])
def test_what_comes_of_peers_is_an_error_of_the_program(raised: OSError) -> None:
    """A job is started again after it; exit 0 or 2 would end it."""

    def run(arguments: list[str]) -> int:
        raise raised

    with pytest.raises(type(raised)):
        cli.guarded(run, [])


@pytest.mark.parametrize(
    "write", [lambda file: write_atomic(file, "x"), lambda file: write_json(file, [1]), lambda file: append_line(file, "x")]
)
def test_files_are_named_when_they_cannot_be_written(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write(tmp_path / "a.json")
    assert caught.value.filename == str(tmp_path / "a.json")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_names_of_the_longest_kind(tmp_path: Path) -> None:
    file = tmp_path / ("ä" * 127)  # 254 bytes
    write_atomic(file, "x")
    assert file.read_text() == "x"


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["x", "-1", "", "1.5"])
def test_numbers_of_a_launcher_that_are_none(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    assert cli.main(["config", "check", QUICKSTART]) == 2
    assert capsys.readouterr().err.startswith(f"error: {variable}='{value}' in the environment: expected a whole number")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("submit", "x", "--nodes", "0"), "--nodes: expected a whole number of 1 or more, found '0'"),
        (("submit", "x", "--nodes", "1", "--gpus-per-node", "-1"), "--gpus-per-node: expected a whole number of 0 or more"),
        (("doctor", "--nodes", "-1"), "--nodes: expected a whole number of 1 or more"),
        (("train", "x", "--dry-run", "--world-size", "0"), "--world-size: expected a whole number of 1 or more"),
        (("train", "x", "--world-size", "9" * 5000), "--world-size: expected a whole number of 1 or more"),
        (("logs", "x", "--rank", "\u0665"), "--rank: expected a whole number of 0 or more"),
        (("fit", "x", "--law", "joint", "--seed", "-1"), "--seed: expected a whole number of 0 or more"),
        (("fit", "x", "--law", "joint", "--starts", "0"), "--starts: expected a whole number of 1 or more"),
        (("prepare", "duplicates", "x", "--shingle", "9" * 18), "--shingle: expected at most 1000000 tokens"),
        (("prepare", "duplicates", "x", "--ngram", "0"), "--ngram: expected a whole number of 1 or more"),
        (("study", "status", "x", "--watch", "nan"), "--watch: expected seconds above 0"),
        (("study", "propose", "x", "--seed", "-1"), "--seed: expected a whole number of 0 or more"),
        (("checkpoint", "merge", "x", "--out", "y", "--weights", "1e999999999,1"), "--weights: expected numbers such as"),
        (("checkpoint", "merge", "x", "--out", "y", "--weights", "1,0.0000000000001"), "--weights: in whole numbers"),
        (("checkpoint", "merge", "x", "--out", "y", "--steps", "9" * 5000), "--steps: expected steps such as"),
        (("train",), "the following arguments are required: config\n"),
    ],
)
def test_numbers_of_the_command_line(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(list(words))
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "verb", ["status", "report", "eval", "config show", "checkpoint ls", "mix audit", "prepare", "study plan"]
)
def test_names_of_510_bytes(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*verb.split(), "n" * 510]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error and len(error) < 2500
    assert "File name too long" in error or f"no configuration file {'n' * 510}" in error


def test_a_library_that_is_not_installed(capsys: pytest.CaptureFixture[str]) -> None:
    def run(arguments: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.figure")

    assert cli.guarded(run, []) == 2
    assert (
        "matplotlib.figure is not installed, and this needs it: pip install 'megatron-synth[study]'" in capsys.readouterr().err
    )

    def broken(arguments: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'megatron_synth.x'", name="megatron_synth.x")

    with pytest.raises(ModuleNotFoundError):
        cli.guarded(broken, [])


# ---- terminals

HOSTILE = "a\x1b[31mb\x07\x9b\u202ec\r\x7f\nd\te"
WRITTEN = "a\\x1b[31mb\\x07\\x9b\\u202ec\\x0d\\x7f\nd\te"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_control_characters_are_written_out_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log.say(HOSTILE)
    assert capsys.readouterr().out == HOSTILE + "\n"  # a file or a program gets what there is
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    log.say(HOSTILE, control="\x1b[H")
    log.show(HOSTILE, error=True)
    assert terminal.getvalue() == f"\x1b[H{WRITTEN}\n{WRITTEN}\n"
    assert log.table([("run", "n"), ("x\ny\x1b", "1")]).splitlines()[1] == r"  x\ny\x1b  1"


def test_a_name_that_the_stream_cannot_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    log.say("run ä \udcff")
    assert raw.getvalue() == b"run \\xe4 \\udcff\n"


def test_a_message_with_a_hostile_path_on_a_real_terminal() -> None:
    parent, child = pty.openpty()
    words = [sys.executable, "-m", "megatron_synth", "status", "no\x1b[2Jrun"]
    with subprocess.Popen(words, stdout=child, stderr=child, stdin=subprocess.DEVNULL, cwd=ROOT) as process:
        os.close(child)
        assert process.wait() == 2
    shown = os.read(parent, 10_000)
    os.close(parent)
    assert b"\x1b" not in shown and b"error: no\\x1b[2Jrun: neither a run directory" in shown
