"""`megatron-synth prepare`: text to token shards.

Workers read and tokenize splits of a source into token runs on disk; then they assemble the shards from these, in
order or shuffled. Memory does not grow with the text. The output is written into a hidden folder beside it and renamed
when all is done, manifests last: a run that fails or is killed leaves nothing that opens, and one that was killed is
continued by the next. The bytes depend on the settings and the text alone, not on the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import megatron_synth
from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import VALID_SUFFIX, PrepareConfig
from megatron_synth.core.files import sync_folder, write_atomic, write_json
from megatron_synth.core.log import human, show
from megatron_synth.core.share import Share
from megatron_synth.data.preparing.fim import special_ids
from megatron_synth.data.preparing.journal import JOURNAL, Journal, read_journal
from megatron_synth.data.preparing.masks import with_templates
from megatron_synth.data.preparing.output import is_clean, lock_of, partial_folder, remove_strays, replace, restore
from megatron_synth.data.preparing.pipeline import STAGING, Prepared, SourceWork, targets_of
from megatron_synth.data.preparing.progress import progress
from megatron_synth.data.preparing.readers.documents import is_held_out
from megatron_synth.data.preparing.readers.inputs import read_documents, reader_of
from megatron_synth.data.preparing.readers.reader import Reader
from megatron_synth.data.preparing.shared import folder_of, run_share, shared_lock, told_by_all, wait_for
from megatron_synth.data.preparing.workers import CHUNK_CHARACTERS, RUN_BYTES, Pool, Workers, stored_columns
from megatron_synth.data.shards.columns import DTYPES
from megatron_synth.data.shards.indexed import token_dtype
from megatron_synth.data.shards.manifest import FILE_NAME as MANIFEST
from megatron_synth.data.shards.manifest import Provenance, canonical_digest
from megatron_synth.data.shards.source import open_source
from megatron_synth.data.tokenizer import FILE_NAME as TOKENIZER
from megatron_synth.data.tokenizer import Tokenizer, fetch_tokenizer, load_tokenizer, train_tokenizer
from megatron_synth.storage.faults import StorageError
from megatron_synth.storage.remote import Location, Remote, is_remote

RECORD = "prepare.json"  # its presence says that the folder is a finished output
RECORD_VERSION = 1
SKIPPED = "skipped.txt"  # in the folder of a source: records that were left out
JOURNAL_VERSION = 3  # 3 added checksums to the lines of the journal, and numbers to what it tells of
# only the estimate of the disk space uses these two
TYPICAL_TEXT_BYTES_PER_TOKEN = 4.0
TYPICAL_TEXT_BYTES_PER_DOCUMENT = 2000


StartPool = Callable[[Tokenizer, Path], Pool]
"""Given the tokenizer and the folder that tasks write to, what runs them."""


def prepare(
    config: PrepareConfig, *, workers: int = 1, force: bool = False, start: StartPool | None = None
) -> list[Prepared] | None:
    """Make `config.output`. None when it is there already, made from the same settings and inputs.

    Args:
        config: what to make.
        workers: processes of this machine that do the work; 1: this one.
        force: replace a finished output, whatever it was made from.
        start: what does the work instead of processes of this machine.
    """
    start = start or (lambda tokenizer, folder: Workers(tokenizer, workers))
    output, config = Path(config.output), _resolved(config)
    if not is_clean(output):  # what stands there is another's at work, or a dead one's
        with lock_of(output):
            restore(output)
    work = _looked_at(config, force)
    if work is None:
        return None
    for line in notes(work.readers, work.given):
        show(f"note: {line}", error=True)
    for reader in work.readers.values():
        check_holdout(reader)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with lock_of(output):
            if output.exists() and _is_current(output, config, work.head["config_digest"], force):  # made just now
                return None
            return _make(config, work, start)
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror or error}; nothing was kept") from error


def check_inputs(config: PrepareConfig) -> bool:
    """Check all that a preparation checks before it begins, and say how it is cut; False: the output is there already.

    Raises:
        UserError: settings or inputs are wrong.
    """
    config = _resolved(config)
    work = _looked_at(config, force=False)
    if work is None:
        return False
    for line in notes(work.readers, work.given):
        show(f"note: {line}", error=True)
    for name, reader in work.readers.items():
        limited = config.sources[name].max_bytes is not None
        show(f"{name}: {'has max_bytes, read by the last job' if limited else reader.splitting()}")
    return True


def input_files(config: PrepareConfig) -> list[Path]:
    """The files of text on disks, of all sources.

    Raises:
        UserError: one of them is missing.
    """
    readers = [reader_of(name, source) for name, source in config.sources.items()]
    return [path for reader in readers for path in reader.files() if isinstance(path, Path)]


def prepare_share(config: PrepareConfig, share: Share, *, workers: int = 1) -> tuple[int, int] | None:
    """Do a share of `config.output`: the splits that were tokenized now, and before. None: the output is there already.

    The same preparation without a share takes over what all of them have done, and puts the output in its place.
    """
    output, config = Path(config.output), _resolved(config)
    work = _looked_at(config, force=False)
    if work is None:
        return None
    try:
        folder_of(output).mkdir(parents=True, exist_ok=True)
        tokenizer = work.given
        if tokenizer is None:
            with wait_for(shared_lock(output)):
                tokenizer = _trained(config, work.readers, folder_of(output), _shared_journal(output, work.head))
        digest = _sha256(tokenizer.content.encode())
        return run_share(config, work.readers, tokenizer, digest, work.dtype, work.head, share, workers)
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror or error}; what is done is kept") from error


def _shared_journal(output: Path, head: Mapping[str, Any]) -> Journal:
    """Of what all shares need; what is of other settings or inputs goes. Under their lock."""
    folder = folder_of(output)
    found = read_journal(folder / JOURNAL)
    if found and found[0] != head:
        remove_strays(folder, {path.name for path in folder.iterdir() if path.name.startswith((".lock", "share-"))})
    return Journal(folder, head)


@dataclass(frozen=True)
class _Work:
    """What is known of a preparation before its text is read."""

    readers: Mapping[str, Reader]
    inputs: Mapping[str, Mapping[str, Any]]
    given: Tokenizer | None
    dtype: np.dtype[Any]
    head: Mapping[str, Any]
    """First line of its journals: work of another head is another's."""


def _looked_at(config: PrepareConfig, force: bool) -> _Work | None:
    """Settings and inputs, checked; None where the output is there already, made from the same."""
    if is_remote(config.output):
        raise UserError(
            f"output: {config.output} is in object storage: prepare to a folder on a disk, and copy it there, each "
            "manifest.json last"
        )
    output = Path(config.output)
    readers = {name: reader_of(name, source) for name, source in config.sources.items()}
    inputs = {name: reader.describe() for name, reader in readers.items()}
    given = _given_tokenizer(config)
    digest = _config_digest(config, inputs, given)
    if output.exists() and _is_current(output, config, digest, force):
        return None
    settings = config.tokenizer.train
    for name, source in config.sources.items():
        if source.fim is not None and given is not None:
            special_ids(given, source.fim, f"sources.{name}.fim")
    dtype = _stored_dtype(config, given.vocab_size if given is not None else settings.vocab_size if settings else 0)
    _check_space(config, readers, output, dtype)
    head = {
        "kind": "head",
        "version": JOURNAL_VERSION,
        "program": megatron_synth.__version__,
        "config_digest": digest,
        "tokenizer": given.fingerprint if given is not None else "trained",
        "cuts": [CHUNK_CHARACTERS, RUN_BYTES],
    }
    return _Work(readers, inputs, given, dtype, head)


def _make(config: PrepareConfig, work: _Work, start: StartPool) -> list[Prepared]:
    """Write the output beside its place, and put it there; under its lock."""
    output, digest, given = Path(config.output), work.head["config_digest"], work.given
    with partial_folder(output, work.head) as (folder, journal):
        if journal.continued:
            show(f"{output}: continuing a run that was stopped", error=True)
        targets = [target for name, source in config.sources.items() for target in targets_of(name, source)]
        remove_strays(folder, {JOURNAL, TOKENIZER, STAGING, *targets})
        if given is None:
            _take_over_tokenizer(output, work.head, folder, journal)
        tokenizer = given if given is not None else _trained(config, work.readers, folder, journal)
        tokenizer.save(folder / TOKENIZER)
        done = told_by_all(output, work.head, _sha256(tokenizer.content.encode()))
        prepared: list[Prepared] = []
        with closing(start(tokenizer, folder)) as pool:
            for name, source in config.sources.items():
                made = Provenance(
                    program=f"megatron-synth {megatron_synth.__version__}",
                    config_digest=digest,
                    inputs=work.inputs[name],
                    holdout=str(source.holdout or 0),
                    shuffle_seed=None if config.shuffle is None else config.shuffle.seed,
                )
                task = SourceWork(name, source, config, tokenizer, work.dtype, folder, journal, pool, made, done)
                prepared += task.run()
        _check_unchanged(work.readers, work.inputs)
        for one in prepared:
            one.manifest.save(folder / one.manifest.name)
            if one.skipped:
                write_atomic(folder / one.manifest.name / SKIPPED, "".join(f"{message}\n" for message in one.skipped))
            sync_folder(folder / one.manifest.name)
        write_json(folder / RECORD, _record(config, digest))
        remove_strays(folder, {RECORD, TOKENIZER, *targets})
        replace(folder, output)
    shutil.rmtree(folder_of(output), ignore_errors=True)
    return prepared


def _take_over_tokenizer(output: Path, head: Mapping[str, Any], folder: Path, journal: Journal) -> None:
    """Have the tokenizer that was trained for the shares, where this preparation has none yet."""
    found = read_journal(folder_of(output) / JOURNAL)
    told = [entry for entry in found[1:] if entry["kind"] == "tokenizer"]
    path = folder_of(output) / TOKENIZER
    if found and found[0] == head and told and path.is_file() and journal.one("tokenizer") is None:
        content = path.read_bytes()
        if _sha256(content) == told[0]["sha256"]:
            write_atomic(folder / TOKENIZER, content)
            sync_folder(folder)
            journal.append(told[0])


def _check_unchanged(readers: Mapping[str, Reader], inputs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse objects that were exchanged while they were read: a file that is open stays what it was, an object does not."""
    for name, reader in readers.items():
        if any(isinstance(path, Remote) for path in reader.files()) and reader.describe() != inputs[name]:
            raise StorageError(
                f"sources.{name}: objects of its input changed while they were read; leave them alone, and start again"
            )


def _resolved(config: PrepareConfig) -> PrepareConfig:
    """The settings with the templates of chats, which then are part of what an output is known by."""
    if all(source.messages is None for source in config.sources.values()):
        return config
    return with_templates(config, _given_tokenizer(config))


def _given_tokenizer(config: PrepareConfig) -> Tokenizer | None:
    """The tokenizer that the settings name; None when one is to be trained."""
    settings = config.tokenizer
    if settings.path is not None:
        return load_tokenizer(settings.path, settings.eod)
    return None if settings.name is None else fetch_tokenizer(settings.name, settings.eod)


def _trained(config: PrepareConfig, readers: Mapping[str, Reader], folder: Path, journal: Journal) -> Tokenizer:
    """A tokenizer of the sources' text, or the one that a stopped run has trained."""
    path = folder / TOKENIZER
    done = journal.one("tokenizer")
    if done is not None and path.is_file() and _sha256(path.read_bytes()) == done["sha256"]:
        return load_tokenizer(path, config.tokenizer.eod)
    tokenizer = _train(config, readers)
    found = _sha256(tokenizer.content.encode())
    if done is not None and found == done["sha256"]:
        return tokenizer
    journal.drop(journal.entries)  # they tell of tokens of another tokenizer
    tokenizer.save(path)
    sync_folder(folder)
    journal.append({"kind": "tokenizer", "sha256": found})
    return tokenizer


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _train(config: PrepareConfig, readers: Mapping[str, Reader]) -> Tokenizer:
    settings = config.tokenizer.train
    assert settings is not None
    names = settings.sources or tuple(name for name, source in config.sources.items() if source.split == "train")
    share = max(settings.max_bytes // len(names), 1)

    def texts() -> Iterator[str]:
        for name in names:
            source = config.sources[name]
            read = 0
            for document, size in read_documents(readers[name]):
                if source.holdout is not None and is_held_out(document.key, source.holdout):
                    continue
                yield document.text
                bar.update(size)
                read += size
                if read >= share:
                    break

    with progress(TOKENIZER, 0) as bar:
        return train_tokenizer(texts(), settings.vocab_size, config.tokenizer.eod)


def _stored_dtype(config: PrepareConfig, vocab_size: int) -> np.dtype[Any]:
    if config.dtype == "auto":
        return token_dtype(vocab_size)
    dtype = np.dtype(config.dtype)
    if vocab_size - 1 > np.iinfo(dtype).max:
        raise UserError(f"dtype: {config.dtype} cannot hold a vocabulary of {vocab_size} tokens; set dtype to auto or int32")
    return dtype


def _check_space(config: PrepareConfig, readers: Mapping[str, Reader], output: Path, dtype: np.dtype[Any]) -> None:
    text, stored = 0, 0.0
    for name, source in config.sources.items():
        size = readers[name].text_bytes()
        size = size if source.max_bytes is None else min(size, source.max_bytes)
        text += size
        # a bit for each token says whether it is learned
        stored += size / TYPICAL_TEXT_BYTES_PER_TOKEN * (dtype.itemsize + (0.125 if source.masked else 0))
        of_columns = sum(DTYPES[kind].itemsize for _, kind in stored_columns(source.columns))
        stored += size / TYPICAL_TEXT_BYTES_PER_DOCUMENT * of_columns
    copies = 1 if config.shuffle is None else 2  # a shuffle keeps all token runs until its last shard
    needed = copies * round(stored)
    folder = next(folder for folder in output.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"output: {output} needs about {human(needed)} bytes for {human(text)} bytes of text, {human(free)} bytes "
            f"are free in {folder}; make room, choose another output, or set max_bytes of the sources"
        )


def notes(readers: Mapping[str, Reader], tokenizer: Tokenizer | None) -> Iterator[str]:
    """What is likely a mistake, and may be meant."""
    if tokenizer is not None and tokenizer.loses_characters():
        yield f"{tokenizer.where}: characters that are not in its vocabulary leave no token: they are lost from the text"
    known: dict[Hashable, tuple[str, Location]] = {}
    for name, reader in readers.items():
        for path in reader.files():
            key: Hashable = path
            if isinstance(path, Path):
                status = path.stat()
                key = status.st_dev, status.st_ino
            other, first = known.setdefault(key, (name, path))
            if other == name:
                continue
            splits = {readers[one].source.split for one in (name, other)}
            also = "" if first == path else f" (there {first})"
            what = "validation text is trained on" if len(splits) == 2 else "its text is there twice"
            yield f"sources.{name} reads {path}, which sources.{other} reads too{also}: {what}"
            break


def check_holdout(reader: Reader) -> None:
    """Refuse, before any long work, a source without text, and a holdout that leaves one of its two splits empty.

    Reads until both have a document, which is all of the text only where there is something to refuse.
    """
    name, holdout = reader.name, reader.source.holdout
    if holdout is None or not reader.rereadable:
        return
    found, total = set[bool](), 0
    for document, _ in read_documents(reader):
        found.add(is_held_out(document.key, holdout))
        total += 1
        if len(found) == 2:
            return
    if total:
        empty = name if found == {True} else name + VALID_SUFFIX
        raise UserError(
            f"sources.{name}.holdout: {holdout} of {total} documents leaves none for {empty!r}; change the share or give "
            f"more text"
        )


def _record(config: PrepareConfig, digest: str) -> dict[str, Any]:
    # options that are off are left out: outputs made before there were any are still current
    off = {name for name in ("shuffle", "packing") if getattr(config, name) is None}
    settings = config.model_dump(mode="json", exclude={"output"} | off)
    for source in settings["sources"].values():
        if source["on_error"] == "fail":
            del source["on_error"], source["max_errors"]
        for key in [key for key in ("fim", "prompt", "messages") if source[key] is None]:
            del source[key]
        if not source["columns"]:
            del source["columns"]
        if source["synthesized"] is None:
            del source["synthesized"]
    return {"version": RECORD_VERSION, "config_digest": digest, "config": settings}


def prepared_names(output: Path) -> list[str]:
    """The sources that an output of `prepare` holds, holdouts included; none where it has no record of them."""
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
        sources = record["config"]["sources"]
        holdouts = [name + VALID_SUFFIX for name, source in sources.items() if source.get("holdout")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [*sources, *holdouts]


def _config_digest(config: PrepareConfig, inputs: dict[str, Any], tokenizer: Tokenizer | None) -> str:
    """Of all that decides the output's bytes, as far as it is known before the text is read."""
    record = _record(config, "")
    return canonical_digest([record, inputs, None if tokenizer is None else tokenizer.fingerprint])


def _is_current(output: Path, config: PrepareConfig, digest: str, force: bool) -> bool:
    """Whether `output` is what this run would make; a UserError when it is something else and may not be replaced."""
    record = output / RECORD
    if not record.is_file():
        if output.is_dir() and not any(output.iterdir()):
            return False
        raise UserError(f"output: {output} exists and is no prepared output (no {RECORD}); choose another folder")
    if force:
        return False
    try:
        found = json.loads(record.read_text(encoding="utf-8"))["config_digest"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{record}: broken; prepare again with --force") from None
    if found != digest:
        raise UserError(
            f"output: {output} was prepared from other settings or inputs; use --force to replace it, or another output"
        )
    try:
        for manifest in sorted(output.glob(f"*/{MANIFEST}")):
            open_source(manifest.parent, manifest.parent.name)
        for name, source in config.sources.items():
            for target in targets_of(name, source):
                open_source(output / target, target)
    except UserError as error:
        raise UserError(f"output: {output} is damaged, use --force to prepare it again: {error}") from None
    return True
