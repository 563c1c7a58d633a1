"""The one start of the engine: megatron-core imported, on the GPU of this rank or on the CPU."""

from __future__ import annotations

import logging
import os
import warnings

import torch

from megatron_synth.parallel.plan import Layout


def load() -> None:
    """Import megatron-core, prepared for the CPU where there is no GPU. Idempotent; touches no GPU.

    Nothing of it may be imported before. Its page on absent optional libraries is left out: the kernel table says what is used.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        from megatron_synth.parallel import cpu

        cpu.prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core.dist_checkpointing
        import megatron.core.models.gpt.gpt_model
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel  # noqa: F401
    # It knows the modules of its own specs by name and warns of every other MLP class, ours included.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.core\.")
    for message in (".*torch.distributed.*is deprecated", ".*deprecating ShardedTensor"):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    if not on_gpu:
        cpu.connect()


def start(layout: Layout) -> torch.device:
    """Take the device of this rank and load the engine. Idempotent.

    Args:
        layout: of the run that this process is a rank of.

    Returns:
        The GPU that the launcher's LOCAL_RANK names, or the CPU.
    """
    # One hardware queue, so that a layer's all-gather or reduce-scatter starts before the product it overlaps with. The driver
    # reads it when it is first asked for anything, if only for the number of devices.
    if layout.tensor > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not torch.cuda.is_available():
        load()
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    load()
    return device
