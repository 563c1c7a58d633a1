"""What a shell is offered when a user presses the tabulator, and the scripts that ask for it."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_synth.cli import bench
from megatron_synth.cli.completion import GROUPS, SHELLS, whole_parser
from megatron_synth.cli.main import VERBS


def offered(line: str, tmp_path: Path) -> set[str]:
    """The words that the program offers for an unfinished line, asked as the shell's script asks."""
    file = tmp_path / "words"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(file)}
    environment = {**os.environ, **asked, "_ARGCOMPLETE_IFS": "\n", "ARGCOMPLETE_USE_TEMPFILES": "1"}
    subprocess.run([sys.executable, "-m", "megatron_synth"], env=environment, check=True, timeout=60)
    return {word.strip() for word in file.read_text().split("\n")}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("megatron-synth st", {"status", "study"}),
        ("megatron-synth train --dr", {"--dry-run"}),
        ("megatron-synth train x.yaml optim.weight", {"optim.weight_decay="}),
        ("megatron-synth study re", {"report"}),
        ("megatron-synth bench train --swe", {"--sweep"}),
        ("megatron-synth completion f", {"fish"}),
    ],
)
def test_words_are_offered(line: str, expected: set[str], tmp_path: Path) -> None:
    assert offered(line, tmp_path) == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_a_script(shell: str) -> None:
    done = subprocess.run([sys.executable, "-m", "megatron_synth", "completion", shell], capture_output=True, text=True)
    assert done.returncode == 0 and "megatron-synth" in done.stdout and "_ARGCOMPLETE" in done.stdout


def test_every_verb_and_benchmark_has_a_parser_of_its_name() -> None:
    names = [verb for verb in VERBS if verb != "bench"] + [f"{verb}.{name}" for verb, group in GROUPS.items() for name in group]
    for name in names:
        parser = importlib.import_module(f"megatron_synth.cli.{name}").parser()
        assert isinstance(parser, argparse.ArgumentParser)
        assert parser.prog == f"megatron-synth {name.replace('.', ' ')}", name
    assert set(GROUPS["bench"]) == set(bench.BENCHMARKS)
    assert whole_parser(["bench", "train"]).prog == "megatron-synth"
