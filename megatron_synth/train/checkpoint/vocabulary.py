"""Weights for a vocabulary that has grown: tokens were added to a checkpoint's tokenizer, all others kept their ids.

The rule: the row of a new token, in the embedding and in the output layer, is the mean of the rows of all old tokens. A new
token then begins with about the probability of an average one, and no logit of an old token changes (J. Hewitt,
Initializing new word embeddings for pretrained language models, 2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import ModelConfig
from megatron_synth.core.files import read_regular
from megatron_synth.data.tokenizer import growth
from megatron_synth.model.architecture import weights


def check_growth(old: Path | None, new: Path | None, checkpoint: Path) -> None:
    """Refuse a tokenizer that is not the checkpoint's with tokens added to it.

    Raises:
        UserError: says what differs.
    """
    wanted = "checkpoint.init_vocabulary: extend needs the checkpoint's tokenizer.json and the data's, with the same ids"
    for name, file in (("the checkpoint", old), ("the data", new)):
        if file is None:
            raise UserError(f"{checkpoint}: {wanted}; {name} has none")
    assert old is not None and new is not None
    fault = growth(read_regular(old).decode("utf-8"), read_regular(new).decode("utf-8"))
    if fault is not None:
        raise UserError(
            f"{new}: is not the checkpoint's tokenizer ({old}) with tokens added to it: {fault}. Add tokens to that file, and "
            "prepare the data with it; a model cannot take another tokenizer than the one that it was trained with"
        )


@torch.no_grad()
def fill_new_rows(
    chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer, model: ModelConfig, before: int, after: int
) -> None:
    """Give rows [before, after) of embedding and output layer the mean of rows [0, before). Called by all ranks.

    Sums are in fp64 over the rows of all tensor-parallel ranks. The optimizer's master weights follow.
    """
    tables = {weight.name for weight in weights(model) if weight.has_vocabulary}
    for shard in _shards(chunks, tables):
        rows = shard.data
        first = shard.global_offset[0]
        old = rows[: max(0, min(before - first, len(rows)))]
        total = old.double().sum(dim=0)
        torch.distributed.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
        low, high = max(before - first, 0), max(0, min(after - first, len(rows)))
        if low < high:
            rows[low:high] = (total / before).to(rows.dtype)
    optimizer.reload_model_params()


def _shards(chunks: list[DistributedDataParallel], names: set[str]) -> Iterator[ShardedTensor]:
    """This rank's parts of some tensors: their data are views of the parameters."""
    for chunk in chunks:
        for name, entry in chunk.module.sharded_state_dict().items():
            if name in names and isinstance(entry, ShardedTensor):
                yield entry
