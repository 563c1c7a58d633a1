"""One process as a rank of many: collectives of torch's `fake` backend, which end at once and move nothing.

What the rank computes, allocates and launches is that of the rank in the whole run; NCCL itself is not called.
"""

from __future__ import annotations

import os
from typing import Any

import torch


def pretend(rank: int, world_size: int) -> None:
    """Make `torch.distributed.init_process_group` a group of `world_size` of which this process is `rank`."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed: Any = torch.distributed
    real = distributed.init_process_group
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}

    def init(backend: str, **options: Any) -> None:
        real("fake", store=FakeStore(), rank=rank, world_size=world_size)

    def gathered(out: list[Any], mine: Any, group: Any = None) -> None:
        out[:] = [mine] * len(out)

    distributed.init_process_group = init
    distributed.barrier = lambda *args, **options: None
    distributed.all_gather_object = gathered
    distributed.broadcast_object_list = lambda *args, **options: None
    distributed.distributed_c10d._store_based_barrier = lambda *args, **options: None
    from megatron_synth.parallel import groups

    groups._check_nodes = lambda *args: None
