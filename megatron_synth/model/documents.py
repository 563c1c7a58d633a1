"""Where the documents of a micro-batch begin, for the attention of every layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Given to the model as `packed_seq_params`, which megatron-core hands to every attention module as it is.

    Rows keep their shape [B, S]; a `qkv_format` of "thd" would make megatron-core take the batch axis away.
    """

    cu_seqlens: Tensor
    """int32 [n + 1], on the device: places in the line of B x S tokens at which documents begin, and B x S at the end. Every
    row begins one."""
    max_seqlen: int
    """Length of the longest document."""
    position_ids: Tensor
    """int32 [B, S]: distance of each token from the beginning of its document; where ranks share the sequence, of this rank's
    tokens."""
    qkv_format: str = "sbhd"
