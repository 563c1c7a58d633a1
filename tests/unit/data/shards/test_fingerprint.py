"""Bare pairs: token ids beyond the vocabulary are refused, and tokens that were replaced are noticed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_synth.config.errors import UserError
from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.data.loading.run_data import RunData, _hash, open_data
from megatron_synth.data.shards import fingerprint
from megatron_synth.data.shards.indexed import ShardWriter
from tests.support import write_config, write_corpus

VOCABULARY = 1000


def write(prefix: Path, tokens: np.ndarray) -> None:
    writer = ShardWriter(prefix, np.dtype(np.int32))
    writer.add(tokens.astype(np.int32), np.full(len(tokens) // 40, 40, np.int32))
    writer.finish()


def configuration(tmp_path: Path, *settings: str) -> Config:
    """A run on the pair x, validated on the pair v."""
    file = write_config(tmp_path / "run.yaml", tmp_path)
    content = yaml.safe_load(file.read_text())
    content["model"]["vocab_size"] = VOCABULARY
    content["data"]["sources"] = {"x": {"path": str(tmp_path / "x"), "ratio": 1, "max_epochs": 9}}
    content["data"]["validation"] = {"v": {"path": str(tmp_path / "v")}}
    file.write_text(yaml.safe_dump(content))
    return load_file(Config, file, settings)


@pytest.fixture
def tokens(tmp_path: Path) -> np.ndarray:
    generator = np.random.default_rng(0)
    for name in "xv":
        tokens = generator.integers(0, VOCABULARY, 4000)
        write(tmp_path / name, tokens)
    return tokens


@pytest.mark.parametrize("name", ["x", "v"])
@pytest.mark.parametrize("token", [1000, 1010, 5000, -1])
@pytest.mark.parametrize("read_bytes", [fingerprint.READ_BYTES, 64])
def test_ids_beyond_the_vocabulary_are_refused_with_file_byte_and_id(
    tmp_path: Path, tokens: np.ndarray, name: str, token: int, read_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "READ_BYTES", read_bytes)
    tokens[[777, 778, 3999]] = token
    write(tmp_path / name, tokens)
    with pytest.raises(
        UserError, match=rf"{name}\.bin, byte {777 * 4}: token id {token}, the ids of the vocabulary are 0 to 999"
    ):
        open_data(configuration(tmp_path))
    if token > 0:
        open_data(configuration(tmp_path, f"model.vocab_size={token + 1}"))


def test_a_pair_that_was_replaced_by_as_many_tokens_is_another(tmp_path: Path, tokens: np.ndarray) -> None:
    write(tmp_path / "x", tokens)
    before = open_data(configuration(tmp_path))
    times = (tmp_path / "x.bin").stat()
    other = tokens.copy()
    other[2000] = (other[2000] + 1) % VOCABULARY  # one token in the middle, the times put back
    write(tmp_path / "x", other)
    os.utime(tmp_path / "x.bin", ns=(times.st_atime_ns, times.st_mtime_ns))
    after = open_data(configuration(tmp_path))
    assert not after.is_of(before.digest) and not after.begins_as(before.prefix_digest(8), 8)
    write(tmp_path / "x", tokens)
    again = open_data(configuration(tmp_path))
    assert again.is_of(before.digest) and again.begins_as(before.prefix_digest(8), 8)


def test_documents_that_moved_make_another_pair(tmp_path: Path, tokens: np.ndarray) -> None:
    write(tmp_path / "x", tokens)
    before = open_data(configuration(tmp_path))
    writer = ShardWriter(tmp_path / "x", np.dtype(np.int32))
    writer.add(tokens.astype(np.int32), np.full(len(tokens) // 50, 50, np.int32))
    writer.finish()
    assert not open_data(configuration(tmp_path)).is_of(before.digest)


def test_a_run_from_before_pairs_were_read_goes_on(tmp_path: Path, tokens: np.ndarray) -> None:
    data = open_data(configuration(tmp_path))
    # what was recorded then: the plan, the length of a window, the number of tokens
    recorded = _hash([data.plan.digest(), 32, [4000]])
    assert data.digest != recorded and data.is_of(recorded)
    assert data.begins_as(_hash([data.plan.prefix_digest(8), 32, {"x": 4000}]), 8)


def test_prepared_sources_keep_their_digest(tmp_path: Path) -> None:
    data: RunData = open_data(load_file(Config, write_config(tmp_path / "run.yaml", write_corpus(tmp_path / "corpus"))))
    assert data.digest == data.sizes_digest
