"""What a rank does in a step besides computing, for tests."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_WAITING_CALLS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero", "is_nonzero"}
_WAITING_OPERATIONS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero"}


# megatron-core compares random states, which are on the host on a GPU machine, too; the loss looks for masked labels on a CPU
# alone, where looking is no wait
_HOST_ONLY = ("tensor_parallel/random.py", "megatron_synth_kernels/torch/cross_entropy.py")


def _of_the_host() -> bool:
    """Whether this is a call that no GPU would be waited for."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.endswith(_HOST_ONLY):
            return True
        frame = frame.f_back
    return False


class _Calls(TorchFunctionMode):
    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in _WAITING_CALLS and any(isinstance(value, torch.Tensor) for value in args) and not _of_the_host():
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        if name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.found["index by a mask"] += 1  # its size must be known
        if name in _WAITING_OPERATIONS and not _of_the_host():
            self.found[f"aten::{name}"] += 1
        return operation(*args, **(kwargs or {}))


def host_waits(settings: list[str]) -> dict[str, int]:
    """In one optimizer step after two others, the calls that would make the host wait for a GPU, by name."""
    import os

    from megatron_synth.config.load import load_file
    from megatron_synth.config.schema import Config
    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import plan

    config = load_file(Config, "bench/tiny-7m.yaml", settings)
    layout = plan(config, int(os.environ.get("WORLD_SIZE", 1)))
    with process_group(layout, config.train.seed) as ranks:
        from megatron_synth.bench.train.engine import Engine, random_batches

        [batches] = random_batches(config, layout, ranks, 1)
        engine = Engine(config, layout, ranks)
        for _ in range(2):
            engine.step(batches)
        found: Counter[str] = Counter()
        with _Calls(found), _Operations(found):
            engine.step(batches)
    return dict(found)


def norms(settings: list[str], joined: bool) -> tuple[list[float], int, int]:
    """Three optimizer steps and an evaluation, with additions joined to norms or without.

    Returns:
        Losses, and calls of each kind of norm in the last step.
    """
    import os

    from megatron_synth.config.load import load_file
    from megatron_synth.config.schema import Config
    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import plan

    config = load_file(Config, "bench/tiny-7m.yaml", settings)
    layout = plan(config, int(os.environ.get("WORLD_SIZE", 1)))
    with process_group(layout, config.train.seed) as ranks:
        from megatron_synth.bench.train.engine import Engine, random_batches
        from megatron_synth.model import kernels
        from megatron_synth.model.ops import RMSNorm

        if not joined:
            kernels.joins_additions_to_norms = lambda choices: False
        [batches] = random_batches(config, layout, ranks, 1)
        engine = Engine(config, layout, ranks)
        calls: Counter[str] = Counter()

        def counted(name: str, function: Any) -> Any:
            def call(*args: Any) -> Any:
                calls[name] += 1
                assert training or not torch.is_grad_enabled(), "a norm of an evaluation keeps what it read"
                return function(*args)

            return call

        for chunk in engine.chunks:
            for module in chunk.modules():
                if isinstance(module, RMSNorm):
                    for name in ("_rms_norm", "_rms_norm_residual"):
                        setattr(module, name, counted(name, getattr(module, name)))
        losses, training = [], True
        for _ in range(3):
            calls.clear()
            engine.step(batches)
            losses.append(engine.loss())
        found = calls.copy()
        training = False
        with torch.no_grad():
            engine.stepper.forward(batches, 1, backward=False)
    return losses, found["_rms_norm"], found["_rms_norm_residual"]
