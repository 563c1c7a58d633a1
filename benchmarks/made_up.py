"""The manifest of a source that a benchmark has made up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_synth.data.shards.columns import ColumnInfo
from megatron_synth.data.shards.manifest import Counts, Manifest, Provenance, ShardInfo, TokenizerInfo


def save_manifest(
    folder: Path,
    shards: Sequence[ShardInfo],
    dtype: str,
    vocab_size: int,
    *,
    text_bytes: int = 0,
    columns: tuple[ColumnInfo, ...] = (),
) -> None:
    """Write the manifest of shards that are in a folder: a training source of its name, of a tokenizer that is not there.

    Args:
        folder: of the source.
        shards: what it has.
        dtype: of its tokens.
        vocab_size: of the tokenizer.
        text_bytes: of the text that the tokens stand for.
        columns: of its documents.
    """
    Manifest(
        name=folder.name,
        kind="other",
        generator=None,
        split="train",
        dtype=dtype,
        tokenizer=TokenizerInfo(path="tokenizer.json", fingerprint="0" * 64, vocab_size=vocab_size, eod_id=0),
        counts=Counts(
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            text_bytes=text_bytes,
        ),
        columns=columns,
        shards=tuple(shards),
        made=Provenance(program="benchmark", config_digest="0" * 64, inputs={}, holdout="0"),
    ).save(folder)
