"""All data of a run, opened and checked before anything long begins."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.config.expression import parse
from megatron_synth.config.schema import Config, Progress, SourceConfig, ValidationConfig
from megatron_synth.core.files import cache_folder
from megatron_synth.core.process_time import span
from megatron_synth.data.answers import AnswerDomain, open_answers
from megatron_synth.data.loading import shared_content
from megatron_synth.data.loading.loader import validation_windows
from megatron_synth.data.loading.values import Values, check_column, values_of
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec, windows_in
from megatron_synth.data.mixing.schedule import phases_of
from megatron_synth.data.shards.checksums import BlockChecker
from megatron_synth.data.shards.fingerprint import content_of
from megatron_synth.data.shards.manifest import Manifest, TokenizerInfo
from megatron_synth.data.shards.selection import Int64, ids_of, parents_of, select
from megatron_synth.data.shards.source import WHOLE, Source, check_compatible, open_source
from megatron_synth.data.staging.copies import DOCUMENT_FILES, copied_file, copy_name, head, stage, stage_documents
from megatron_synth.data.staging.limit import claim
from megatron_synth.data.tokenizer import fingerprint_of
from megatron_synth.storage.remote import Location, Remote, location_of


@dataclass(frozen=True)
class RunData:
    """The opened sources of a run and the order of their samples."""

    plan: MixturePlan
    sources: tuple[Source, ...]
    """In the plan's order."""
    validation: dict[str, Source]
    """By domain."""
    vocab_size: int
    """Tokens of the vocabulary, before the embedding is padded."""
    eod_id: int | None
    """The token that ends a document, where a manifest tells."""
    tokenizer: Path | None
    """tokenizer.json, where it is known."""
    digest: str
    """Of all that decides which tokens sample n holds: the plan, the sequence length, the sources' content."""
    window_length: int
    """Tokens of a sample."""
    windows_per_sequence: int
    sizes_digest: str
    """As `digest`, but of bare pairs the number of tokens alone: what runs recorded before pairs were read whole."""
    contents: Mapping[str, str | int]
    """Of each source, by name, what stands for its tokens; taken when it was opened."""
    tokenizer_fingerprint: str | None = None
    """Of the tokenizer that made the tokens, where a manifest tells."""
    answers: Mapping[str, AnswerDomain] = field(default_factory=dict)
    """Domains of questions, by name."""
    values: Values | None = None
    """Of the documents of sources and domains, where losses are told apart by them and the files are there to be read."""
    notes: tuple[str, ...] = ()
    """What is likely a mistake in the choice of sources, to be said before training."""

    def checked_tokenizer(self) -> Path | None:
        """tokenizer.json, read; None if it is not known, or is not where it was when the data was made.

        Raises:
            UserError: the file is no tokenizer, or another one than made the tokens.
        """
        if self.tokenizer is None or not self.tokenizer.is_file():
            return None
        found = fingerprint_of(self.tokenizer)
        if self.tokenizer_fingerprint not in (None, found):
            raise UserError(
                f"{self.tokenizer}: expected the tokenizer that made the data (fingerprint {self.tokenizer_fingerprint:.12}), "
                f"found another one ({found:.12}); restore the file, or set data.tokenizer to a copy of the right one"
            )
        return self.tokenizer

    def is_of(self, plan_digest: str) -> bool:
        """Whether a run that recorded this digest has this data, as far as its age tells."""
        return plan_digest in (self.digest, self.sizes_digest)

    def begins_as(self, prefix_digest: str, samples: int) -> bool:
        """Whether a run that recorded this prefix digest had the same first `samples` samples, as far as its age tells."""
        return prefix_digest in (
            self.prefix_digest(samples),
            self._prefix_digest(samples, {source.name: _size(source) for source in self.sources}),
        )

    def prefix_digest(self, samples: int) -> str:
        """Of all that decides which tokens the first `samples` samples hold.

        Unlike `digest` it is the same for a mixture that changes only after them: a run may go on with such a one.
        """
        return self._prefix_digest(samples, self.contents)

    def _prefix_digest(self, samples: int, contents: Mapping[str, str | int]) -> str:
        used = self.plan.prefix_names(samples)
        content = {source.name: contents[source.name] for source in self.sources if source.name in used}
        return _hash([self.plan.prefix_digest(samples), *_shape(self.window_length, self.windows_per_sequence), content])

    def check_length(self, config: Config, progress: Progress) -> None:
        """Refuse (UserError) a run that goes on from `progress` when sources or phases do not suffice for what is to come."""
        total = config.samples_at_end(progress)
        self.plan.check(total, self.window_length, progress.samples)
        shared_content.check_epochs(self.plan, self.sources, total)


def open_data(
    config: Config,
    *,
    staged: bool = False,
    training: bool = True,
    check_length: bool = True,
    part: tuple[int, int] = WHOLE,
) -> RunData:
    """Open every source and domain of the configuration and check that the run can be made with them.

    check_length: also that the sources and phases suffice for a run of this configuration from its beginning. A run that goes
    on is held against what it has consumed instead (`RunData.check_length`).
    staged: then copy them to `data.staging`, where the configuration has it, and read the copies. They hold the same tokens:
    plan, digests and the paths that a run remembers are those of the originals. Without, there are of sources in object storage
    only the manifests: enough to plan with, and nothing to read tokens from.
    training: also open the sources; without them the run can be evaluated, and they need not be there.
    part: (rank, ranks) where all ranks open the data: see `open_source`.

    Raises:
        UserError: a file is missing or damaged, tokenizers differ, the vocabulary does not fit, a source is too small.
    """
    sequence = config.train.sequence_length
    named = config.data.sources.items() if training else ()
    sources = tuple(open_or_head(config, entry, name, part) for name, entry in named)
    for source in sources:
        _check_packing(source, config)
    validation = {name: open_or_head(config, entry, name, part) for name, entry in config.data.validation.items()}
    validation = chosen_domains(config, validation)
    sources = chosen(config, sources, validation)
    info = check_compatible([*sources, *validation.values()])
    vocab_size = vocab_size_of(config, info)
    if vocab_size is None:
        raise UserError(
            "model.vocab_size: not set, and no source has a manifest.json that names its tokenizer; set it to the "
            "tokenizer's number of tokens"
        )
    length, number = config.window_length, config.data.windows_per_sequence
    plan = plan_of(config, dict.fromkeys(config.data.sources) | {source.name: source.num_tokens for source in sources})
    if training and check_length:
        plan.check(config.total_samples, length)
        shared_content.check_epochs(plan, sources, config.total_samples)
    notes = tuple(shared_content.notes(sources, validation, config.data.exclude_parents_of is not None))
    for domain in validation.values():
        validation_windows(domain, sequence)
    known = (source.tokenizer_path for source in (*sources, *validation.values()) if source.tokenizer_path)
    tokenizer = _tokenizer(config) or next(known, None)
    for source in (*sources, *validation.values()):
        if source.manifest is None:
            content_of(source.shard(0)).check_ids(source.shard(0).bin_path, vocab_size)
            source.limit_ids(vocab_size)
    contents = {source.name: _content(source) for source in sources}
    shape, sizes = _shape(length, number), [_size(source) for source in sources]
    digest, sizes_digest = (_hash([plan.digest(), *shape, content]) for content in ([*contents.values()], sizes))
    if staged and config.data.staging is not None:
        folder = Path(config.data.staging)
        _check_staging([*sources, *validation.values()])
        with span("staging"):
            originals = {source: _original(source, config.data.sources) for source in sources}
            originals |= {source: _original(source, config.data.validation) for source in validation.values()}
            claim(folder, dict(_copy_of(source, place) for source, place in originals.items()), config.data.staging_bytes)
            copies = {source: _open(config, stage(place, folder), source.name) for source, place in originals.items()}
            validation = chosen_domains(config, {name: copies[source] for name, source in validation.items()})
            sources = chosen(config, [copies[source] for source in sources], validation)
    eod_id = info.eod_id if info else None
    answers = {
        name: open_answers(name, one, tokenizer, eod_id, vocab_size, sequence) for name, one in config.data.answers.items()
    }
    for name in config.log.loss_by:
        check_column(name, [*sources, *validation.values()])
    values = values_of(config.log.loss_by, sources, validation.values()) if staged and config.log.loss_by else None
    return RunData(
        plan=plan,
        sources=sources,
        validation=validation,
        vocab_size=vocab_size,
        eod_id=eod_id,
        tokenizer=tokenizer,
        digest=digest,
        window_length=length,
        windows_per_sequence=number,
        sizes_digest=sizes_digest,
        contents=contents,
        tokenizer_fingerprint=info.fingerprint if info else None,
        answers=answers,
        values=values,
        notes=notes,
    )


def chosen(config: Config, sources: Iterable[Source], domains: Mapping[str, Source]) -> tuple[Source, ...]:
    """Sources of the configuration, each with the documents alone that it chooses. domains: those of validation.

    Raises:
        UserError: documents cannot be chosen so.
    """
    opened, without = tuple(sources), None
    if opened and config.data.exclude_parents_of is not None:
        key = "data.exclude_parents_of"
        if not any(map(parents_of, opened)):
            raise UserError(f"{key}: no source has a column of type parent; prepare one with it, or set it to null")
        without = np.unique(np.concatenate([ids_of(domain, key) for domain in domains.values()]))
    found = []
    for source in opened:
        where = config.data.sources[source.name].where
        ids = without if parents_of(source) else None
        key = f"data.sources.{source.name}.where" if where is not None else "data.exclude_parents_of"
        found.append(_select(config, source, where, key, ids))
    return tuple(found)


def chosen_domains(config: Config, domains: Mapping[str, Source]) -> dict[str, Source]:
    """Domains of the configuration, each with the documents alone that it chooses."""
    return {
        name: _select(config, source, config.data.validation[name].where, f"data.validation.{name}.where")
        for name, source in domains.items()
    }


def _select(config: Config, source: Source, where: str | None, key: str, without: Int64 | None = None) -> Source:
    if where is None and without is None:
        return source
    return select(source, None if where is None else parse(where), _cache(config), key, without)


def _cache(config: Config) -> Path:
    if config.data.cache is not None:
        return Path(config.data.cache)
    return cache_folder()


def _check_staging(sources: Sequence[Source]) -> None:
    bare = [source for source in sources if source.manifest is None]
    if bare:
        raise UserError(
            f"data.staging: {bare[0].path}: source {bare[0].name!r} has no manifest.json, by which a copy is known to be "
            "whole; prepare it again, or copy it yourself and set data.staging to null"
        )


def _original(source: Source, settings: Mapping[str, SourceConfig] | Mapping[str, ValidationConfig]) -> Location:
    """Where a source was before it was copied."""
    place = location_of(settings[source.name].path)
    return place if isinstance(place, Remote) else source.path


def _copy_of(source: Source, place: Location) -> tuple[str, int]:
    """The name of a source's copy, and its bytes."""
    assert source.manifest is not None
    return copy_name(place, source.manifest), sum(sum(shard.sizes.values()) for shard in source.manifest.shards)


def _document_bytes(manifest: Manifest) -> int:
    """Bytes of the indexes and columns of a source."""
    return sum(shard.sizes.get(suffix, 0) for shard in manifest.shards for suffix in DOCUMENT_FILES)


def _tokenizer(config: Config) -> Path | None:
    """The file of data.tokenizer; a copy in data.staging where it is in object storage."""
    if config.data.tokenizer is None:
        return None
    place = location_of(config.data.tokenizer, "data.tokenizer")
    return place if isinstance(place, Path) else copied_file(place, _staging(config, "data.tokenizer", place))


def _staging(config: Config, where: str, place: Remote) -> Path:
    if config.data.staging is None:
        raise UserError(f"{where}: {place} is in object storage: set data.staging to a folder on a disk for the copy of it")
    return Path(config.data.staging)


def open_or_head(config: Config, entry: SourceConfig | ValidationConfig, name: str, part: tuple[int, int] = WHOLE) -> Source:
    """One source; of one in object storage only what its manifest tells, and where documents are chosen, its columns."""
    place = location_of(entry.path, f"data: source {name!r}")
    if isinstance(place, Path):
        return _open(config, entry.path, name, part)
    staging = _staging(config, f"data: source {name!r}", place)
    if chooses(config, entry):
        return open_documents(config, place, name, staging)
    folder = head(place, staging)
    return Source(name, folder, Manifest.load(folder), memory_map=config.data.memory_map)


def chooses(config: Config, entry: SourceConfig | ValidationConfig) -> bool:
    """Whether some of a source's documents may be left out."""
    return entry.where is not None or config.data.exclude_parents_of is not None


def open_documents(config: Config, place: Remote, name: str, staging: Path) -> Source:
    """A source in object storage without its tokens: documents can be chosen of it by the copies of its index and columns."""
    manifest = Manifest.load(place)
    claim(staging, {copy_name(place, manifest): _document_bytes(manifest)}, config.data.staging_bytes)
    folder, own = stage_documents(place, manifest, staging)
    return Source(name, folder, own, memory_map=config.data.memory_map, index_alone=True)


def _open(config: Config, path: str | Path, name: str, part: tuple[int, int] = WHOLE) -> Source:
    """One source, read in the way and with the checks that the configuration asks for."""
    if config.data.verify == "sizes":  # which opening always does
        return open_source(path, name, memory_map=config.data.memory_map, part=part)
    source = open_source(path, name, memory_map=False, part=part)
    if source.manifest is None:
        raise UserError(
            f"data.verify: blocks: {path}: source {name!r} has no manifest.json with checksums; prepare it again, or set "
            "data.verify to sizes"
        )
    source.check_before_reading(BlockChecker(source.path, source.manifest).check)
    return source


def _check_packing(source: Source, config: Config) -> None:
    packing = None if source.manifest is None else source.manifest.packing
    if packing is None:
        return
    length, number = config.window_length, config.data.windows_per_sequence
    if packing.sequence_length != length:
        ours = "train.sequence_length" if number == 1 else f"train.sequence_length / {number} (data.windows_per_sequence)"
        raise UserError(
            f"data.sources.{source.name}: {source.path} was packed for windows of {packing.sequence_length} tokens, "
            f"{ours} is {length}: its documents would be cut anywhere and its padding be spread; set "
            f"train.sequence_length to {packing.sequence_length * number}, or prepare the source again with "
            f"packing.sequence_length={length}"
        )
    if config.data.sources[source.name].shift_windows:
        raise UserError(
            f"data.sources.{source.name}.shift_windows: {source.path} was packed, so that its windows hold whole documents: "
            "others would cut them; set it to false, or prepare the source again without packing"
        )


def vocab_size_of(config: Config, info: TokenizerInfo | None) -> int | None:
    """Size of the vocabulary: the configuration's if it says one, else the tokenizer's; None if neither is known.

    Raises:
        UserError: the configuration's is too small for the tokenizer.
    """
    asked = config.model.vocab_size
    if info is None:
        return asked
    if asked is not None and asked < info.vocab_size:
        raise UserError(
            f"model.vocab_size: {asked} is smaller than the {info.vocab_size} tokens of the data's tokenizer; raise it, or "
            "set it to null to take the tokenizer's"
        )
    return asked or info.vocab_size


def plan_of(config: Config, num_tokens: Mapping[str, int | None]) -> MixturePlan:
    """The order of the samples of a configuration.

    num_tokens: of each source, by name; None for one that is not prepared yet. Which samples such a one gets follows
    from the ratios alone: one window, as often as needed, stands for it.
    """
    length = config.window_length
    specs = []
    for name, entry in config.data.sources.items():
        tokens = num_tokens[name]
        if tokens is None:
            specs.append(SourceSpec(name, entry.ratio or Fraction(0), 1, math.inf))
        else:
            specs.append(spec_of(name, entry, windows_in(tokens, length, shifted=entry.shift_windows), length))
    return MixturePlan(specs, config.data_seed, phases_of(config.data, length), config.data.skip)


def spec_of(name: str, entry: SourceConfig, windows: int, length: int) -> SourceSpec:
    """What the plan needs to know of a source that has so many windows of `length` tokens."""
    unique = None if entry.unique_tokens is None else entry.unique_tokens // length
    shift = length if entry.shift_windows else 0
    return SourceSpec(name, entry.ratio or Fraction(0), windows, entry.max_epochs, unique, shift)


def _shape(window_length: int, windows_per_sequence: int) -> list[int]:
    """How samples make sequences, as digests name it."""
    return [window_length] if windows_per_sequence == 1 else [window_length, windows_per_sequence]


def _content(source: Source) -> str | int:
    return source.digest or content_of(source.shard(0)).digest


def _size(source: Source) -> str | int:
    return source.digest or source.num_tokens


def _hash(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()
