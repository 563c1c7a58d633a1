"""Which samples of a step a data-parallel rank gets."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_synth.config.errors import UserError
from megatron_synth.data.mixing.permutation import derive_key, derive_keys, keyed_hash, permute

Int64 = npt.NDArray[np.int64]


def deal(
    seed: int,
    first_sample: int,
    global_batch_size: int,
    *,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    windows_per_sequence: int = 1,
) -> Int64:
    """Samples of one rank in the optimizer step that consumes global_batch_size x k of them, from `first_sample` on.

    Sequence s of the step is its samples s k to (s + 1) k - 1, where k = windows_per_sequence. The sequences are permuted
    by key; slot j goes to micro-batch j // (B x ranks), rank (j // B) % ranks, row j % B, where B = micro_batch_size.
    Returns int64 [micro-batches, B k]. Over all ranks it is each sample of the step once.
    """
    return deal_steps(
        seed,
        first_sample,
        global_batch_size,
        1,
        micro_batch_size,
        data_parallel_rank,
        data_parallel_size,
        windows_per_sequence,
    ).reshape(-1, micro_batch_size * windows_per_sequence)


def deal_steps(
    seed: int,
    first_sample: int,
    global_batch_size: int,
    steps: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    windows_per_sequence: int,
) -> Int64:
    """As `deal`, for `steps` steps that follow each other: int64 [steps x micro-batches x B k]."""
    check_rank(data_parallel_rank, data_parallel_size)
    stride = micro_batch_size * data_parallel_size
    if global_batch_size < 1 or global_batch_size % stride:
        raise UserError(
            f"train.global_batch_size {global_batch_size} is not a multiple of train.micro_batch_size "
            f"{micro_batch_size} x {data_parallel_size} data-parallel ranks = {stride}: change one of them"
        )
    # only the slots of this rank are worked out
    first_slot = data_parallel_rank * micro_batch_size
    slots = (np.arange(0, global_batch_size, stride)[:, None] + np.arange(first_slot, first_slot + micro_batch_size)).ravel()
    firsts = first_sample + np.arange(steps) * (global_batch_size * windows_per_sequence)
    keys = derive_keys(seed, "step", firsts)
    number = len(slots)
    key = keys[:, 0] if steps == 1 else np.repeat(keys, number, axis=1)
    samples = permute(np.tile(slots, steps), global_batch_size, key)
    samples *= windows_per_sequence
    samples += np.repeat(firsts, number)
    return samples if windows_per_sequence == 1 else _windows_of_sequences(seed, samples, windows_per_sequence)


def _windows_of_sequences(seed: int, firsts: Int64, windows_per_sequence: int) -> Int64:
    """All samples of the sequences that begin with samples `firsts` [N], in a random order within each: int64 [N k].

    The order follows from the samples' numbers, whatever the step they are in.
    """
    samples = firsts[:, None] + np.arange(windows_per_sequence)
    order = np.argsort(keyed_hash(samples, derive_key(seed, "sequence")), axis=1, kind="stable")
    return np.take_along_axis(samples, order, axis=1).reshape(-1)


def check_rank(data_parallel_rank: int, data_parallel_size: int) -> None:
    """A rank is one of so many."""
    assert 0 <= data_parallel_rank < data_parallel_size, f"rank {data_parallel_rank} of {data_parallel_size}"
