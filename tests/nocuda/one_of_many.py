"""One process as a rank of many.

By default with collectives of torch's `fake` backend, which end at once and move nothing. With NCCL's, the device answers
them: torch's own wrapper runs, with its streams and events. Either way what the rank computes, allocates and launches is that
of the rank in the whole run.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch


class _Answering(torch.distributed.Store):
    """A store in which every other rank has written what it is waited for: the ids of NCCL's groups."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: Any) -> None:
        self._values[key] = value.encode() if isinstance(value, str) else bytes(value)

    def get(self, key: str) -> bytes:
        return self._values.get(key, b"\7" * 128)

    def add(self, key: str, amount: int) -> int:
        self.set(key, str(int(self._values.get(key, b"0")) + amount))
        return int(self._values[key])

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        pass

    def set_timeout(self, timeout: timedelta) -> None:
        pass


_kept: list[_Answering] = []
"""torch's C++ holds no reference to the Python half of a store."""


def pretend(rank: int, world_size: int, *, nccl: bool = False) -> None:
    """Make `torch.distributed.init_process_group` a group of `world_size` of which this process is `rank`."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed: Any = torch.distributed
    real = distributed.init_process_group
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}

    def init(backend: str, **options: Any) -> None:
        if nccl:
            options.pop("device_id", None)  # with it NCCL splits its groups from the first, and is not told their sizes
            _kept.append(_Answering())
            real("cpu:fake,cuda:nccl", store=_kept[-1], rank=rank, world_size=world_size, **options)
        else:
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
