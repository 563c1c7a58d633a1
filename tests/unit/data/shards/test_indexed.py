"""The Megatron format: our bytes for megatron-core, megatron-core's bytes for us."""

import struct
import warnings

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.data.shards.indexed import HEADER, Shard, ShardWriter, token_dtype, with_suffix

pytestmark = pytest.mark.usefixtures("compiled_and_not")

DTYPES = [np.uint16, np.int32]


def documents(dtype, count=40, seed=0):
    rng = np.random.default_rng(seed)
    top = min(np.iinfo(dtype).max, 200_000)
    return [rng.integers(0, top, rng.integers(1, 60), dtype=dtype, endpoint=True) for _ in range(count)]


def write(prefix, parts, dtype):
    writer = ShardWriter(prefix, np.dtype(dtype))
    half = len(parts) // 2
    for some in (parts[:half], parts[half:]):
        writer.add(np.concatenate(some), np.array([part.size for part in some]))
    return writer.finish()


@pytest.fixture(scope="module")
def megatron():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_core_reads_our_shards(tmp_path, megatron, dtype):
    parts = documents(dtype)
    write(tmp_path / "ours", parts, dtype)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert len(theirs) == len(parts)
    assert theirs.document_indices.tolist() == list(range(len(parts) + 1))
    for found, expected in zip([theirs[number] for number in range(len(parts))], parts, strict=True):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_our_bytes_are_megatron_cores_bytes(tmp_path, megatron, dtype):
    parts = documents(dtype)
    write(tmp_path / "ours", parts, dtype)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for part in parts:
        builder.add_document(part, [part.size])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_shards_with_many_sequences_and_empty_documents(tmp_path, megatron, dtype, multimodal):
    import torch

    sequences = documents(dtype, count=12)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=dtype, multimodal=multimodal)
    for number, sequence in enumerate(sequences):
        builder.add_item(torch.from_numpy(sequence.astype(np.int64)))
        if number in (2, 3, 7, 11):
            builder.end_document()
        if number in (3, 11):
            builder.end_document()  # a document without sequences, in the middle and at the end
    builder.finalize(str(tmp_path / "x.idx"))

    shard = Shard(tmp_path / "x")
    stream = np.concatenate(sequences)
    assert (shard.num_tokens, shard.num_documents, shard.dtype) == (stream.size, 6, dtype)
    np.testing.assert_array_equal(shard.tokens, stream)
    ends = np.cumsum([sequence.size for sequence in sequences])
    starts = [0, int(ends[2]), int(ends[3]), int(ends[7])]
    assert shard.document_starts(0, stream.size).tolist() == starts
    assert shard.document_starts(1, starts[2]).tolist() == starts[1:2]


@pytest.mark.parametrize(("vocab_size", "name"), [(65499, "uint16"), (65500, "int32"), (151_936, "int32")])
def test_token_type_is_megatron_cores_choice(megatron, vocab_size, name):
    assert token_dtype(vocab_size).name == name == megatron.DType.optimal_dtype(vocab_size).__name__


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("change", [-1, 2])
def test_wrong_sizes_are_refused_with_both_numbers(tmp_path, suffix, change):
    write(tmp_path / "x", documents(np.uint16), np.uint16)
    path = tmp_path / f"x{suffix}"
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    with pytest.raises(UserError) as error:
        Shard(tmp_path / "x")
    for part in (str(path), f"{len(data)} bytes", f"{len(data) + change} bytes", "copy it again"):
        assert part in str(error.value)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(tmp_path, suffix):
    write(tmp_path / "x", documents(np.uint16), np.uint16)
    (tmp_path / f"x{suffix}").unlink()
    with pytest.raises(UserError, match=f"x{suffix}: No such file"):
        Shard(tmp_path / "x")


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"PK", "not a Megatron index"),
        (9, struct.pack("<Q", 2), "not a Megatron index"),
        (17, b"\x06", "token type code 6"),
        (18, struct.pack("<Q", 2**60), "its header announces"),
    ],
)
def test_foreign_headers_are_refused(tmp_path, at, value, message):
    write(tmp_path / "x", documents(np.uint16), np.uint16)
    data = bytearray((tmp_path / "x.idx").read_bytes())
    data[at : at + len(value)] = value
    (tmp_path / "x.idx").write_bytes(data)
    with pytest.raises(UserError, match=message):
        Shard(tmp_path / "x")
    (tmp_path / "x.idx").write_bytes(data[: HEADER.size - 1])
    with pytest.raises(UserError, match=f"at least {HEADER.size} bytes"):
        Shard(tmp_path / "x")


def test_a_writer_that_never_finished_leaves_nothing_that_opens(tmp_path):
    writer = ShardWriter(tmp_path / "x", np.dtype(np.uint16))
    writer.add(np.arange(5, dtype=np.uint16), np.array([5]))
    writer.abandon()
    with pytest.raises(UserError):
        Shard(tmp_path / "x")


def test_names_with_dots_keep_them(tmp_path):
    parts = documents(np.int32)
    written = write(tmp_path / "v1.5-tokens", parts, np.int32)
    assert with_suffix(tmp_path / "v1.5-tokens", ".bin").stat().st_size == written.bin_bytes
    assert Shard(tmp_path / "v1.5-tokens").num_tokens == written.tokens == sum(part.size for part in parts)
