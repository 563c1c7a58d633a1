"""Compiled code is loaded from a folder of one's own, whatever a neighbor has put into /tmp."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from megatron_synth.cli import main as cli
from megatron_synth.core.compiler_cache import VARIABLE, keep_to_own_folder
from tests.support import ROOT

NAME = f"megatron-synth-{os.getuid()}"


def _plant(folder: Path, what: str) -> None:
    if what == "link":
        (folder / "elsewhere").mkdir()
        (folder / NAME).symlink_to(folder / "elsewhere")
    elif what == "open to others":
        (folder / NAME).mkdir()
        (folder / NAME).chmod(0o777)
    elif what == "file":
        (folder / NAME).touch()


def _by_program(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    keep_to_own_folder()
    return Path(os.environ[VARIABLE])


def _by_launcher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(folder)}
    words = ["bash", "-c", f"source {ROOT}/launch/env.sh; printf %s ${VARIABLE}"]
    return Path(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("made", [_by_program, _by_launcher])
@pytest.mark.parametrize("what", ["link", "open to others", "file"])
def test_a_folder_that_others_planted_is_not_used(
    what: str, made: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")  # so that it is put back
    _plant(tmp_path, what)
    assert callable(made)
    cache = made(tmp_path, monkeypatch)
    assert cache.name == "inductor" and cache.parent.parent == tmp_path and cache.parent.name != NAME
    assert cache.parent.lstat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("made", [_by_program, _by_launcher])
def test_the_folder_is_the_same_each_time_and_ones_own(made: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    assert callable(made)
    assert made(tmp_path, monkeypatch) == made(tmp_path, monkeypatch) == tmp_path / NAME / "inductor"
    assert (tmp_path / NAME).lstat().st_mode & 0o777 == 0o700


def test_verbs_that_compile_name_it_and_leave_what_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for before, after in (("", str(tmp_path / NAME / "inductor")), ("/mine", "/mine")):
        monkeypatch.setenv(VARIABLE, before)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        assert cli.main(["eval", str(tmp_path / "no-run")]) == 2
        assert os.environ[VARIABLE] == after
