"""megatron-core's data parallelism, optimizer and schedule round the model chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, ParamGroupOverride, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_synth.config.schema import Config
from megatron_synth.parallel import fp8_params
from megatron_synth.parallel.muon import MATRIX, use_muon

NO_WEIGHT_DECAY = "no_weight_decay"
"""Attribute of parameters that the optimizer's weight decay leaves alone."""


def wrap_ddp(chunks: Sequence[GPTModel], config: Config) -> list[DistributedDataParallel]:
    """Gradient buffers in fp32 and their reduction over data-parallel ranks, one wrapper per model chunk."""
    parallel = config.parallel
    on_gpu = torch.cuda.is_available()
    overlap_reduce, overlap_gather = parallel.overlaps(
        parallel_state.get_data_parallel_world_size(with_context_parallel=True), on_gpu
    )
    wrapped = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=DistributedDataParallelConfig(
                use_distributed_optimizer=parallel.use_distributed_optimizer,
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=overlap_reduce,
                overlap_param_gather=overlap_gather,
                bucket_size=parallel.ddp_bucket_size,
                fp8_param_gather=config.precision.fp8_param_gather,
            ),
            module=chunk,
            # chunks after the first are not on the critical path of the interleaved schedule
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    if overlap_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        grad_sync = [chunk.start_grad_sync for chunk in wrapped]
        for chunk in chunks:
            chunk.config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
            chunk.config.grad_sync_func = grad_sync if len(wrapped) > 1 else grad_sync[0]
    return wrapped


def build_optimizer(chunks: list[DistributedDataParallel], config: Config) -> MegatronOptimizer:
    """The optimizer of all chunks; weight decay on all that is not marked `NO_WEIGHT_DECAY`."""
    optim = config.optim
    overrides = {ParamKey(attr=NO_WEIGHT_DECAY): ParamGroupOverride(wd_mult=0.0)}
    factor = config.model.mup_factor
    if factor != 1.0:  # so that lr x weight decay is the same at each width
        overrides[ParamKey(attr=MATRIX)] = ParamGroupOverride(lr_mult=1.0 / factor, wd_mult=factor)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=config.precision.dtype == "bf16",
            params_dtype=torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
            # how the optimizer treats weights in FP8
            fp8_recipe=fp8_params.RECIPES[config.precision.fp8] if config.precision.fp8_param_gather else None,
        ),
        chunks,
        config_overrides=overrides,
        use_gloo_process_groups=False,
    )
    if optim.name == "muon":
        use_muon(optimizer, config)
    return optimizer


@contextmanager
def whole_weights(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """Within, every rank's weights are current. With overlap_param_gather they are otherwise gathered by forward hooks."""
    overlapping = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapping:
        chunk.disable_forward_pre_hook(param_sync=True)
        fp8_params.renew(chunk.parameters())
    yield
    for chunk in overlapping:
        chunk.enable_forward_pre_hook()
