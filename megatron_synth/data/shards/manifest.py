"""manifest.json: what the Megatron format does not say about a prepared source."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import MAX_COLUMNS, Kind, Split
from megatron_synth.config.section import NonNegativeInt, PositiveInt, Section
from megatron_synth.core.files import write_json
from megatron_synth.core.names import plain_name
from megatron_synth.data.shards.block_hash import BLOCK_BYTES, DIGITS, block_count
from megatron_synth.data.shards.columns import SUFFIX as COLUMNS
from megatron_synth.data.shards.columns import ColumnInfo, layout
from megatron_synth.data.shards.learned import SUFFIX as LEARNED
from megatron_synth.data.shards.learned import mask_bytes
from megatron_synth.storage.faults import ObjectMissing
from megatron_synth.storage.objects import read_location
from megatron_synth.storage.remote import Location, Remote, remote

FILE_NAME = "manifest.json"
FORMAT_VERSION: Literal[2] = 2  # 2 added the checksums of blocks and the seed of the shuffle
READABLE_VERSIONS = (1, 2)

MAX_BLOCK_BYTES = 2**30
MAX_BYTES = 2**62
"""Of all shards of a source together: byte offsets stay within 64 bits."""

Sha256 = Annotated[str, Field(max_length=64)]
Size = Annotated[int, Field(ge=0, le=MAX_BYTES)]


def _plain(name: str) -> str:
    return plain_name(name, "name")


def _beside(path: str) -> str:
    """A file in the folder of the manifest, or in the one above it."""
    plain_name(path.removeprefix("../"), "path")
    return path


class TokenizerInfo(Section):
    """The tokenizer that made the tokens."""

    path: Annotated[str, AfterValidator(_beside)]
    """tokenizer.json, in the folder of the manifest or, with `../`, in the one above."""
    fingerprint: Sha256
    """SHA-256 of its canonical content; equal fingerprints give equal tokens."""
    vocab_size: Annotated[int, Field(ge=1, le=2**31)]
    """Largest token id + 1."""
    eod_id: NonNegativeInt
    """The token that ends each document."""


class Counts(Section):
    """How much there is."""

    documents: Size
    tokens: Size
    """End-of-document tokens included."""
    text_bytes: Size
    """UTF-8 bytes of the text, without what separates documents: the denominator of bits per byte."""


class ShardInfo(Section):
    """One .bin/.idx pair."""

    name: Annotated[str, AfterValidator(_plain)]
    """File name without suffix."""
    documents: Size
    tokens: Size
    bin_bytes: Size
    idx_bytes: Size
    bin_sha256: Sha256
    idx_sha256: Sha256
    bin_blocks: str | None = None
    """XXH3 of each block of the .bin file, 16 hexadecimal digits each, joined; null in version 1."""
    columns_bytes: Size | None = None
    """Of the .columns file; null where the source has no columns."""
    columns_sha256: Sha256 | None = None

    learned_tokens: Size | None = None
    """Tokens that are learned; null where all of them are and there is no .learned file."""
    learned_sha256: Sha256 | None = None
    """Of the .learned file."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of its files, by how their names end."""
        found = {".bin": self.bin_bytes, ".idx": self.idx_bytes}
        if self.columns_bytes is not None:
            found[COLUMNS] = self.columns_bytes
        if self.learned_tokens is not None:
            found[LEARNED] = mask_bytes(self.tokens)
        return found

    @property
    def checksums(self) -> dict[str, str | None]:
        """SHA-256 of its files, likewise."""
        known = {".bin": self.bin_sha256, ".idx": self.idx_sha256, COLUMNS: self.columns_sha256, LEARNED: self.learned_sha256}
        return {suffix: known[suffix] for suffix in self.sizes}


class PackingInfo(Section):
    """What putting documents into windows whole has done."""

    sequence_length: PositiveInt
    """Tokens of a window; with another, windows begin inside documents again."""
    padding_tokens: Size
    """End-of-document tokens that fill windows, part of the tokens counted."""
    cut_documents: Size
    """Documents in more than one window: those longer than one."""
    cut_without: Size
    """Documents that would be cut had they been laid end to end."""


class Provenance(Section):
    """How the source was made. Nothing here differs between two runs that do the same."""

    program: str
    """Name and version of the program."""
    config_digest: Sha256
    """Digest of the settings and of the inputs."""
    inputs: dict[str, Any]
    """Where the text came from."""
    holdout: str
    """The share of the documents that the validation split got, such as 1/20; 0 when there is none."""
    shuffle_seed: Size | None = None
    """Seed of the shuffle of the documents; null when they stand in the order of the input."""
    skipped_records: NonNegativeInt = 0
    """Records of the input that were left out because they are no text; not written when there are none."""


class Manifest(Section):
    """A prepared source: identity, size, shards, origin."""

    format_version: Literal[1, 2] = FORMAT_VERSION
    name: str
    kind: Kind
    generator: str | None
    """What wrote the text: a model's name, `rule`; null for natural text."""
    split: Split
    dtype: Literal["uint16", "int32"]
    """Type of the stored tokens."""
    tokenizer: TokenizerInfo
    counts: Counts
    packing: PackingInfo | None = None
    """Null when documents lie end to end."""
    columns: tuple[ColumnInfo, ...] = Field((), max_length=MAX_COLUMNS)
    """What each document has beside its tokens; not written where there are none."""
    block_bytes: Annotated[int, Field(ge=1, le=MAX_BLOCK_BYTES)] = BLOCK_BYTES
    """Size of the blocks that `bin_blocks` are the checksums of."""
    shards: tuple[ShardInfo, ...] = Field(min_length=1)
    made: Provenance

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        for shard in self.shards:
            count = block_count(shard.bin_bytes, self.block_bytes)
            if shard.bin_blocks is not None and len(shard.bin_blocks) != count * DIGITS:
                raise ValueError(f"{shard.name}: {len(shard.bin_blocks) // DIGITS} checksums for {count} blocks")
        token_bytes = {"uint16": 2, "int32": 4}[self.dtype]
        for shard in self.shards:
            if shard.bin_bytes != shard.tokens * token_bytes:
                raise ValueError(f"{shard.name}: {shard.bin_bytes} bytes for {shard.tokens} tokens of {token_bytes} bytes each")
        if len({column.name for column in self.columns}) < len(self.columns):
            raise ValueError("a column is named twice")
        for shard in self.shards:
            size = layout(self.columns, shard.documents)[1] if self.columns else None
            if shard.columns_bytes != size or (shard.columns_sha256 is None) != (size is None):
                raise ValueError(f"{shard.name}: {shard.columns_bytes} bytes of columns, expected {size} and their checksum")
        for shard in self.shards:
            if (shard.learned_tokens is None) != (shard.learned_sha256 is None):
                raise ValueError(f"{shard.name}: expected both learned_tokens and learned_sha256, or none")
            if (shard.learned_tokens is None) == self.masked or (shard.learned_tokens or 0) > shard.tokens:
                raise ValueError(
                    f"{shard.name}: {shard.learned_tokens} learned tokens of {shard.tokens}, or of some shards alone"
                )
        if len({shard.name for shard in self.shards}) < len(self.shards):
            raise ValueError("a shard is named twice")
        for what in ("documents", "tokens"):
            total, counted = sum(getattr(shard, what) for shard in self.shards), getattr(self.counts, what)
            # documents that packing had to cut are several in the shards
            if total != counted and not (what == "documents" and self.packing is not None and total > counted):
                raise ValueError(f"counts.{what} is {counted}, the shards have {total}")
        if self.tokenizer.eod_id >= self.tokenizer.vocab_size:
            raise ValueError(f"tokenizer.eod_id is {self.tokenizer.eod_id}, the vocabulary has {self.tokenizer.vocab_size}")
        return self

    @property
    def masked(self) -> bool:
        """Whether files say which tokens are learned."""
        return self.shards[0].learned_tokens is not None

    @property
    def learned_tokens(self) -> int:
        """Tokens that are learned."""
        return sum(shard.tokens if shard.learned_tokens is None else shard.learned_tokens for shard in self.shards)

    def digest(self) -> str:
        """SHA-256 that two sources share exactly when they hold the same tokens of the same tokenizer, and learn the same."""
        content: dict[str, Any] = {
            "tokenizer": self.tokenizer.fingerprint,
            "eod_id": self.tokenizer.eod_id,
            "dtype": self.dtype,
            "shards": [[shard.bin_sha256, shard.idx_sha256] for shard in self.shards],
        }
        if self.masked:
            content["learned"] = [shard.learned_sha256 for shard in self.shards]
        return canonical_digest(content)

    def save(self, folder: Path) -> None:
        """Write `folder`/manifest.json."""
        data = self.model_dump(mode="json")
        # what programs before these did not know is left out where there is none of it: they read the rest
        if self.packing is None:
            del data["packing"]
        if not self.columns:
            del data["columns"]
            for shard in data["shards"]:
                del shard["columns_bytes"], shard["columns_sha256"]
        if not self.masked:
            for shard in data["shards"]:
                del shard["learned_tokens"], shard["learned_sha256"]
        for column in data.get("columns", ()):
            for name in [name for name in ("parent", "categories") if not column[name]]:
                del column[name]
        if not self.made.skipped_records:
            del data["made"]["skipped_records"]
        write_json(folder / FILE_NAME, data)

    def tokenizer_of(self, folder: Location) -> Location:
        """Where the tokenizer of the source in a folder lies."""
        path = self.tokenizer.path
        if isinstance(folder, Remote) and path.startswith("../"):
            return remote(folder.url.rpartition("/")[0]) / path.removeprefix("../")
        return folder / path

    @classmethod
    def load(cls, folder: Location) -> Manifest:
        """Read `folder`/manifest.json; a UserError when it is missing or not one of ours."""
        path = folder / FILE_NAME
        try:
            text = read_location(path).decode("utf-8")
        except ObjectMissing:
            raise UserError(f"{path}: no such object; expected a prepared source, see `megatron-synth prepare`") from None
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}; expected a prepared source, the output of `megatron-synth prepare`"
            ) from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); prepare the source again") from None
        try:
            # JSON has no tuples: validate it as JSON, not as Python objects
            found = cls.model_validate_json(text)
            if "format_version" in found.model_fields_set:
                return found
            problem = ""
        except ValidationError as error:
            first = error.errors()[0]
            problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        # which of the things that may be wrong: large manifests are parsed once where nothing is
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as broken:
            raise UserError(f"{path}: broken JSON, {str(broken)[:200]}; prepare the source again") from None
        version = data.get("format_version") if isinstance(data, dict) else None
        if version not in READABLE_VERSIONS:
            known = " and ".join(map(str, READABLE_VERSIONS))
            raise UserError(f"{path}: format_version {version!r:.40}, this program reads {known}; prepare the source again")
        raise UserError(f"{path}: {problem}; prepare the source again")


def canonical_digest(value: Any) -> str:
    """SHA-256 of `value` as JSON with sorted keys and no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
