"""One checkpoint from several: the weighted mean of their weights, block by block, for `eval`, `convert` and `init_from`.

Of checkpoints of one run it stands for a decay of the learning rate (arXiv 2505.12082), of several runs it is a soup (arXiv
2203.05482). Sums are made in fp64, so that the mean of equals is each of them to the bit, and rounded once to the type of the
weights. What was never loaded as a whole costs no memory: a block of some million values is read of each, merged, written.
"""

from __future__ import annotations

import math
import secrets
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_atomic, write_json
from megatron_synth.core.lock import Lock
from megatron_synth.data.tokenizer import FILE_NAME
from megatron_synth.model import architecture
from megatron_synth.train.checkpoint import companions, files, resume
from megatron_synth.train.checkpoint.format.boxes import boxes
from megatron_synth.train.checkpoint.format.stored import Stored
from megatron_synth.train.checkpoint.sharding import METADATA
from megatron_synth.train.checkpoint.writer import TensorFile, seal

RECORD = "merge.json"
BLOCK = 1 << 22
"""Values merged at once: 32 MiB in fp64."""


class Part(NamedTuple):
    """A checkpoint, and its share of the mean."""

    checkpoint: Path
    weight: Fraction


class Merged(NamedTuple):
    """What was made."""

    checkpoint: Path
    parameters: int


def merge(parts: Sequence[Part], out: Path) -> Merged:
    """Write the folder `out` with the weighted mean of the weights of checkpoints, whole or not at all.

    The first checkpoint says configuration and tokenizer. Needs a process group of one rank.

    Args:
        parts: at least one; weights of 0 or more, together more than 0.
        out: a new folder: checkpoints/, config.yaml and what an export needs of the first run, and merge.json.

    Raises:
        UserError: a checkpoint is damaged, or holds another model, tokenizer or type of weights; or `out` exists.
    """
    assert parts and any(part.weight for part in parts) and all(part.weight >= 0 for part in parts)
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already; choose another folder, or remove this one")
    saved = [resume.read_trainer(part.checkpoint) for part in parts]
    own = _files_of_the_run(files.run_of(parts[0].checkpoint))
    _check(parts, saved)
    partial = out.with_name(f".{out.name}.merge{files.TEMPORARY}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with Lock(out.with_name(f".{out.name}.merge.lock"), "checkpoint merge"):
        shutil.rmtree(partial, ignore_errors=True)  # of a merge that was killed
        try:
            made = _write(parts, _whole([part.weight for part in parts]), saved, own, partial)
            if out.exists():
                raise UserError(f"{out}: was made by another program meanwhile; choose another folder")
            partial.rename(out)
            files.sync_folder(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return Merged(out / made.checkpoint.relative_to(partial), made.parameters)


def _whole(weights: Sequence[Fraction]) -> list[int]:
    """Whole numbers in the same proportions."""
    common = math.lcm(*(weight.denominator for weight in weights))
    return [int(weight * common) for weight in weights]


def _check(parts: Sequence[Part], saved: Sequence[resume.TrainerState]) -> None:
    """Refuse what has no mean.

    Raises:
        UserError: names the checkpoint and what differs.
    """
    first, model = saved[0], resume.saved_model(parts[0].checkpoint, saved[0])
    _, dtype = resume.saved_shape(parts[0].checkpoint, first)
    for part, state in zip(parts, saved, strict=True):
        resume.check_architecture(part.checkpoint, state, model, first.vocab_size)
        _, own = resume.saved_shape(part.checkpoint, state)
        if own != dtype:
            raise UserError(f"{part.checkpoint}: its weights are in {own}, those of {parts[0].checkpoint} in {dtype}")
        for name in ("tokenizer_fingerprint", "eod_id"):
            ours, theirs = getattr(state, name), getattr(first, name)
            if None not in (ours, theirs) and ours != theirs:
                raise UserError(
                    f"{part.checkpoint}: was trained with another tokenizer than {parts[0].checkpoint} ({name} {ours!s:.12} "
                    f"and {theirs!s:.12}): the same id means different text, so that a mean of the weights means nothing"
                )
        found = files.faults(part.checkpoint, checksums=True)
        if found:
            raise UserError(f"{part.checkpoint}: damaged: {'; '.join(found[:3])}; take another step of the run")


def _write(
    parts: Sequence[Part], shares: Sequence[int], saved: Sequence[resume.TrainerState], own: Sequence[Path], folder: Path
) -> Merged:
    first = saved[0]
    model = resume.saved_model(parts[0].checkpoint, first)
    table = architecture.by_key(model, first.vocab_size)
    last = max(saved, key=lambda state: state.step)
    temporary = folder / files.FOLDER / f"merge.{secrets.token_hex(4)}{files.TEMPORARY}"
    temporary.mkdir(parents=True)
    with ExitStack() as stack:
        opened = [stack.enter_context(Stored(part.checkpoint)) for part in parts]
        for one in opened:
            ours = {key: shape for key, shape in one.shapes.items() if key in table}
            resume.check_tensors(one.checkpoint, ours, table, model.num_layers)
            for key, shape in ours.items():
                if shape != opened[0].shapes[key] or one.dtypes[key] != opened[0].dtypes[key]:
                    mine, theirs = (f"{list(s.shapes[key])} of {s.dtypes[key]}" for s in (one, opened[0]))
                    raise UserError(f"{one.checkpoint}: {key} is {mine}, in {opened[0].checkpoint} it is {theirs}")
        name = "__0_0.distcp"
        with TensorFile(temporary / name) as file:
            for key in table:
                _merge_tensor(key, opened, shares, file)
        assert file.info is not None
        parameters = sum(math.prod(opened[0].shapes[key]) for key in table)
    trainer = replace(
        last, run_id="", plan_digest="", prefix_digest="", ledger={}, contents={}, samples=0, skipped=0, config=first.config
    )
    seal(temporary, file.entries, {name: file.info}, {"content_metadata": dict(METADATA)}, resume.trainer_file(trainer))
    final = temporary.with_name(files.name_of(last.step))
    temporary.rename(final)
    write_atomic(final.parent / files.LATEST, final.name + "\n")
    for kept in own:
        shutil.copyfile(kept, folder / kept.name)
    record = []
    for part, share, state in zip(parts, shares, saved, strict=True):
        weight = str(Fraction(share, sum(shares)))
        record.append(
            {"checkpoint": str(part.checkpoint.absolute()), "weight": weight, "run": state.run_id, "step": state.step}
        )
    write_json(folder / RECORD, {"parts": record})
    return Merged(final, parameters)


def _files_of_the_run(run: Path) -> list[Path]:
    """What goes along. A link in an untrusted run would put a file of somebody else's into the result.

    Raises:
        UserError: one is a link.
    """
    found = [run / name for name in ("config.yaml", FILE_NAME, companions.FILE)]
    for file in found:
        if file.is_symlink():
            raise UserError(f"{file}: is a link, expected a file of the run's own")
    return [file for file in found if file.is_file()]


def _merge_tensor(key: str, opened: Sequence[Stored], shares: Sequence[int], file: TensorFile) -> None:
    """The mean of a tensor. Products with whole shares and their sum are exact, so that one division alone rounds."""
    shape, dtype = opened[0].shapes[key], opened[0].dtypes[key]
    row = shape[-1] if len(shape) > 1 else 1
    step, count = max(row, BLOCK // row * row), math.prod(shape)
    for begin in range(0, count, step):
        for offset, size in boxes(shape, begin, min(begin + step, count)):
            total = torch.zeros(size, dtype=torch.float64)
            for one, share in zip(opened, shares, strict=True):
                if share:
                    total.add_(one.read(key, offset, size), alpha=share)
            file.add(key, shape, offset, total.div_(sum(shares)).to(dtype))
