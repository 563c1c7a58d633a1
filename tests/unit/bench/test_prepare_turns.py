"""Tasks of an array take turns on one processor while they are measured."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.prepare import turns

_LONG_S = 30


@contextmanager
def _waiting(module_folder: Path, folder: Path, share: str) -> Iterator[psutil.Process]:
    """A process that looks like one that prepares a share, and only waits."""
    words = [sys.executable, "-m", "waiting", "prepare", str(folder / "config.yaml"), "--share", share]
    with subprocess.Popen(words, cwd=module_folder) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


def _stopped(process: psutil.Process) -> bool:
    return process.status() == psutil.STATUS_STOPPED


def test_one_share_works_at_a_time_each_in_its_turn_and_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(f"import time\ntime.sleep({2 * _LONG_S})\n")
    folder = tmp_path / "4"
    with (
        _waiting(tmp_path, folder, "0/2") as first,
        _waiting(tmp_path, folder, "1/2") as second,
        _waiting(tmp_path, tmp_path / "42", "0/2") as other,
    ):
        seen = set()
        deadline = time.monotonic() + _LONG_S
        with turns.in_turn(folder, turn_s=0.2):
            while len(seen) < 2 and time.monotonic() < deadline:
                of_both = (_stopped(first), _stopped(second))
                if sum(of_both) == 1:
                    seen.add(of_both)
                assert not _stopped(other)
        assert seen == {(True, False), (False, True)}
        assert not _stopped(first)
        assert not _stopped(second)


def test_a_folder_that_is_called_by_a_link_has_its_turns(tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(f"import time\ntime.sleep({2 * _LONG_S})\n")
    folder, link = tmp_path / "4", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    with _waiting(tmp_path, folder, "0/2") as first, _waiting(tmp_path, folder, "1/2") as second:
        deadline = time.monotonic() + _LONG_S
        with turns.in_turn(link, turn_s=0.2):
            while not (stopped := _stopped(first) or _stopped(second)) and time.monotonic() < deadline:
                time.sleep(0.01)
        assert stopped


def test_without_shares_it_ends_at_once(tmp_path: Path) -> None:
    assert turns.shares(tmp_path) == {}
    with turns.in_turn(tmp_path):
        pass
