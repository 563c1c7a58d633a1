"""What it takes to run unmodified megatron-core on CPU over gloo.

megatron-core asks torch.cuda for its current device and writes device="cuda" in a few places, GPU or not. `prepare()` and
`connect()` answer with the host, by name, once per process. Nothing here is imported on a GPU machine.

Every name is replaced by a function of its own: dynamo refuses one object under two names.
"""

from __future__ import annotations

import importlib
import types
from typing import Any

import torch

_HOST = torch.device("cpu")
# The modules in use that create tensors with a literal device="cuda".
_MODULES_WITH_LITERAL_CUDA = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
)
_prepared = _connected = False


def _on_host(function: Any) -> Any:
    """`function`, a tensor factory, with a cuda device turned into the host."""

    def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _HOST
        return function(*args, **kwargs)  # type: ignore[no-any-return]

    return factory


class _HostTorch(types.ModuleType):
    """torch as one megatron-core module sees it: same attributes, factories on the host."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in ("zeros", "ones", "empty", "tensor"):
            setattr(self, name, _on_host(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _tensor_type(original: Any) -> Any:
    """Tensor.type() that says torch.cuda.*, which the optimizers of megatron-core assert on."""

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        return out.replace("torch.", "torch.cuda.", 1) if isinstance(out, str) else out

    return type_


def _unless_alone(collective: Any) -> Any:
    """`collective`, left out where a single rank would copy a buffer onto itself: gloo does, at 5 % of a step."""

    def call(output: torch.Tensor, input: torch.Tensor, group: Any = None, async_op: bool = False, **kwargs: Any) -> Any:
        if group.size() == 1 and output.data_ptr() == input.data_ptr():
            return None
        return collective(output, input, group=group, async_op=async_op, **kwargs)

    return call


def _replace_cuda_calls() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _HOST
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.set_device = lambda *args, **kwargs: None
    cuda.empty_cache = lambda: None
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.type = _tensor_type(torch.Tensor.type)
    module: Any = torch.nn.Module
    module.cuda = lambda self, *args, **kwargs: self


def prepare() -> None:
    """Answer torch's cuda calls with the host. Call before the first import of a megatron module; idempotent."""
    global _prepared
    if not _prepared:
        assert not torch.cuda.is_available(), "the CPU engine must not be enabled on a GPU machine"
        _replace_cuda_calls()
        _prepared = True


def connect() -> None:
    """Answer what megatron-core itself wrote down as cuda. Call after its modules are imported; idempotent."""
    global _connected
    if _connected:
        return
    for name in _MODULES_WITH_LITERAL_CUDA:
        importlib.import_module(name).torch = _HostTorch()  # type: ignore[attr-defined]
    buffer: Any = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    buffer.dist_all_gather_func = _unless_alone(buffer.dist_all_gather_func)
    buffer.dist_reduce_scatter_func = _unless_alone(buffer.dist_reduce_scatter_func)
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    _connected = True
