"""Local copies: whole, used again, completed after an interruption, refused where they cannot be made."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.data.loading.run_data import open_data
from megatron_synth.data.shards.manifest import Manifest
from megatron_synth.data.shards.source import open_source
from megatron_synth.data.staging.copies import stage
from tests.support import snapshot, write_config, write_corpus
from tests.unit.data.shards.test_source import make


def test_a_copy_reads_like_its_source_and_is_made_once(tmp_path) -> None:
    stream, _ = make(tmp_path / "shared" / "s", [[50, 30], [40]])
    (tmp_path / "shared" / "tokenizer.json").write_text("{}")
    told: list[tuple[int, int]] = []
    copy = stage(tmp_path / "shared" / "s", tmp_path / "local", lambda done, total: told.append((done, total)))
    assert copy.parent == tmp_path / "local" and told[-1][0] == told[-1][1] > 0
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    source, original = open_source(copy, "s"), open_source(tmp_path / "shared" / "s", "s")
    assert source.manifest is not None and original.manifest is not None
    assert source.manifest.digest() == original.manifest.digest()
    assert source.tokenizer_path is not None and source.tokenizer_path.read_text() == "{}"
    out = np.empty(stream.size, np.int64)
    source.read_window(0, out)
    np.testing.assert_array_equal(out, stream)
    before = snapshot(copy)
    told.clear()
    assert stage(tmp_path / "shared" / "s", tmp_path / "local", lambda done, total: told.append((done, total))) == copy
    assert snapshot(copy) == before and not told


def test_a_run_reads_the_copies_and_remembers_the_originals(tmp_path) -> None:
    (tmp_path / "shared").mkdir()
    corpus = write_corpus(tmp_path / "shared" / "corpus")
    plain = load_file(Config, write_config(tmp_path / "run.yaml", corpus))
    config = load_file(Config, tmp_path / "run.yaml", [f"data.staging={tmp_path / 'local'}", "data.memory_map=false"])
    original, copied = open_data(plain), open_data(config, staged=True)
    for sources, local in ((copied.sources, True), (copied.validation.values(), True), (open_data(config).sources, False)):
        assert all((tmp_path / "local" in source.path.parents) == local and not source.memory_map for source in sources)
    for name in ("digest", "tokenizer", "vocab_size"):
        assert getattr(copied, name) == getattr(original, name), name
    assert copied.prefix_digest(9) == original.prefix_digest(9)
    for ours, theirs in zip(copied.sources, original.sources, strict=True):
        found, expected = np.empty((2, 33), np.int64)
        ours.read_window(7, found)
        theirs.read_window(7, expected)
        np.testing.assert_array_equal(found, expected)


def test_a_bare_pair_is_not_copied(tmp_path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    write_config(tmp_path / "run.yaml", corpus)
    bare = [f"data.validation.val.path={corpus / 'val' / 'shard-00000'}", f"data.staging={tmp_path / 'local'}"]
    with pytest.raises(UserError, match=r"data.staging: .*shard-00000: source 'val' has no manifest.json"):
        open_data(load_file(Config, tmp_path / "run.yaml", bare), staged=True)
    assert not (tmp_path / "local").exists()


def test_an_interrupted_copy_is_completed(tmp_path, monkeypatch) -> None:
    make(tmp_path / "s", [[50, 30], [40]])
    working = os.replace

    def replace(source, target):
        if str(target).endswith("shard-00001.bin"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        working(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(UserError, match=r"shard-00001.bin: No space left on device while .*/s was copied"):
            stage(tmp_path / "s", tmp_path / "local")
    (unfinished,) = (tmp_path / "local").iterdir()
    assert not list(unfinished.glob(".*.part")) and not (unfinished / "manifest.json").exists()
    assert stage(tmp_path / "s", tmp_path / "local") == unfinished
    assert open_source(unfinished, "s").num_tokens == 120


@pytest.mark.slow
def test_a_copy_of_thousands_of_shards_survives_its_process(tmp_path, capsys) -> None:
    stream, _ = make(tmp_path / "s", [[30]] * 1000)
    code = (
        "import sys, pathlib, time; from megatron_synth.data.staging import copies; "
        "copies.LOG_INTERVAL_S = 0; "
        "copies.stage(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "s"), str(tmp_path / "local")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for _ in range(600):  # two files are a shard
        assert process.stderr.readline().startswith("copying s: ")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    (unfinished,) = (tmp_path / "local").iterdir()
    there = {path.name for path in unfinished.glob("shard-*")}
    assert 599 <= len(there) < 2000 and not (unfinished / "manifest.json").exists()
    before = {name: (unfinished / name).stat().st_mtime_ns for name in there}
    copy = stage(tmp_path / "s", tmp_path / "local")
    assert copy == unfinished and all((copy / name).stat().st_mtime_ns == at for name, at in before.items())
    assert not list(copy.glob(".*.part"))
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4 and all(line.startswith("copying s: ") for line in lines)
    assert re.match(r"copying s: (\S+) of \1 bytes after", lines[-1])
    out = np.empty(stream.size, np.int64)
    open_source(copy, "s").read_window(0, out)
    np.testing.assert_array_equal(out, stream)


def test_another_source_of_the_same_name_gets_another_copy(tmp_path) -> None:
    make(tmp_path / "a" / "s", [[50]])
    make(tmp_path / "b" / "s", [[25, 25]])
    copies = {stage(tmp_path / name / "s", tmp_path / "local") for name in "ab"}
    assert len(copies) == 2


def test_no_room_is_told_before_anything_is_copied(tmp_path, monkeypatch) -> None:
    make(tmp_path / "s", [[50]])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"10 bytes free, .* needed for the copy"):
        stage(tmp_path / "s", tmp_path / "local")
    assert not list((tmp_path / "local").rglob("shard-*"))


def planted(tmp_path):
    """A source, the folder that its copy will have, and two files of ours that a neighbor points to."""
    make(tmp_path / "s", [[50, 30], [40]])
    target = tmp_path / "local" / f"s-{Manifest.load(tmp_path / 's').digest()[:16]}"
    target.mkdir(parents=True)
    victims = [tmp_path / name for name in ("one", "two")]
    for victim in victims:
        victim.write_text("precious")
    return target, victims


def test_a_lock_that_is_a_link_is_refused(tmp_path) -> None:
    target, (victim, _) = planted(tmp_path)
    (target / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match=r"\.lock: Too many levels of symbolic links"):
        stage(tmp_path / "s", tmp_path / "local")
    assert victim.read_text() == "precious"


def test_links_in_the_place_of_copies_are_replaced(tmp_path) -> None:
    target, victims = planted(tmp_path)
    target.chmod(0o777)
    (target / ".shard-00000.bin.part").symlink_to(victims[0])
    (target / "shard-00000.bin").symlink_to(victims[1])
    copy = stage(tmp_path / "s", tmp_path / "local")
    assert [victim.read_text() for victim in victims] == ["precious", "precious"]
    assert not (copy / "shard-00000.bin").is_symlink() and copy.stat().st_mode & 0o777 == 0o700
    assert (copy / "shard-00000.bin").read_bytes() == (tmp_path / "s" / "shard-00000.bin").read_bytes()


@pytest.mark.parametrize("name", ["shard-00001.bin", "shard-00000.idx", "manifest.json"])
def test_a_copy_that_was_altered_is_made_again(tmp_path, name) -> None:
    make(tmp_path / "s", [[50, 30], [40]])
    copy = stage(tmp_path / "s", tmp_path / "local")
    content, times = (copy / name).read_bytes(), (copy / name).stat()
    altered = content.replace(b"natural", b"unnatur") if name == "manifest.json" else bytes([content[0] ^ 1]) + content[1:]
    assert altered != content
    (copy / name).write_bytes(altered)
    os.utime(copy / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    if name == "manifest.json":
        (copy / name).write_bytes(content.replace(b'"eod_id": 0', b'"eod_id": 1'))
    assert stage(tmp_path / "s", tmp_path / "local") == copy and (copy / name).read_bytes() == content


def test_a_folder_that_is_a_link_and_a_damaged_original_are_refused(tmp_path) -> None:
    target, _ = planted(tmp_path)
    target.rmdir()
    target.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UserError, match="is not a folder of yours"):
        stage(tmp_path / "s", tmp_path / "local")
    target.unlink()
    content = bytearray((tmp_path / "s" / "shard-00000.bin").read_bytes())
    content[7] ^= 1
    (tmp_path / "s" / "shard-00000.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00000\.bin: altered"):
        stage(tmp_path / "s", tmp_path / "local")
