"""Ctrl-C and SIGTERM: one line that says what is kept and how to go on, and the exit code that shells give."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_synth.cli import main as cli
from megatron_synth.cli.interrupts import interruptible
from tests.support import ROOT


@pytest.mark.parametrize(
    ("number", "code", "named"),
    [
        (signal.SIGINT, 130, "Ctrl-C"),
        (signal.SIGTERM, 143, "SIGTERM"),
        (signal.SIGHUP, 129, "the end of the terminal (SIGHUP)"),
    ],
)
@pytest.mark.usefixtures("unheard")
def test_one_line_and_the_exit_code(number: int, code: int, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)

    def run(arguments: list[str]) -> int:
        with interruptible("all is kept"):
            os.kill(os.getpid(), number)
            time.sleep(60)
        return 0

    assert cli.guarded(run, []) == code
    assert capsys.readouterr().err == f"ended by {named}: all is kept\n"
    assert signal.getsignal(number) == before


@pytest.mark.usefixtures("unheard")
def test_one_rank_says_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(KeyboardInterrupt), interruptible("all is kept"):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    assert capsys.readouterr().err == ""


def test_an_interrupted_preparation_is_kept_and_goes_on(tmp_path: Path) -> None:
    text, file = tmp_path / "text.jsonl", tmp_path / "data.yaml"
    line = '{"text": "%d words of a text that take their time to become tokens, as there are so many of them"}\n'
    text.write_text("".join(line % number for number in range(150_000)))
    file.write_text(
        f"output: {tmp_path}/out\ntokenizer: {{train: {{vocab_size: 300, max_bytes: 10000}}}}\n"
        f"sources: {{web: {{kind: natural, input: {text}}}}}\n"
    )
    words = [sys.executable, "-m", "megatron_synth", "prepare", str(file), "--workers", "1"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        deadline = time.monotonic() + 300  # to end, not to judge

        def begun() -> bool:  # its tokenizer is trained: the second line of its journal
            return any(journal.read_bytes().count(b"\n") > 1 for journal in tmp_path.glob(".out.partial-*/journal.jsonl"))

        while not begun():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, printed = process.communicate()
    assert process.returncode == 143, printed
    assert re.search(
        rf"^ended by SIGTERM: what is done is kept in {tmp_path}/\.out\.partial-\d+; the same", printed, re.MULTILINE
    )
    assert "Traceback" not in printed and not (tmp_path / ".out.lock").exists()
    again = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0 and "continuing a run that was stopped" in again.stderr, again.stderr


@pytest.mark.usefixtures("unheard")
def test_an_interrupted_fit_has_written_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "runs.csv"
    rows = (f"{n}e6,{d}e8,{2 + n**-0.3 + d**-0.3}" for n in range(1, 7) for d in range(1, 7))
    table.write_text("\n".join(["n_params,tokens,loss", *rows]))

    def interrupt(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr("megatron_synth.cli.fit._fit", interrupt)
    assert cli.main(["fit", str(table), "--law", "joint", "--out", str(tmp_path / "fits")]) == 130
    assert capsys.readouterr().err == "ended by Ctrl-C: no file was written; the same command starts again\n"
    assert not (tmp_path / "fits").exists()
