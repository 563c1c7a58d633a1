"""Ahead-of-time compilation of every Triton kernel for Hopper, on a machine without a GPU.

The operations run on meta tensors of a model's shapes, forward and backward, and every launch compiles for sm_90a instead of
being sent to a device. So what is compiled is what a run would launch: the same specializations on alignment, block sizes and
warps. Registers, memory and the stack, where spilled registers go, are read from the finished binary, and the instructions of
a thread are counted: what a processor needs to issue them is held against what memory needs for the operands.

Give it a process of its own: launches keep what was compiled.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megatron_synth_kernels.registry import interpreted
from megatron_synth_kernels.sizes import Sizes
from megatron_synth_kernels.torch.adam_reference import Coefficients, Rounding
from megatron_synth_kernels.torch.fp8 import E4M3, E5M2, Scaling, Source
from megatron_synth_kernels.triton import (
    adam as triton_adam,
)
from megatron_synth_kernels.triton import (
    cross_entropy as triton_cross_entropy,
)
from megatron_synth_kernels.triton import (
    norm as triton_norm,
)
from megatron_synth_kernels.triton import (
    norm_quantize as triton_norm_quantize,
)
from megatron_synth_kernels.triton import (
    quantize as triton_quantize,
)
from megatron_synth_kernels.triton import (
    rope as triton_rope,
)
from megatron_synth_kernels.triton import (
    swiglu as triton_swiglu,
)
from megatron_synth_kernels.triton import (
    swiglu_quantize as triton_swiglu_quantize,
)

TARGET = GPUTarget("cuda", 90, 32)  # Triton compiles 90 as sm_90a
# of one processor of compute capability 9.0, CUDA C++ programming guide, table "technical specifications"
_REGISTERS, _WARPS, _BLOCKS, _SHARED = 65536, 64, 32, 233472
# of an H200: 132 processors issue 4 instructions of a warp per cycle; its clock under load, and what its memory delivers
_PROCESSORS, _ISSUED, _CLOCK, _MEMORY = 132, 4, 1.755e9, 4.3e12


@dataclass(frozen=True)
class Compiled:
    """One kernel as it comes out of the assembler.

    shared: bytes of a block.
    stack: bytes of a thread.
    instructions: of a thread, from the first to the last exit; None where it has a loop.
    issue: time to issue all instructions, as a multiple of the time in which an H200 moves the operands, each once; None where
        it has a loop. Below 1 memory is the limit, if it is asked for in time.
    """

    operation: str
    kernel: str
    shape: str
    warps: int
    registers: int
    shared: int
    stack: int
    instructions: int | None
    issue: float | None

    @property
    def warps_per_processor(self) -> int:
        """Warps that a processor holds at once, of 64: what registers and shared memory leave room for."""
        registers = -(-self.registers * 32 // 256) * 256 * self.warps  # given out in units of 256 per warp
        blocks = min(_BLOCKS, _WARPS // self.warps, _REGISTERS // registers)
        if self.shared:
            blocks = min(blocks, _SHARED // (self.shared + 1024))
        return blocks * self.warps


def _leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def _backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])


def _rms_norm(sizes: Sizes) -> None:
    _backward(triton_norm.rms_norm(_leaf(sizes.tokens, 1, sizes.hidden), _leaf(sizes.hidden), 1e-5))


def _rms_norm_residual(sizes: Sizes) -> None:
    x, residual = _leaf(sizes.tokens, 1, sizes.hidden), _leaf(sizes.tokens, 1, sizes.hidden)
    _backward(*triton_norm.rms_norm_residual(x, residual, _leaf(sizes.hidden), 1e-5))


def _swiglu(sizes: Sizes) -> None:
    _backward(triton_swiglu.swiglu(_leaf(sizes.tokens, 1, 2 * sizes.ffn)))


def _rope(sizes: Sizes) -> None:
    query = _leaf(sizes.tokens, 1, sizes.heads, sizes.head_dim)
    key = _leaf(sizes.tokens, 1, sizes.groups, sizes.head_dim)
    positions = torch.empty((1, sizes.tokens), dtype=torch.int32, device="meta")
    for places in (None, positions):
        _backward(*triton_rope.rope(query, key, 10_000.0, places))
        mixed = _leaf(sizes.tokens, 1, sizes.groups, sizes.heads // sizes.groups + 2, sizes.head_dim)
        parts = mixed[..., :-2, :], mixed[..., -2, :], mixed[..., -1, :]
        _backward(*triton_rope.joined_rope(*parts, 10_000.0, places))


def _cross_entropy_stats(sizes: Sizes) -> None:
    labels = _leaf(sizes.tokens, dtype=torch.int64)
    triton_cross_entropy.cross_entropy_stats(_leaf(sizes.tokens, sizes.vocabulary).detach(), labels, 0)


def _cross_entropy_grad(sizes: Sizes) -> None:
    per_token = torch.empty(sizes.tokens, device="meta")
    labels = _leaf(sizes.tokens, dtype=torch.int64)
    logits = _leaf(sizes.tokens, sizes.vocabulary).detach()
    triton_cross_entropy.cross_entropy_grad_(logits, labels, 0, per_token, per_token, 1e-4)


def _adam(sizes: Sizes) -> None:
    coefficients = Coefficients.of(3e-4, (0.9, 0.95), 1e-8, 0.1, 3)
    wide = [torch.empty(sizes.hidden * sizes.ffn, device="meta") for _ in range(4)]
    narrow = torch.empty(sizes.hidden * sizes.ffn, dtype=torch.bfloat16, device="meta")
    triton_adam.adamw_(wide[0], wide[1], wide[2], wide[3], coefficients, copy=narrow)
    triton_adam.adamw_(narrow, wide[1], wide[2], wide[3], coefficients, rounding=Rounding(1, 2, 3))


def _scalings(number: Tensor) -> list[Scaling]:
    """Current and delayed scaling, in a training step and in an evaluation."""
    return [
        Scaling(number, amax=number),
        Scaling(number, scale=number, noted=number),
        Scaling(number, scale=number),
    ]


def _quantize_fp8(sizes: Sizes) -> None:
    x = torch.empty((sizes.tokens, sizes.hidden), dtype=torch.bfloat16, device="meta")
    for dtype in (E4M3, E5M2):
        for scaling in _scalings(triton_quantize.amax_of(x)):
            triton_quantize.quantize_tensorwise(x, scaling, dtype)
        row, _ = triton_quantize.quantize_1x128(x, dtype)
        triton_quantize.quantize_128x128(x, dtype)
        assert row is not None
        triton_quantize.transpose(row.data)


def _quantized_every_way(make: Callable[[], Source], evaluated: bool = True) -> None:
    """`evaluated`: whether evaluations make it, too, which leave no trace in the history and need no transpose."""
    for dtype in (E4M3, E5M2):
        number = torch.empty((), device="meta")
        make().amax(number)
        for scaling in _scalings(number)[: 3 if evaluated else 2]:
            make().tensorwise(scaling, dtype)
            if evaluated:
                make().tensorwise(scaling, dtype, transposed=False)  # and parts that are gathered
        make().blocks(dtype)


def _swiglu_quantize(sizes: Sizes) -> None:
    x = torch.empty((sizes.tokens, 2 * sizes.ffn), dtype=torch.bfloat16, device="meta")
    grad = torch.empty((sizes.tokens, sizes.ffn), dtype=torch.bfloat16, device="meta")
    _quantized_every_way(lambda: triton_swiglu_quantize.SwiGLU(x))
    _quantized_every_way(lambda: triton_swiglu_quantize.SwiGLUGradient(grad, x), evaluated=False)


def _rms_norm_quantize(sizes: Sizes) -> None:
    x = torch.empty((sizes.tokens, sizes.hidden), dtype=torch.bfloat16, device="meta")
    weight = torch.empty(sizes.hidden, dtype=torch.bfloat16, device="meta")
    _quantized_every_way(lambda: triton_norm_quantize.Normalized(x, weight, 1e-5))
    made = triton_norm_quantize.Normalized(x, weight, 1e-5)
    triton_norm_quantize.gradients(x, x, weight, made.inverse)


CASES: dict[str, Callable[[Sizes], None]] = {
    "rms_norm": _rms_norm,
    "rms_norm_residual": _rms_norm_residual,
    "swiglu": _swiglu,
    "rope": _rope,
    "cross_entropy_stats": _cross_entropy_stats,
    "cross_entropy_grad": _cross_entropy_grad,
    "adam": _adam,
    "quantise_fp8": _quantize_fp8,
    "swiglu_quantise": _swiglu_quantize,
    "rms_norm_quantise": _rms_norm_quantize,
}
"""Operation -> every launch that it makes for a shape, on the meta device."""


class _Hopper:
    """As much of a Triton driver as compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    """One that was compiled instead: name of its function, what it compiled to, blocks of its grid, bytes of its tensors."""

    name: str
    compiled: Any
    blocks: int
    bytes: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within, launches compile for Hopper and do not run. Yields them in their order."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        moved = sum(one.numel() * one.element_size() for one in args if isinstance(one, Tensor))
        launches.append(Launch(self.fn.__name__, kernel, math.prod(grid), moved))
        return kernel

    JITFunction.run = compile_only
    before = getattr(driver, "_active", None)  # reset_active() asks for a GPU
    driver.set_active(_Hopper())
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver._active = before


def compile_all(shapes: list[Sizes]) -> list[Compiled]:
    """Every kernel of every operation for every shape; variants that come out alike are one."""
    assert not interpreted(), "interpreted kernels cannot be compiled: unset TRITON_INTERPRET"
    found: list[Compiled] = []
    for shape in shapes:
        for operation, case in CASES.items():
            with recorded() as launches:
                case(shape)
            for launch in {launch.compiled.hash: launch for launch in launches}.values():
                found.append(_inspect(operation, launch, shape.name))
    return list(dict.fromkeys(found))


def _inspect(operation: str, launch: Launch, shape: str) -> Compiled:
    kernel = launch.compiled
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    warps = kernel.metadata.num_warps
    count = instructions(text)
    cycles = None if count is None else count * warps * launch.blocks / (_PROCESSORS * _ISSUED)
    return Compiled(
        operation=operation,
        kernel=launch.name.removesuffix("_kernel"),
        shape=shape,
        warps=warps,
        registers=usage["REG"],
        shared=max(usage["SHARED"], kernel.metadata.shared),  # the latter is asked for at launch
        stack=usage["STACK"] + usage["LOCAL"],
        instructions=count,
        issue=None if cycles is None else round(cycles / _CLOCK / (launch.bytes / _MEMORY), 2),
    )


def instructions(sass: str) -> int | None:
    """Instructions up to the last exit, behind which are seldom taken paths of divisions; None if a branch goes back."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+?)(?:\s+([^;]*))?\s*;", sass, re.MULTILINE)
    last = max(index for index, (_, name, _) in enumerate(lines) if name.startswith("EXIT"))
    for address, name, operands in lines[:last]:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if name.startswith("BRA") else None
        if target is not None and int(target[1], 16) <= int(address, 16):
            return None
    return last + 1
