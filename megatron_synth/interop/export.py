"""A run as a folder in Hugging Face's format."""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path
from typing import Annotated, NamedTuple

import xxhash
from pydantic import Field, with_config
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import read_regular, sync_folder, write_json
from megatron_synth.core.records import OPEN, Count, Reader

FOLDER = "exported"
"""Folder of a run directory with what was exported of it, for `generate` and for tasks."""
MARK = "exported-from.json"


@with_config(OPEN)
class Mark(TypedDict):
    """What an exported folder was made from."""

    checkpoint: str
    step: Count
    average: bool
    digest: Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{32}$")]


MARKS: Reader[Mark] = Reader(Mark, "remove the folder: it is made again")


class Kept(NamedTuple):
    """An exported folder, what it was made from, and whether it was there already."""

    folder: Path
    mark: Mark
    reused: bool


class Exported(NamedTuple):
    """What was written: from which checkpoint, at which step, how many parameters, and a tokenizer that is gone, if one is."""

    checkpoint: Path
    step: int
    parameters: int
    lost_tokenizer: str | None


def newest_checkpoint(run: Path) -> Path:
    """The newest sound checkpoint of a run directory, or the checkpoint that `run` is.

    Raises:
        UserError: there is none.
    """
    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import Layout

    with process_group(Layout.single(), seed=0):
        return _newest(run)


def _newest(run: Path) -> Path:
    from megatron_synth.train.checkpoint import resume

    found = resume.newest_sound(run, "checksums")
    if found is None:
        raise UserError(f"{run}: expected a run directory or a checkpoint, found no whole checkpoint")
    return found


def export_to_hf(run: Path, folder: Path, *, average: bool = False) -> Exported:
    """Write a folder for `AutoModelForCausalLM`, whole or not at all, from a checkpoint of any layout.

    average: the average that the run kept of its weights in place of these, in the type of the weights.

    Raises:
        UserError: there is no sound checkpoint, or the folder holds something.
    """
    from megatron_synth.interop.hf_folder import write_hf
    from megatron_synth.interop.hf_settings import hf_config
    from megatron_synth.interop.hf_weights import to_hf_state
    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import Layout
    from megatron_synth.train.checkpoint import companions

    with process_group(Layout.single(), seed=0):
        from megatron_synth.train.checkpoint import averages, files, resume

        found = _newest(run)
        saved = resume.read_trainer(found)
        model = resume.saved_model(found, saved)
        sequence_length, dtype = resume.saved_shape(found, saved)
        tokenizer = resume.tokenizer_of(found, saved)
        kept = companions.load(files.run_of(found))
        weights = averages.full_average(found) if average else resume.full_weights(found)
        if average and dtype == "bf16":
            weights = {name: weight.bfloat16() for name, weight in weights.items()}
    settings = hf_config(
        model,
        saved.vocab_size,
        max(sequence_length, (kept.max_position_embeddings if kept is not None else None) or 0),
        dtype,
        # what ends a document is what ends a text
        eos_token_id=kept.eos_token_id if kept is not None and saved.eod_id in (None, *kept.ends) else saved.eod_id,
        bos_token_id=None if kept is None else kept.bos_token_id,
        pad_token_id=None if kept is None else kept.pad_token_id,
    )
    write_hf(folder, to_hf_state(weights, model, saved.vocab_size), settings, tokenizer, companions=kept)
    lost = saved.tokenizer if saved.tokenizer and tokenizer is None else None
    return Exported(found, saved.step, sum(weight.numel() for weight in weights.values()), lost)


def kept_export(run: Path, *, average: bool = False) -> Kept:
    """The newest sound checkpoint of a run, exported into the run's folder; what is there of the same weights is used again.

    The weights' digest decides: that of the checksums of the checkpoint's files, and of the tokenizer and settings that an
    export takes along. What was exported of another checkpoint before goes.

    Args:
        run: a run directory, or a checkpoint.
        average: as `export_to_hf`'s.

    Raises:
        UserError: there is no sound checkpoint, or what an export needs is missing.
    """
    from megatron_synth.train.checkpoint import files

    checkpoint = newest_checkpoint(run)
    digest = _digest(checkpoint, average=average)
    root = files.run_of(checkpoint) / FOLDER
    folder = root / f"{checkpoint.name}{'-ema' if average else ''}"
    found = _mark_of(folder)
    if found is not None and found["digest"] == digest:
        return Kept(folder, found, True)
    root.mkdir(exist_ok=True)
    partial = root / f".{folder.name}.{secrets.token_hex(8)}"
    try:
        made = export_to_hf(checkpoint, partial, average=average)
        mark = Mark(checkpoint=checkpoint.name, step=made.step, average=average, digest=digest)
        write_json(partial / MARK, mark)
        sync_folder(partial)
        for old in _exports(root):
            other = _mark_of(old)
            if other is not None and (other["average"] == average or old == folder):
                shutil.rmtree(old)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Kept(folder, mark, False)


def _exports(root: Path) -> list[Path]:
    return [path for path in sorted(root.iterdir()) if path.is_dir() and not path.is_symlink() and path.name[0] != "."]


def _mark_of(folder: Path) -> Mark | None:
    """What an exported folder says of itself; None if it is none of ours, or damaged: it is not used."""
    if folder.is_symlink() or not (folder / MARK).is_file() or not (folder / "config.json").is_file():
        return None
    try:
        return MARKS.read(folder / MARK)
    except UserError:
        return None


def _digest(checkpoint: Path, *, average: bool) -> str:
    """XXH3 of what decides an export, 32 hexadecimal digits. The checkpoint has just been held against its checksums."""
    from megatron_synth.data.tokenizer import FILE_NAME
    from megatron_synth.train.checkpoint import companions, files

    listed = files.read_manifest(checkpoint)
    names = sorted(path.name for path in checkpoint.iterdir() if path.is_file())  # without a manifest, in older versions
    sums = (
        {name: files.hash_file(checkpoint / name) for name in names}
        if listed is None
        else {n: i.xxh3 for n, i in listed.items()}
    )
    total = xxhash.xxh3_128(json.dumps([average, sums], sort_keys=True).encode())
    for name in (FILE_NAME, companions.FILE):
        file = files.run_of(checkpoint) / name
        total.update(read_regular(file) if file.is_file() else b"\0")
    return total.hexdigest()
