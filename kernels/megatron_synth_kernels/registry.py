"""Which implementation of each operation a process uses, and why.

An operation has up to five backends, the preferred one first: TransformerEngine (`te`), NVIDIA's apex (`apex`), our Triton
kernel (`triton`), torch (`torch`) and, behind torch and so only where it is named, torch.compile (`compile`). Attention has
those of cuDNN (`cudnn`), FlashAttention 3 (`fa3`) and torch's FlashAttention 2 (`flash`) before torch's choice. `choose` takes
the first that is available on a device, or the one that is forced; `activate` makes a choice that of the process; `get` hands
out the callable. Until something is activated every operation is torch's.

All backends of an operation take the same arguments and return the same things; the torch version is the definition.
To add a backend: one line below, a module that is imported only when it is loaded, and its cases in the tests.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

AUTO = "auto"
TE, APEX, TRITON, TORCH, COMPILE = ("te", "apex", "triton", "torch", "compile")
CUDNN, FA3, FLASH = ATTENTION = ("cudnn", "fa3", "flash")
BACKENDS = (TE, APEX, TRITON, TORCH, COMPILE, *ATTENTION)

Test = Callable[[torch.device, torch.dtype], "str | None"]
"""Says why something is unavailable on a device for a data type; None: it is available."""


class KernelUnavailable(ValueError):
    """A backend was asked for that this machine, device or data type does not allow."""

    def __init__(self, operation: str, message: str):
        self.operation = operation
        super().__init__(message)


@dataclass(frozen=True)
class Backend:
    """One implementation. `target` is `module:name`, imported only when it is loaded; a module of ours begins with a dot."""

    name: str
    target: str
    why_not: Test

    def load(self) -> Any:
        """The implementation."""
        module, _, attribute = self.target.partition(":")
        loaded = importlib.import_module(module, __package__)
        return getattr(loaded, attribute) if attribute else loaded


@dataclass(frozen=True)
class Operation:
    """What is computed, and by which backends, the preferred one first."""

    name: str
    doc: str
    backends: tuple[Backend, ...]

    def backend(self, name: str) -> Backend:
        """The backend of that name.

        Raises:
            KernelUnavailable: the operation has none.
        """
        for backend in self.backends:
            if backend.name == name:
                return backend
        known = ", ".join(backend.name for backend in self.backends)
        raise KernelUnavailable(self.name, f"no backend '{name}' for {self.name}; one of: {AUTO}, {known}")


@dataclass(frozen=True)
class Choice:
    """The backend of an operation, why it is that one, and why not each of the others."""

    operation: str
    backend: str
    reason: str
    others: tuple[tuple[str, str], ...]


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1): on any device, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true")


def _always(device: torch.device, dtype: torch.dtype) -> None:
    return None


def _on_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs compute capability 8.0 or more, this device has {major}.{minor}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"takes fp32 and bf16, not {str(dtype).removeprefix('torch.')}"
    return None


def _triton(device: torch.device, dtype: torch.dtype) -> str | None:
    problem = None if interpreted() else _on_cuda(device, dtype)
    return problem or _cannot_import("triton")


def _library(module: str, package: str = "", at_least: str = "", below: str = "") -> Test:
    """That a library is there in a tested version and loads. It is imported only on a CUDA device."""

    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        problem = _on_cuda(device, dtype)
        if problem is None and package and importlib.util.find_spec(module.partition(".")[0]) is not None:
            found = importlib.metadata.version(package)
            if not _release(at_least) <= _release(found) < _release(below):
                return f"needs {package} >= {at_least}, < {below}, found {found}"
        return problem or _cannot_import(module)

    return why_not


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _cannot_import(module: str) -> str | None:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"{module.partition('.')[0]} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # a library built for another torch or CUDA fails in its own way; the text is shown
        return f"{module} does not load: {(str(error).splitlines() or [repr(error)])[0]}"
    return None


_te = _library("transformer_engine.pytorch", "transformer_engine", "2.9", "2.12")


def _attention_by(name: str) -> Test:
    """torch's conditions for a kernel, asked where a device can answer; a library's, where it needs one."""

    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        problem = _on_cuda(device, dtype)
        if problem is not None:
            return problem
        from megatron_synth_kernels.torch.attention import backends

        if name == CUDNN:
            return backends.why_not_cudnn(device, dtype)
        problem = backends.why_not_flash(device, dtype)
        if problem is None and name == FA3:
            if torch.cuda.get_device_capability(device)[0] != 9:
                return "needs compute capability 9.0"
            if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
                return "needs torch 2.11"
            return _cannot_import("flash_attn_interface")
        return problem

    return why_not


def _compile(device: torch.device, dtype: torch.dtype) -> str | None:
    """What inductor needs to build its kernels, looked for without importing it."""
    if device.type == "cuda":
        return _on_cuda(device, dtype) or _cannot_import("triton")
    compiler = os.environ.get("CXX", "g++")  # inductor's choice
    if shutil.which(compiler) is None:
        return f"needs a C++ compiler: {compiler} is not installed (CXX names another)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.is_file() else f"needs Python's C headers: no {header}"


def _operation(name: str, doc: str, **targets: str | tuple[str, Test]) -> Operation:
    """Backends in the order given; a target alone is tested as its backend's kind is."""
    tests = {TE: _te, TRITON: _triton, TORCH: _always, COMPILE: _compile}
    backends = []
    for backend, entry in targets.items():
        target, test = entry if isinstance(entry, tuple) else (entry, tests[backend])
        backends.append(Backend(backend, target, test))
    return Operation(name, doc, tuple(backends))


# Elementwise operations prefer our Triton kernels: one pass over memory, nothing else to install. Adam prefers kernels that
# update all tensors in one launch.
OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        _operation(
            "rms_norm",
            "(x [..., H], weight [H], eps) -> [..., H]",
            triton=".triton.norm:rms_norm",
            te=".vendor.te:rms_norm",
            apex=(".vendor.apex:rms_norm", _library("fused_layer_norm_cuda")),
            torch=".torch.norm:rms_norm",
            compile=".vendor.torch_compile:rms_norm",
        ),
        _operation(
            "rms_norm_residual",
            "(x, residual [..., H], weight [H], eps) -> rms_norm(x + residual), x + residual",
            triton=".triton.norm:rms_norm_residual",
            torch=".torch.norm:rms_norm_residual",
            compile=".vendor.torch_compile:rms_norm_residual",
        ),
        _operation(
            "swiglu",
            "gate_and_up [..., 2F] -> silu(gate) * up [..., F]",
            triton=".triton.swiglu:swiglu",
            te=".vendor.te:swiglu",
            torch=".torch.swiglu:swiglu",
            compile=".vendor.torch_compile:swiglu",
        ),
        _operation(
            "rope",
            "(query [S, B, A, D], key [S, B, G, D], base, positions [B, S] or None) -> both, rotated",
            triton=".triton.rope:rope",
            torch=".torch.rope:rope",
            compile=".vendor.torch_compile:rope",
        ),
        _operation(
            "attention",
            "(query [S, B, A, D], key, value [S, B, G, D], scale, cu_seqlens, max_seqlen, window) -> [S, B, A D]",
            cudnn=(".torch.attention.backends:cudnn", _attention_by(CUDNN)),
            fa3=(".vendor.fa3:attention", _attention_by(FA3)),
            flash=(".torch.attention.backends:flash", _attention_by(FLASH)),
            torch=".torch.attention.causal:causal_attention",
            te=".vendor.te_attention:attention",
        ),
        _operation(
            "cross_entropy_stats",
            "(logits [N, V], labels [N], vocab_start, valid) -> maximum, sum of exponentials, label's logit [3, N]",
            triton=".triton.cross_entropy:cross_entropy_stats",
            torch=".torch.cross_entropy:cross_entropy_stats",
        ),
        _operation(
            "cross_entropy_grad",
            "(logits [N, V], labels, vocab_start, log_sum_exp, scale [N], z_loss, valid) -> gradient, in the logits' memory",
            triton=".triton.cross_entropy:cross_entropy_grad_",
            torch=".torch.cross_entropy:cross_entropy_grad_",
        ),
        _operation(
            "adam",
            "class of the optimizer: AdamW with its step count in the parameter group",
            te=("transformer_engine.pytorch.optimizers:FusedAdam", _te),
            apex=("apex.optimizers:FusedAdam", _library("amp_C")),
            torch=".torch.adam:FusedAdam",
            triton=".triton.adam:TritonAdam",
        ),
        _operation(
            "wgrad",
            "module with wgrad_gemm_accum_fp32(inputs [N, K], grad_output [N, M], main_grad [M, K])",
            apex=("fused_weight_gradient_mlp_cuda", _library("fused_weight_gradient_mlp_cuda")),
            torch=".torch.wgrad",
        ),
        _operation(
            "quantise_fp8",
            "module with amax_of(x), quantize_tensorwise, quantize_1x128, quantize_128x128 (x [N, K], ...), transpose(data)",
            triton=".triton.quantize",
            torch=".torch.fp8",
        ),
        _operation(
            "swiglu_quantise",
            "module with SwiGLU(gate_and_up [N, 2F]) and SwiGLUGradient(grad [N, F], gate_and_up): fp8.Source",
            triton=".triton.swiglu_quantize",
            torch=".torch.swiglu_quantize",
        ),
        _operation(
            "rms_norm_quantise",
            "module with Normalized(x [N, H], weight [H], eps): fp8.Source, and gradients(grad, x, weight, inverse)",
            triton=".triton.norm_quantize",
            torch=".torch.norm_quantize",
        ),
    )
}

_active: dict[str, Any] = {}


def choose(
    forced: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype,
    refused: Mapping[tuple[str, str], str] | None = None,
) -> dict[str, Choice]:
    """The backend of every operation.

    Args:
        forced: operation -> backend; `auto`, or left out: the first that is available. Nothing is interpreted unless forced.
        device: where the operations will run.
        dtype: of activations and weights.
        refused: operation and backend -> why the model cannot have it, where the device allows it.

    Raises:
        KernelUnavailable: a forced backend is unavailable, or there is no such operation or backend.
    """
    for name in forced:
        if name not in OPERATIONS:
            raise KernelUnavailable(name, f"no operation '{name}'; one of: {', '.join(OPERATIONS)}")
    refused = refused or {}
    return {name: _choose(operation, forced.get(name, AUTO), device, dtype, refused) for name, operation in OPERATIONS.items()}


def _choose(
    operation: Operation, forced: str, device: torch.device, dtype: torch.dtype, refused: Mapping[tuple[str, str], str]
) -> Choice:
    refusals = {
        backend.name: backend.why_not(device, dtype) or refused.get((operation.name, backend.name))
        for backend in operation.backends
    }
    if forced != AUTO:
        operation.backend(forced)
        refusal = refusals[forced]
        if refusal is not None:
            message = f"{operation.name} by {forced} is unavailable on {device.type}: {refusal}"
            raise KernelUnavailable(operation.name, message)
        chosen, reason = forced, "forced by the configuration"
    else:
        if interpreted() and device.type == "cpu" and TRITON in refusals and refusals[TRITON] is None:
            refusals[TRITON] = "interpreted: only when forced"
        chosen = next(name for name, refusal in refusals.items() if refusal is None)
        ahead = dict.fromkeys(str(refusals[name]) for name in list(refusals)[: list(refusals).index(chosen)])
        reason = "the only one" if len(refusals) == 1 else "preferred"
        if ahead:
            reason = f"first that is available; ahead of it: {'; '.join(ahead)}"
    others = []
    for name, refusal in refusals.items():
        if name != chosen:
            others.append((name, refusal or ("not asked for" if forced != AUTO else f"comes after {chosen}")))
    return Choice(operation.name, chosen, reason, tuple(others))


def activate(choices: Mapping[str, Choice]) -> None:
    """Make `choices` those of the process. Their implementations are imported here. Models built before keep theirs."""
    loaded = {name: OPERATIONS[name].backend(choice.backend).load() for name, choice in choices.items()}
    _active.update(loaded)


def are_active(choices: Mapping[str, Choice]) -> bool:
    """Whether `choices` are those of the process."""
    return all(_active.get(name) is OPERATIONS[name].backend(choice.backend).load() for name, choice in choices.items())


def get(name: str) -> Any:
    """The active implementation of an operation. Ask once, when a module is built, not for every call."""
    if name not in _active:
        _active[name] = OPERATIONS[name].backend(TORCH).load()
    return _active[name]
