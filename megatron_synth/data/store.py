"""Prepared sources as one stream of tokens each, cut into windows.

The stream of a source is the concatenation of its documents over all shards in order. With sequence length S, window
w is tokens [w*S, w*S + S + 1): neighbouring windows share one token, the last label of the one and the first input of
the next.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.data.indexed import AGAIN, Shard, file_size, with_suffix
from megatron_synth.data.manifest import FILE_NAME, Manifest, TokenizerInfo


class Source:
    """An opened source. Opening reads some bytes per shard; tokens are mapped from disk when first asked for."""

    def __init__(self, name: str, path: Path, manifest: Manifest | None, shards: Sequence[Shard]):
        assert shards
        self.name, self.path, self.manifest = name, path, manifest
        self._shards = tuple(shards)
        self._ends: list[int] = np.cumsum([shard.num_tokens for shard in shards], dtype=np.int64).tolist()
        self.num_tokens: int = self._ends[-1]
        self.num_documents = sum(shard.num_documents for shard in shards)

    def __reduce__(self) -> tuple[Callable[..., Source], tuple[Any, ...]]:
        # a pickled memory map would carry the tokens themselves to another process
        return open_source, (self.path, self.name)

    @property
    def tokenizer_path(self) -> Path | None:
        """Where the manifest says that tokenizer.json is; None without a manifest."""
        return None if self.manifest is None else self.path / self.manifest.tokenizer.path

    def num_windows(self, sequence_length: int) -> int:
        """Whole windows of `sequence_length` inputs and as many labels."""
        return max(self.num_tokens - 1, 0) // sequence_length

    def read_window(self, window: int, out: np.ndarray) -> None:
        """Fill `out` [S + 1], of any integer type that holds the vocabulary, with the tokens of window `window`."""
        assert out.ndim == 1 and 0 <= window < self.num_windows(out.size - 1), (self.name, window, out.shape)
        position, filled = window * (out.size - 1), 0
        shard = bisect_right(self._ends, position)
        while filled < out.size:
            tokens = self._shards[shard].tokens
            local = position + filled - (self._ends[shard] - tokens.size)
            part = tokens[local : local + out.size - filled]
            out[filled : filled + part.size] = part
            filled += part.size
            shard += 1

    def document_starts(self, window: int, sequence_length: int) -> np.ndarray:
        """Offsets in [0, S) of this window at which a document starts, ascending, int64. Reads the index, no tokens."""
        assert 0 <= window < self.num_windows(sequence_length), (self.name, window, sequence_length)
        begin, end = window * sequence_length, (window + 1) * sequence_length
        starts = []
        shard = bisect_right(self._ends, begin)
        while shard < len(self._shards) and self._ends[shard] - self._shards[shard].num_tokens < end:
            base = self._ends[shard] - self._shards[shard].num_tokens
            local = self._shards[shard].document_starts(max(begin - base, 0), min(end, self._ends[shard]) - base)
            starts.append(local + (base - begin))
            shard += 1
        return np.concatenate(starts)


def open_source(path: str | Path, name: str) -> Source:
    """Open a folder with a manifest.json, or the prefix of a bare Megatron .bin/.idx pair.

    Sizes are checked against index and manifest; a UserError names the file, the expected and the found bytes.
    """
    path = Path(path)
    if path.is_dir():
        manifest = Manifest.load(path)
        return Source(name, path, manifest, [_open_checked(path, manifest, number) for number in range(len(manifest.shards))])
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if not with_suffix(prefix, ".idx").exists() and not with_suffix(prefix, ".bin").exists():
        raise UserError(
            f"{path}: source {name!r} not found; expected a folder with {FILE_NAME} (made by `megatron-synth prepare`) "
            f"or the prefix of a Megatron .bin/.idx pair"
        )
    return Source(name, prefix, None, [Shard(prefix)])


def _open_checked(folder: Path, manifest: Manifest, number: int) -> Shard:
    info = manifest.shards[number]
    prefix = folder / info.name
    for suffix, expected in ((".bin", info.bin_bytes), (".idx", info.idx_bytes)):
        found = file_size(with_suffix(prefix, suffix))
        if found != expected:
            raise UserError(
                f"{with_suffix(prefix, suffix)}: {FILE_NAME} announces {expected} bytes, found {found} bytes; {AGAIN}"
            )
    shard = Shard(prefix)
    if (shard.num_tokens, shard.num_documents, shard.dtype.name) != (info.tokens, info.documents, manifest.dtype):
        raise UserError(
            f"{shard.idx_path}: {FILE_NAME} announces {info.tokens} tokens of {info.documents} documents as "
            f"{manifest.dtype}, the index {shard.num_tokens} of {shard.num_documents} as {shard.dtype.name}; {AGAIN}"
        )
    return shard


def check_compatible(sources: Sequence[Source]) -> TokenizerInfo | None:
    """The tokenizer that all sources with a manifest share; None when none has a manifest.

    A UserError names the first two sources whose tokens come from different tokenizers.
    """
    first: tuple[Source, TokenizerInfo] | None = None
    for source in sources:
        if source.manifest is None:
            continue
        info = source.manifest.tokenizer
        if first is None:
            first = (source, info)
        elif (info.fingerprint, info.eod_id) != (first[1].fingerprint, first[1].eod_id):
            described = [
                f"{one.name!r} ({one.tokenizer_path}, {tokenizer.vocab_size} tokens, end of document "
                f"{tokenizer.eod_id}, fingerprint {tokenizer.fingerprint[:12]})"
                for one, tokenizer in (first, (source, info))
            ]
            raise UserError(
                f"sources {described[0]} and {described[1]} were made with different tokenizers: the same id means "
                f"different text; prepare one of them again with the other's tokenizer.json as `tokenizer.path`"
            )
    return None if first is None else first[1]
