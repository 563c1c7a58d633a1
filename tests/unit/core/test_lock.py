"""Two programs on one folder: one works, the other is refused by name; a dead one's lock is taken over, with a note."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.core import lock
from megatron_synth.core.lock import Held, Lock, folder_for, holder, refuse_held
from tests.support import ROOT

HOLDS = """
import sys, time
from pathlib import Path
from megatron_synth.core.lock import Lock
with Lock(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    sys.stdin.read()
"""


def start(file: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "folder" / ".lock"


@pytest.fixture(autouse=True)
def folder(file: Path) -> None:
    file.parent.mkdir()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life come, and are waited for, in fractions of a second."""
    for name, value in (("BEAT_S", 0.05), ("STALE_S", 0.5), ("_POLL_S", 0.02)):
        monkeypatch.setattr(lock, name, value)


def elsewhere(file: Path, **changes: object) -> None:
    """A lock as one on another machine makes it."""
    with Lock(file, "train"):
        info = json.loads(file.read_text())
    file.touch()
    info |= {"machine": "other", "host": "node7", "user": "ann", "inode": file.stat().st_ino, **changes}
    file.write_text(json.dumps(info))


def test_a_second_program_is_refused_by_name_and_the_first_goes_on(file: Path) -> None:
    process = start(file)
    says = rf"{file.parent}: in use by `megatron-synth train` of .* on .*, pid {process.pid}, since 20.*; wait until"
    for ask in (lambda: refuse_held(file), lambda: Lock(file, "prepare").__enter__()):
        with pytest.raises(Held, match=says):
            ask()
    assert [path.name for path in file.parent.iterdir()] == [".lock"]
    process.communicate()
    assert process.returncode == 0 and not file.exists()
    refuse_held(file)
    with Lock(file, "train") as ours:
        assert ours.taken_over is None


def test_after_kill_9_the_next_takes_over_at_once_and_says_so(file: Path) -> None:
    process = start(file)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert file.exists()
    refuse_held(file)
    notes: list[str] = []
    with Lock(file, "train", note=notes.append) as ours:
        assert ours.taken_over is not None and f"pid {process.pid}" in ours.taken_over.name
    assert len(notes) == 1 and "died without a word; its lock is taken over" in notes[0] and f"pid {process.pid}" in notes[0]
    assert list(file.parent.iterdir()) == []


def test_a_process_that_has_the_number_of_a_dead_one_is_not_it(file: Path) -> None:
    with Lock(file, "train"):
        info = json.loads(file.read_text())
    file.touch()
    file.write_text(json.dumps(info | {"started": "1", "inode": file.stat().st_ino}))
    found = holder(file)
    assert found is not None and found.info is not None and found.info["pid"] == os.getpid() and found.lives is False


def test_one_on_another_machine_is_refused_while_it_beats(file: Path, hurried: None) -> None:
    elsewhere(file)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(file)

    thread = threading.Thread(target=beat)
    thread.start()
    notes: list[str] = []
    try:
        with pytest.raises(Held, match="of ann on node7"):
            Lock(file, "train", note=notes.append).__enter__()
    finally:
        ended.set()
        thread.join()
    assert len(notes) == 1 and "waits up to" in notes[0]
    assert holder(file) is not None


@pytest.mark.parametrize("age", [0.0, 1e6, -1e6])
def test_one_on_another_machine_that_is_silent_is_taken_over(file: Path, age: float, hurried: None) -> None:
    """Whatever the clocks say: what counts is that nothing comes while somebody looks."""
    elsewhere(file)
    os.utime(file, (time.time() - age,) * 2)
    with Lock(file, "train", note=lambda text: None) as ours:
        assert ours.taken_over is not None and "node7" in ours.taken_over.name


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 9000, b'{"token": 1}'])
def test_a_lock_that_a_power_failure_has_emptied_is_taken_over(file: Path, content: bytes, hurried: None) -> None:
    file.write_bytes(content)
    with Lock(file, "train", note=lambda text: None) as ours:
        assert ours.taken_over is not None and ours.taken_over.info is None


def test_a_copied_folder_is_free(file: Path, tmp_path: Path) -> None:
    with Lock(file, "train"):
        shutil.copytree(file.parent, tmp_path / "copy")
        with Lock(tmp_path / "copy" / ".lock", "train") as ours:
            assert ours.taken_over is None
        with pytest.raises(Held):
            refuse_held(file)


def test_a_holder_whose_lock_was_taken_is_told(file: Path, hurried: None) -> None:
    told, waiting = [], threading.Event()
    with Lock(file, "train", lost=lambda text: (told.append(text), waiting.set())[1]):  # type: ignore[func-returns-value]
        os.rename(file, file.with_name("away"))
        shutil.copy(file.with_name("away"), file)
        info = json.loads(file.read_text())
        file.write_text(json.dumps(info | {"token": "other"}))
        assert waiting.wait(60)
    assert "has taken this folder over" in told[0]
    assert json.loads(file.read_text())["token"] == "other"  # theirs stays


def test_a_lock_removed_by_hand_comes_back(file: Path, hurried: None) -> None:
    with Lock(file, "train"):
        file.unlink()
        deadline = time.monotonic() + 60  # to end, not to judge
        while not file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(Held):
            refuse_held(file)


def test_links_are_not_followed(file: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    file.symlink_to(victim)
    with pytest.raises(UserError, match="cannot be written"):
        Lock(file, "train").__enter__()
    assert victim.read_text() == "precious"


def test_names_that_control_a_terminal_are_written_out(file: Path) -> None:
    elsewhere(file, user="\x1b[2J\n")
    found = holder(file)
    assert found is not None and "\\x1b[2J\\n" in found.name


RACES = """
import sys, time
from pathlib import Path
from megatron_synth.core.lock import Lock, Held
file, log = Path(sys.argv[1]), Path(sys.argv[2])
for number in range(30):
    try:
        with Lock(file, "train", note=lambda text: None):
            inside = file.with_name("inside")
            inside.mkdir()  # fails when somebody else is in here
            with log.open("a") as opened:
                opened.write("x")
            inside.rmdir()
    except Held:
        time.sleep(0.001)
"""


def test_many_at_once_are_never_two(file: Path) -> None:
    dead = start(file)
    dead.send_signal(signal.SIGKILL)
    dead.communicate()
    log = file.with_name("log")
    words = [sys.executable, "-c", RACES, str(file), str(log)]
    racers = [subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for racer in racers:
        _, printed = racer.communicate()
        assert racer.returncode == 0, printed
    assert log.read_text()
    assert [path.name for path in file.parent.iterdir()] == ["log"]


def test_a_file_system_without_links(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with Lock(file, "train"), pytest.raises(Held):
        Lock(file, "train").__enter__()
    assert not file.exists()


def test_folders_that_were_made_for_nothing_go_again(tmp_path: Path) -> None:
    with folder_for(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with folder_for(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()
    with pytest.raises(UserError, match="cannot be made"), folder_for(tmp_path / "a" / "b" / "file" / "c"):
        pass
