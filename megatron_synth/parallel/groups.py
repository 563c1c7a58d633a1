"""The processes of a run: who they are, what device they use, how they are grouped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from megatron_synth.config.errors import UserError
from megatron_synth.parallel import engine
from megatron_synth.parallel.placement import check_placement, node_name, spanning_group
from megatron_synth.parallel.plan import Layout

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place. Data-parallel ranks see different samples, all others of one replica the same; of these,
    context-parallel ranks see other tokens of the same rows.
    """

    rank: int
    world_size: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    context_rank: int
    is_last_stage: bool
    """Holds the loss."""
    device: torch.device

    @property
    def needs_tokens(self) -> bool:
        """Stages between the first, which embeds the inputs, and the last, which compares with the labels, look at none."""
        return self.pipeline_rank == 0 or self.is_last_stage

    @property
    def reports_loss(self) -> bool:
        """Tensor-parallel ranks of the last stage hold equal losses; context-parallel ones those of their own tokens."""
        return self.is_last_stage and self.tensor_rank == 0


@contextmanager
def process_group(layout: Layout, seed: int, *, tensor_across_nodes: bool = False) -> Iterator[Ranks]:
    """Join the other processes, form megatron-core's groups, and leave them at the end.

    NCCL where there are GPUs, gloo otherwise. Without torchrun's environment the run is a single process.

    Args:
        layout: the checked plan.
        seed: for megatron-core's random state; nothing in a run draws from it, dropout is not implemented.
        tensor_across_nodes: allow tensor-parallel groups that span nodes.

    Raises:
        UserError: a tensor-parallel group spans nodes, and that is not allowed.
    """
    device = engine.start(layout)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    on_gpu = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if "RANK" in os.environ:
        torch.distributed.init_process_group(backend, device_id=device if on_gpu else None)
    else:
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert torch.distributed.get_world_size() == layout.world_size
        if not tensor_across_nodes:
            _check_nodes(layout, device)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
            context_parallel_size=layout.context,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(seed)
        yield Ranks(
            rank=torch.distributed.get_rank(),
            world_size=torch.distributed.get_world_size(),
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
            data_rank=parallel_state.get_data_parallel_rank(),
            context_rank=parallel_state.get_context_parallel_rank(),
            is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
            device=device,
        )
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _check_nodes(layout: Layout, device: torch.device) -> None:
    """Refuse tensor-parallel groups that span nodes. One collective of eight bytes per rank; names travel only then."""
    if layout.tensor == 1:
        return
    own = int.from_bytes(hashlib.blake2b(node_name().encode(), digest_size=8).digest(), "little", signed=True)
    mine = torch.tensor([own], dtype=torch.int64, device=device)
    marks = torch.empty(layout.world_size, dtype=torch.int64, device=device)
    torch.distributed.all_gather_into_tensor(marks, mine)
    if spanning_group(layout.tensor, marks.tolist()) is not None:
        names = [""] * layout.world_size
        torch.distributed.all_gather_object(names, node_name())
        check_placement(layout, names)


def on_main(ranks: Ranks, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and hand its result, or its UserError, to all ranks."""
    answer: list[object] = [None]
    if ranks.rank == 0:
        try:
            answer = [action()]
        except UserError as error:
            answer = [UserError(str(error))]  # a subclass with arguments of its own may not travel
    torch.distributed.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]  # type: ignore[return-value]


def on_main_only(ranks: Ranks, action: Callable[[], T]) -> T | None:
    """Run `action` on rank 0; its UserError reaches all ranks, its result stays there."""
    kept: list[T] = []
    on_main(ranks, lambda: kept.append(action()))
    return kept[0] if kept else None
