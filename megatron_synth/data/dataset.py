"""All data of a run, opened and checked before anything long begins."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import Config
from megatron_synth.data.loader import validation_windows
from megatron_synth.data.manifest import TokenizerInfo
from megatron_synth.data.mixture import MixturePlan, SourceSpec
from megatron_synth.data.store import Source, check_compatible, open_source


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


def open_data(config: Config) -> RunData:
    """Open every source and domain of the configuration and check that the run can be made with them.

    Raises:
        UserError: a file is missing or damaged, tokenizers differ, the vocabulary does not fit, a source is too small.
    """
    sequence = config.train.sequence_length
    sources = tuple(open_source(entry.path, name) for name, entry in config.data.sources.items())
    validation = {name: open_source(entry.path, name) for name, entry in config.data.validation.items()}
    info = check_compatible([*sources, *validation.values()])
    vocab_size = vocab_size_of(config, info)
    if vocab_size is None:
        raise UserError(
            "model.vocab_size: not set, and no source has a manifest.json that names its tokenizer; set it to the "
            "tokenizer's number of tokens"
        )
    plan = MixturePlan(
        [
            SourceSpec(name, entry.ratio, source.num_windows(sequence), entry.max_epochs)
            for (name, entry), source in zip(config.data.sources.items(), sources, strict=True)
        ],
        config.data_seed,
    )
    plan.check(config.train.steps * config.train.global_batch_size, sequence)
    for domain in validation.values():
        validation_windows(domain, sequence)
    known = (source.tokenizer_path for source in sources if source.tokenizer_path)
    tokenizer = Path(config.data.tokenizer) if config.data.tokenizer else next(known, None)
    digest = _digest(plan, sequence, sources)
    return RunData(plan, sources, validation, vocab_size, info.eod_id if info else None, tokenizer, digest)


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


def _digest(plan: MixturePlan, sequence_length: int, sources: tuple[Source, ...]) -> str:
    # a bare shard pair has no checksum: its size stands for it
    content = [source.manifest.digest() if source.manifest else source.num_tokens for source in sources]
    text = json.dumps([plan.digest(), sequence_length, content])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
