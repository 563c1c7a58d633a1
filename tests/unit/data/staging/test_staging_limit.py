"""Copies in `data.staging` take no more than they may: what was used longest ago goes, what is in use stays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.config.load import digest, load_file
from megatron_synth.config.schema import Config
from megatron_synth.data.loading.run_data import open_data
from megatron_synth.data.staging import limit
from megatron_synth.data.staging.limit import claim
from tests.support import child_environment, write_config, write_corpus


@pytest.fixture(autouse=True)
def another_process(monkeypatch):
    """What this test holds is let go at its end."""
    held = {}
    monkeypatch.setattr(limit, "_held", held)
    yield
    let_go(held)


def let_go(held):
    for descriptor in held.values():
        os.close(descriptor)
    held.clear()


def made(folder, *names, size=100):
    """Copies, each used a little later than the one before, that nobody uses any more."""
    for number, name in enumerate(names):
        claim(folder, {name: size}, None)
        (folder / name / "shard.bin").write_bytes(bytes(size // 2))
        os.utime(folder / name / ".used", (1000 + number, 1000 + number))
    let_go(limit._held)


def there(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_the_copy_that_was_used_longest_ago_goes_first(tmp_path) -> None:
    made(tmp_path, "a", "b", "c")
    claim(tmp_path, {"a": 100}, 1000)  # used again: it is the newest now
    let_go(limit._held)
    claim(tmp_path, {"d": 100}, 300)
    assert there(tmp_path) == ["a", "c", "d"]
    let_go(limit._held)
    claim(tmp_path, {"e": 150, "d": 100}, 250)  # a whole copy counts as announced, not as far as it has come
    assert there(tmp_path) == ["d", "e"]


def test_without_a_limit_and_within_it_nothing_goes(tmp_path) -> None:
    made(tmp_path, "a", "b")
    (tmp_path / "manifest.head").mkdir()
    claim(tmp_path, {"c": 100}, None)
    claim(tmp_path, {"d": 100}, 400)
    assert there(tmp_path) == ["a", "b", "c", "d", "manifest.head"]


def test_what_a_living_process_uses_stays_and_that_of_a_killed_one_goes(tmp_path) -> None:
    made(tmp_path, "a")
    script = f"""
import sys
from pathlib import Path
from megatron_synth.data.staging.limit import claim
claim(Path({str(tmp_path)!r}), {{"a": 100}}, None)
print("held", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], env=child_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"data.staging_bytes: 100 bytes are needed .* the copies a are in use; raise it"):
            claim(tmp_path, {"b": 100}, 150)
        assert there(tmp_path) == ["a"]
        child.kill()
        child.communicate()
    claim(tmp_path, {"b": 100}, 150)
    assert there(tmp_path) == ["b"]


def test_a_removal_that_was_cut_short_is_finished(tmp_path) -> None:
    made(tmp_path, ".removed-old")
    claim(tmp_path, {"b": 100}, None)
    assert not (tmp_path / ".removed-old").exists()


def test_a_run_keeps_to_the_limit_and_is_the_same_run(tmp_path) -> None:
    write_config(tmp_path / "run.yaml", write_corpus(tmp_path / "corpus"))
    local = tmp_path / "local"
    made(local, "old", size=50_000)
    base = load_file(Config, tmp_path / "run.yaml", [f"data.staging={local}"])
    config = load_file(Config, tmp_path / "run.yaml", [f"data.staging={local}", "data.staging_bytes=60000"])
    assert digest(config) == digest(base)
    assert open_data(config, staged=True).digest == open_data(base).digest
    assert "old" not in there(local) and len(there(local)) == 4
    small = load_file(Config, tmp_path / "run.yaml", [f"data.staging={local}", "data.staging_bytes=1000"])
    with pytest.raises(UserError, match=r"data.staging_bytes: the copies of this run take \d+ bytes, 1000 are allowed"):
        open_data(small, staged=True)
    with pytest.raises(UserError, match=r"data.staging_bytes: 1000 has no effect without data.staging"):
        load_file(Config, tmp_path / "run.yaml", ["data.staging_bytes=1000"])
