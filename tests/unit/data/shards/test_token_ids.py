"""Token ids beyond the vocabulary never leave a source, whatever way they are read, also from a file that has changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.data.loading.loader import Loader, validation_batches
from megatron_synth.data.loading.prefetch import Prefetcher
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
from megatron_synth.data.shards import native
from megatron_synth.data.shards.indexed import TOKEN_TYPES, ShardWriter
from megatron_synth.data.shards.source import Source, open_source
from tests.support import VOCAB_SIZE, write_source

pytestmark = pytest.mark.usefixtures("compiled_and_not")

LENGTH, TOKENS = 32, 32 * 40 + 1
PLACES = [0, 100, 642, TOKENS - 1]
"""First and last token of the stream, one within a window, one in a window that lies in both shards."""


def prepared(folder: Path, memory_map: bool) -> tuple[Source, type]:
    return open_source(write_source(folder / "web", 1, TOKENS), "web", memory_map=memory_map), np.uint16


def bare(folder: Path, memory_map: bool) -> tuple[Source, type]:
    writer = ShardWriter(folder / "web", np.dtype(np.int32))
    writer.add(np.random.default_rng(0).integers(0, VOCAB_SIZE, TOKENS).astype(np.int32), np.array([TOKENS], np.int32))
    writer.finish()
    source = open_source(folder / "web", "web", memory_map=memory_map)
    source.limit_ids(VOCAB_SIZE)
    return source, np.int32


def changed(source: Source, place: int, token: int, dtype: type) -> str:
    """Write an id into the file of an open source; what the message must name."""
    for number in range(1 if source.manifest is None else len(source.manifest.shards)):
        shard = source.shard(number)
        if place < shard.num_tokens:
            break
        place -= shard.num_tokens
    size = np.dtype(dtype).itemsize
    with open(shard.bin_path, "r+b") as file:
        file.seek(place * size)
        file.write(np.array([token], dtype).tobytes())
    return rf"{shard.bin_path.name}, byte {place * size}: token id {token}, the ids of the vocabulary are 0 to {VOCAB_SIZE - 1}"


def loader_of(source: Source, dtype: type) -> Loader:
    plan = MixturePlan([SourceSpec("web", Fraction(1), source.num_windows(LENGTH), math.inf)], 0)
    return Loader(
        plan,
        [source],
        sequence_length=LENGTH,
        micro_batch_size=4,
        data_parallel_rank=0,
        data_parallel_size=1,
        dtype=dtype,
    )


@pytest.mark.parametrize(("wide", "memory_map"), [(np.int64, True), (np.int32, True), (np.int64, False)])
@pytest.mark.parametrize(("make", "token"), [(prepared, VOCAB_SIZE), (prepared, 65535), (bare, VOCAB_SIZE), (bare, -1)])
def test_a_file_that_changed_is_refused_by_the_batch_that_would_hold_it(
    tmp_path: Path, make: Callable[[Path, bool], tuple[Source, type]], token: int, wide: type, memory_map: bool
) -> None:
    source, dtype = make(tmp_path, memory_map)
    loader = loader_of(source, wide)
    whole = [batch.tokens.copy() for batch in loader.micro_batches(0, 40)]
    assert min(tokens.min() for tokens in whole) >= 0 and max(tokens.max() for tokens in whole) < VOCAB_SIZE
    for place in PLACES:
        before = source.shard(0).bin_path.read_bytes(), source.shard(-1).bin_path.read_bytes()
        message = changed(source, place, token, dtype)
        windows = {window for window in ((place - 1) // LENGTH, place // LENGTH) if 0 <= window < 40}
        refused = set()
        for step in range(10):
            held = {int(window) for window in loader.plan.places(np.arange(step * 4, step * 4 + 4))[1]}
            if held & windows:
                with pytest.raises(UserError, match=message):
                    list(loader.micro_batches(step * 4, 4))
                refused |= held & windows
            else:  # other windows are read as before
                (batch,) = loader.micro_batches(step * 4, 4)
                assert batch.tokens.min() >= 0 and batch.tokens.max() < VOCAB_SIZE
        assert refused == windows
        with Prefetcher(loader, 40) as prefetcher, pytest.raises(UserError, match=message):
            prefetcher.step(0)
        with pytest.raises(UserError, match=message):
            list(validation_batches(source, LENGTH, 4, 0, 1))
        source.shard(0).bin_path.write_bytes(before[0])
        source.shard(-1).bin_path.write_bytes(before[1])


def test_where_the_vocabulary_is_not_known_ids_are_handed_out_as_they_are(tmp_path: Path) -> None:
    source, dtype = bare(tmp_path, True)
    open_again = open_source(tmp_path / "web", "web")
    changed(source, 100, -5, dtype)
    assert open_again.vocab_size is None
    tokens = np.concatenate([batch.tokens for batch in loader_of(open_again, np.int64).micro_batches(0, 40)])
    assert tokens.min() == -5


@pytest.mark.parametrize("code", sorted(TOKEN_TYPES))
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("length", [5, 64, 151])
def test_compiled_rows_stop_before_the_first_with_an_id_beyond_the_vocabulary(code: int, wide: bool, length: int) -> None:
    library = native.library()
    if library is None:
        pytest.skip("the compiled copy is not there, or not wanted here")
    stored, size = np.dtype(TOKEN_TYPES[code]), 100
    smallest, largest = int(np.iinfo(stored).min), int(np.iinfo(stored).max)
    for place in (0, length // 2, length - 1):
        for token in {size, size + 1, largest, smallest, max(smallest, -1)} - {0}:
            tokens = np.random.default_rng(place).integers(0, size, (3, length)).astype(stored)
            tokens[:, 0], tokens[:, -1] = size - 1, 0  # both ends of the vocabulary
            tokens[1, place] = token
            maps, out = [np.array([native.address_of(tokens)])], np.zeros((3, length), np.int64 if wide else np.int32)
            rows = np.zeros(3, np.int64), np.zeros(3, np.int64), np.arange(3) * length
            copier = native.RowCopier(library, maps, [code], [size], *rows, length, wide=wide)
            assert copier.copy(0, 3, native.address_of(out)) == 1
            assert copier.copy(2, 3, native.address_of(out[2:])) == 3
            assert (out[2] == tokens[2]).all()
