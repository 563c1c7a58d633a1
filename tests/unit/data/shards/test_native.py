"""Compiled copying: every token type, rows out of many shards, and reads of memory maps that fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.data.loading.loader import Loader
from megatron_synth.data.loading.prefetch import Prefetcher
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
from megatron_synth.data.shards import native
from megatron_synth.data.shards.indexed import TOKEN_TYPES, ShardWriter
from megatron_synth.data.shards.source import open_source

PAGE = 4096
SIZES = {"sequence_length": 64, "micro_batch_size": 4, "data_parallel_rank": 0, "data_parallel_size": 1}

needs_compiled = pytest.mark.skipif(native.library() is None, reason="nothing was compiled: there was no C compiler")


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_machine_with_a_compiler_has_the_compiled_functions() -> None:
    assert native.missing() is None


@needs_compiled
def test_functions_of_another_version_are_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments of this version would be read as what they are not, and end the process."""
    compiled = native._compiled()
    assert compiled is not None
    shutil.copy(compiled, tmp_path)
    shutil.copy(compiled.with_name("native.c"), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(native, "__file__", str(tmp_path / "native.py"))
        native.library.cache_clear()
        assert native.library() is not None
        (tmp_path / "native.c").write_text("/* changed since */")
        native.library.cache_clear()
        assert native.library() is None and "of another version; install megatron-synth again" in str(native.missing())
        (tmp_path / "native.c").unlink()  # as where a wheel was installed
        native.library.cache_clear()
        assert native.library() is not None
    native.library.cache_clear()


@needs_compiled
@pytest.mark.parametrize("code", sorted(TOKEN_TYPES))
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_rows_of_every_token_type_are_copied_as_numpy_would(code: int, dtype: type) -> None:
    stored = np.dtype(TOKEN_TYPES[code])
    generator = np.random.default_rng(code)
    largest = min(np.iinfo(stored).max, np.iinfo(np.int32).max)
    maps = [generator.integers(np.iinfo(stored).min // 4, largest, 5000).astype(stored) for _ in range(3)]
    maps[1][:3] = np.iinfo(stored).max if stored.itemsize < 8 else 7
    # the row in shard 3 lies nowhere, the one in shard -1 in several
    shards = np.array([0, 1, 2, 1, 3, 0, -1, 2])
    begins = np.array([0, 0, 4999 - 150, 77, 0, 5000 - 151, 0, 3])
    where = [np.array([native.address_of(one) for one in maps] + [0])]
    out = np.full((8, 151), -1, dtype)
    library = native.library()
    assert library is not None
    copier = native.RowCopier(
        library, where, [code], [None], np.zeros(8, np.int64), shards, begins, 151, wide=dtype is np.int64
    )
    address = native.address_of(out)
    assert copier.copy(0, 8, address) == 4
    assert copier.copy(5, 8, address + 5 * out.strides[0]) == 6
    assert copier.copy(7, 8, address + 7 * out.strides[0]) == 8
    for row in (0, 1, 2, 3, 5, 7):
        np.testing.assert_array_equal(out[row], maps[shards[row]][begins[row] : begins[row] + 151].astype(dtype))
    assert (out[[4, 6]] == -1).all()


def write(prefix: Path, documents: int, length: int = 32) -> None:
    writer = ShardWriter(prefix, np.dtype(np.uint16))
    writer.add(np.arange(documents * length, dtype=np.uint16), np.full(documents, length, np.int32))
    writer.finish()


def loader_of(prefix: Path, **options: bool) -> Loader:
    source = open_source(prefix, "web")
    plan = MixturePlan([SourceSpec("web", Fraction(1), source.num_windows(64), 1e9)], 0)
    return Loader(plan, [source], **SIZES, **options)


def read_until_it_fails(loader: Loader) -> tuple[UserError, int]:
    """The error, and the lowest window of the batch that met it."""
    for first in range(0, 4000, 4):
        try:
            list(loader.micro_batches(first, 4))
        except UserError as error:
            return error, int(loader.plan.locate(np.arange(first, first + 4))[1].max())
    raise AssertionError("nothing failed")


@needs_compiled
@pytest.mark.parametrize("threaded", [False, True])
def test_a_file_that_is_cut_off_while_it_is_read_is_a_message(tmp_path: Path, threaded: bool) -> None:
    write(tmp_path / "web", 8 * PAGE // 32)
    loader = loader_of(tmp_path / "web")
    list(loader.micro_batches(0, 4))
    os.truncate(tmp_path / "web.bin", 5 * PAGE)
    expected = (
        rf"web\.bin: the system could not read it at offset \d+ \(bus error\); the file has {5 * PAGE} bytes now: it was cut"
    )
    if threaded:
        with Prefetcher(loader, 4) as prefetcher, pytest.raises(UserError, match=expected):
            for step in range(1000):
                prefetcher.step(step * 4)
        return
    error, window = read_until_it_fails(loader)
    with pytest.raises(UserError, match=expected):
        raise error
    # the offset is the first byte that is not there, or lies in the window that was asked for
    offset = int(str(error).split("at offset ")[1].split()[0])
    assert 5 * PAGE <= offset < (window * 64 + 65) * 2
    # whole pages that are still there are served on
    source = loader.sources[0]
    out = np.zeros(65, np.int64)
    source.read_window(0, out)
    np.testing.assert_array_equal(out, np.arange(65))
    with pytest.raises(UserError, match=expected):
        source.read_window(source.num_windows(64) - 1, out)


@needs_compiled
def test_an_index_that_is_cut_off_while_it_is_read_is_a_message(tmp_path: Path) -> None:
    write(tmp_path / "web", 40_000, 4)
    loader = loader_of(tmp_path / "web", with_boundaries=True)
    list(loader.micro_batches(0, 4))
    os.truncate(tmp_path / "web.idx", 2 * PAGE)
    error, _ = read_until_it_fails(loader)
    assert str(tmp_path / "web.idx") in str(error) and f"the file has {2 * PAGE} bytes now" in str(error)
    with pytest.raises(UserError, match=r"web\.idx: the system could not read it"):
        loader.sources[0].document_starts_of(np.arange(600, 700), 64)


@needs_compiled
def test_a_bus_error_elsewhere_still_ends_the_process(tmp_path: Path) -> None:
    write(tmp_path / "web", PAGE)
    program = """
import mmap, os, sys
import numpy as np
from megatron_synth.data.shards.indexed import Shard
from pathlib import Path
shard = Shard(Path(sys.argv[1]))
shard.read(0, np.empty(8, np.int64))
os.truncate(sys.argv[1] + ".bin", 0)
print("still here", flush=True)
shard.tokens.sum()
print("not here")
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "web")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-7, "still here\n")


@needs_compiled
def test_shards_that_are_closed_and_opened_again_are_read_right(tmp_path: Path) -> None:
    write(tmp_path / "web", PAGE)
    loader = loader_of(tmp_path / "web", with_boundaries=True)
    source = loader.sources[0]
    for first in range(0, 400, 4):
        batch = next(loader.micro_batches(first, 4))
        _, windows = loader.plan.locate(batch.samples)
        np.testing.assert_array_equal(batch.tokens, (windows[:, None] * 64 + np.arange(65)) % 65536)
        if first % 8:
            source.shard(0).close()  # type: ignore[attr-defined]
            assert not source.places.tokens.any() and not source.places.indexes.any()
