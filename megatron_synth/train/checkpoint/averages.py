"""The average that a run kept of its weights (`optim.ema_decay`), read from its checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_synth.config.errors import UserError
from megatron_synth.model import architecture
from megatron_synth.parallel.average import Average, Range
from megatron_synth.train.checkpoint import resume
from megatron_synth.train.checkpoint.format.stored import Stored
from megatron_synth.train.checkpoint.sharding import AVERAGE, average_pieces, sharded_model


def load_average(checkpoint: Path, chunks: list[DistributedDataParallel], average: Average) -> bool:
    """Read the average of the weights into this rank's part of it; False: the checkpoint has none. No collective.

    Rows that pad the vocabulary, where the checkpoint has fewer of them, stay those of the weights.

    Raises:
        UserError: a file is missing or damaged, or the shapes differ.
    """
    return _read_average(checkpoint, chunks, average.ranges)


def load_average_as_weights(
    checkpoint: Path, chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer | None = None
) -> None:
    """Read the average that a run kept of its weights into the model, and let the optimizer's master weights follow.

    Raises:
        UserError: the checkpoint has none, or cannot be read.
    """
    if not _read_average(checkpoint, chunks, _to_be_weights(chunks)):
        raise _no_average(checkpoint)
    if optimizer is not None:
        optimizer.reload_model_params(None)


def _to_be_weights(chunks: list[DistributedDataParallel]) -> Iterator[Range]:
    """Every parameter, whole, with a copy in fp32 that becomes its value once the next is asked for: one copy at a time."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            values = parameter.detach().float().reshape(-1)
            yield parameter, 0, parameter.numel(), values
            parameter.data.copy_(values.view(parameter.shape))


def check_average(checkpoint: Path) -> None:
    """Refuse a checkpoint without an average of the weights, by its index alone.

    Raises:
        UserError: it has none, or its index cannot be read.
    """
    with Stored(checkpoint) as stored:
        if not _holds_average(stored):
            raise _no_average(checkpoint)


def full_average(checkpoint: Path) -> dict[str, torch.Tensor]:
    """As `full_weights`, the average that the run kept of its weights, in fp32.

    Raises:
        UserError: the checkpoint has none, or cannot be read.
    """
    saved = resume.read_trainer(checkpoint)
    model = resume.saved_model(checkpoint, saved)
    table = architecture.by_key(model, saved.vocab_size)
    weights: dict[str, torch.Tensor] = {}
    with Stored(checkpoint) as stored:
        found = {key.removeprefix(AVERAGE): shape for key, shape in stored.shapes.items() if key.startswith(AVERAGE)}
        if not found:
            raise _no_average(checkpoint)
        resume.check_tensors(checkpoint, found, table, model.num_layers)
        for key, weight in table.items():
            shape = found[key]
            if not weight.in_layers:
                weights[weight.names(model.num_layers)[0]] = stored.read(AVERAGE + key, (0,) * len(shape), shape)
                continue
            for layer, name in enumerate(weight.names(model.num_layers)):
                box = stored.read(AVERAGE + key, (layer, *(0 for _ in shape[1:])), (1, *shape[1:]))
                weights[name] = box[0]
    return weights


def _read_average(checkpoint: Path, chunks: list[DistributedDataParallel], ranges: Iterable[Range]) -> bool:
    with Stored(checkpoint) as stored:
        if not _holds_average(stored):
            return False
        for piece in average_pieces(sharded_model(chunks), ranges):
            whole = stored.shapes.get(piece.key, ())
            if len(whole) != len(piece.size) or whole[1:] != piece.size[1:]:
                raise UserError(f"{checkpoint}: {piece.key} is {list(whole)}, expected {list(piece.size)}")
            rows = min(piece.shape[0], max(0, whole[0] - piece.offset[0]))
            if rows:
                box = stored.read(piece.key, piece.offset, (rows, *piece.shape[1:]))
                piece.data[: box.numel()].copy_(box.reshape(-1))
    return True


def _holds_average(stored: Stored) -> bool:
    return any(key.startswith(AVERAGE) for key in stored.shapes)


def _no_average(checkpoint: Path) -> UserError:
    return UserError(f"{checkpoint}: holds no average of the weights: the run that wrote it had no optim.ema_decay")
