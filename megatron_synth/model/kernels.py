"""Which implementation of each operation a run uses: chosen once, before anything is built, and told in the run header."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from megatron_synth.config.errors import ConfigError, Problem, UserError
from megatron_synth.config.load import load_yaml, resolve
from megatron_synth.config.schema import Config, ModelConfig
from megatron_synth.model.architecture import Dimensions
from megatron_synth_kernels import registry
from megatron_synth_kernels.registry import OPERATIONS, Choice, KernelUnavailable
from megatron_synth_kernels.sizes import Sizes
from megatron_synth_kernels.torch.attention.backends import why_not_heads

if TYPE_CHECKING:
    from megatron_synth_kernels.compile import Compiled

__all__ = [
    "DTYPES",
    "OPERATIONS",
    "Choice",
    "Compiled",
    "Sizes",
    "activate",
    "are_active",
    "check_same_on_all_ranks",
    "choose_auto",
    "compile_all",
    "joins_additions_to_norms",
    "model_sizes",
    "select",
    "summary",
    "torch_name",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def device() -> torch.device:
    """Where this process computes or, before it has joined the others, will compute."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def select(config: Config) -> dict[str, Choice]:
    """The backend of every operation of a run on this machine.

    Raises:
        ConfigError: a backend that `kernels` names is unavailable here.
    """
    forced = {name: backend for name, backend in config.kernels.model_dump().items() if backend != registry.AUTO}
    if "rms_norm" in forced and "rms_norm_residual" not in forced:  # who names the norm means all of them
        there = {backend.name for backend in OPERATIONS["rms_norm_residual"].backends}
        forced["rms_norm_residual"] = forced["rms_norm"] if forced["rms_norm"] in there else registry.TORCH
    try:
        return registry.choose(forced, device(), DTYPES[config.precision.dtype], _refused(config))
    except KernelUnavailable as error:
        advice = "choose another or auto; `megatron-synth kernels` shows what this machine has"
        raise ConfigError(f"kernels on {torch_name()}", [Problem(f"kernels.{error.operation}", f"{error}; {advice}")]) from None


def _refused(config: Config) -> dict[tuple[str, str], str]:
    """Attention that a device may have and this run's shapes may not."""
    why = {name: why_not_heads(config.model.head_dim) for name in registry.ATTENTION}
    if config.data.document_masks:
        why[registry.CUDNN] = "takes whole rows, and data.document_masks is set"
    elif any(config.model.window_of(layer) is not None for layer in range(config.model.num_layers)):
        why[registry.CUDNN] = "takes whole rows, and the model has windows"
    elif config.parallel.context_parallel_size > 1:
        why[registry.CUDNN] = "takes whole rows, and ranks share them"
    return {("attention", name): reason for name, reason in why.items() if reason is not None}


def activate(choices: Mapping[str, Choice]) -> None:
    """Build models with these from now on."""
    registry.activate(choices)


def are_active(choices: Mapping[str, Choice]) -> bool:
    """Whether models are built with these now."""
    return registry.are_active(choices)


def joins_additions_to_norms(choices: Mapping[str, Choice]) -> bool:
    """Whether residual additions are made by the norms after them.

    Not where torch would make them and another backend the norms: then the addition is torch's, and the norm that backend's.
    """
    residual, norm = (choices[name].backend for name in ("rms_norm_residual", "rms_norm"))
    return residual != registry.TORCH or norm == registry.TORCH


def check_same_on_all_ranks(choices: Mapping[str, Choice]) -> None:
    """Ranks with other kernels would train on other roundings, and tensor-parallel ones drift apart.

    Raises:
        UserError: on all ranks; names one that chose otherwise than rank 0.
    """
    own = {name: choice.backend for name, choice in choices.items()}
    everywhere: list[dict[str, str] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, own)
    first = everywhere[0] or {}
    for rank, found in enumerate(everywhere):
        for name, backend in (found or {}).items():
            if backend != first[name]:
                message = f"kernels.{name}: {backend} on rank {rank}, {first[name]} on rank 0"
                raise UserError(f"{message}; install the same on all nodes, or name in the configuration what all of them have")


def choose_auto(dtype: str) -> dict[str, Choice]:
    """The choices of a run that names no backend. dtype: fp32 or bf16."""
    return registry.choose({}, device(), DTYPES[dtype])


def torch_name() -> str:
    """The device as torch calls it: `cpu`, or `cuda (NVIDIA H200, 9.0)`."""
    where = device()
    if where.type != "cuda":
        return where.type
    major, minor = torch.cuda.get_device_capability(where)
    return f"cuda ({torch.cuda.get_device_name(where)}, {major}.{minor})"


def summary(choices: Mapping[str, Choice]) -> list[str]:
    """One line for each backend and reason: `kernels torch: rms_norm, swiglu (triton needs a CUDA device)`."""
    groups: dict[tuple[str, str], list[str]] = {}
    for choice in choices.values():
        groups.setdefault((choice.backend, choice.reason), []).append(choice.operation)
    return [f"kernels {backend}: {', '.join(names)} ({reason})" for (backend, reason), names in groups.items()]


def model_sizes(vocabularies: Mapping[str, int], tokens: int) -> list[Sizes]:
    """The sizes of shipped models, by name, each with the size of its vocabulary; `tokens` of a micro-batch."""
    found = []
    for name, vocabulary in vocabularies.items():
        model = ModelConfig(**load_yaml(resolve(f"model/{name}.yaml"))["model"])
        sizes, heads = Dimensions.of(model), (model.num_attention_heads, model.query_groups, model.head_dim)
        found.append(Sizes(name, tokens, sizes.hidden, sizes.ffn, *heads, vocabulary))
    return found


def compile_all(sizes: list[Sizes]) -> list[Compiled]:
    """Every Triton kernel, compiled for Hopper at these sizes. Give it a process of its own.

    Raises:
        UserError: Triton is not installed, or set to interpret.
    """
    if registry.interpreted():
        raise UserError("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    if importlib.util.find_spec("triton") is None:
        raise UserError("triton is not installed; pip install triton (on Linux)")
    from megatron_synth_kernels.compile import compile_all as run

    return run(sizes)
