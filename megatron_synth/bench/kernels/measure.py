"""Speed of each operation by every backend that is available, beside torch eager, torch.compile and other libraries.

Conventions, stated again in the table:

- Inputs rotate among sets that together exceed the last-level cache, so that nothing is found there from the call before.
- On a GPU a burst of calls is queued behind a kernel that only waits, and timed by events: launches cost nothing then. On a CPU
  every call is timed by the clock. The median over bursts or calls is reported.
- GB/s are the least bytes that the operation can move, or FLOP/s its operations, over the time; the share is of a copy or of a
  square product of matrices, measured in the same process just before.
- All implementations of an operation must agree with torch's before they are timed.
- Peak memory is what one call allocates beyond its inputs, forward and backward together; on a CPU it is not known.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_synth.bench.kernels.cases import EPS, Case, adam_step, cases, forget_optimizers, two_passes
from megatron_synth.config.errors import UserError
from megatron_synth.core.log import say
from megatron_synth.model.kernels import Sizes
from megatron_synth_kernels.registry import COMPILE, OPERATIONS
from megatron_synth_kernels.torch.fp8 import Scaling

_AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
_WAIT_CYCLES = 40_000_000  # about 20 ms, in which a burst of calls is queued


@dataclass(frozen=True)
class Ceilings:
    """What the device did in this process, in bytes and FLOPs per second."""

    copy: float
    product: float


@dataclass(frozen=True)
class Row:
    """One implementation of one pass of an operation; `problem` instead of figures where it could not be run."""

    operation: str
    shape: str
    direction: str
    contender: str
    seconds: float | None = None
    rate: float | None = None
    flops: bool = False
    ceiling: float | None = None
    peak_bytes: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Effort:
    """How much is measured. cache: bytes that a rotation of inputs exceeds; calls: in a burst; bursts: timed."""

    cache: int
    calls: int
    bursts: int
    copy_bytes: int
    product_size: int


GPU = Effort(cache=256 << 20, calls=20, bursts=9, copy_bytes=1 << 30, product_size=8192)
CPU = Effort(cache=128 << 20, calls=1, bursts=9, copy_bytes=256 << 20, product_size=1024)
SMOKE = Effort(cache=1 << 16, calls=1, bursts=2, copy_bytes=1 << 20, product_size=64)


def run(
    sizes: Sequence[Sizes], dtype: torch.dtype, device: torch.device, effort: Effort, only: str | None, baselines: Sequence[str]
) -> tuple[Ceilings, list[Row]]:
    """Measure.

    Args:
        sizes: models' sizes.
        dtype: of activations.
        device: where.
        effort: how much.
        only: operations whose name holds this.
        baselines: names among those of the cases, beside the registry's backends.

    Raises:
        UserError: `only` fits no operation, or an implementation does not compute what torch's does.
    """
    torch.manual_seed(0)
    todo = [case for one in sizes for case in cases(one, dtype, device) if only is None or only in case.operation]
    if not todo:
        known = ", ".join(dict.fromkeys(case.operation for case in cases(sizes[0], dtype, device)))
        raise UserError(f"--only {only}: no operation has this in its name; known: {known}")
    assert not torch.distributed.is_initialized()
    limits = ceilings(dtype, device, effort)
    rows: list[Row] = []
    for case in todo:
        found = _measure(case, dtype, device, effort, limits, baselines)
        say(f"{case.operation} {case.sizes.name}: " + ", ".join(map(_progress, found)))
        rows += found
    if torch.distributed.is_initialized():  # for megatron-core's
        torch.distributed.destroy_process_group()
    return limits, rows


def _progress(row: Row) -> str:
    return f"{row.contender} {row.direction} " + ("-" if row.seconds is None else f"{1e6 * row.seconds:.0f} us")


def ceilings(dtype: torch.dtype, device: torch.device, effort: Effort) -> Ceilings:
    """A copy between two buffers, counted as read and written, and a square product of matrices."""
    source = torch.empty(effort.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = timed([partial(target.copy_, source)], device, effort)
    size = effort.product_size
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = timed([partial(torch.mm, left, right)], device, effort)
    return Ceilings(2 * effort.copy_bytes / copy, 2 * size**3 / product)


def timed(calls: Sequence[Callable[[], Any]], device: torch.device, effort: Effort) -> float:
    """Median seconds of one call; the calls take turns."""
    for call in calls:
        call()
    times = []
    turn = 0
    for _ in range(effort.bursts):
        burst = [calls[(turn + index) % len(calls)] for index in range(max(effort.calls, 1))]
        turn += len(burst)
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            torch.cuda._sleep(_WAIT_CYCLES)
            begin.record()
            for call in burst:
                call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / len(burst))
        else:
            began = time.perf_counter()
            for call in burst:
                call()
            times.append((time.perf_counter() - began) / len(burst))
    return statistics.median(times)


def contenders(case: Case, dtype: torch.dtype, device: torch.device, baselines: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Name -> a function that loads the implementation or raises; the registry's backends by preference, then baselines.

    torch.compile counts among the baselines: it takes long to build, and no run takes it by itself.
    """

    def loader(operation: str, backend: Any) -> Callable[[], Any]:
        def load() -> Any:
            problem = backend.why_not(device, dtype)
            if problem is not None:
                raise RuntimeError(problem)
            return _adapted(operation, backend.load())

        return load

    found: dict[str, Callable[[], Any]] = {}
    if case.operation == "cross_entropy":
        passes = [
            {b.name: loader(name, b) for b in OPERATIONS[name].backends}
            for name in ("cross_entropy_stats", "cross_entropy_grad")
        ]
        for name in passes[0]:
            found[name] = partial(lambda name: two_passes(passes[0][name](), passes[1][name]()), name)
    else:
        backends = [one for one in OPERATIONS[case.operation].backends if one.name != COMPILE or COMPILE in baselines]
        found = {backend.name: loader(case.operation, backend) for backend in backends}
    for name, make in case.baselines.items():
        if name in baselines:
            found.setdefault(name, make)
    return found


def _adapted(operation: str, loaded: Any) -> Any:
    """What the registry gives, as the case calls it."""
    if operation == "adam":
        return partial(adam_step, loaded)
    if operation == "wgrad":

        def accumulate(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> Tensor:
            loaded.wgrad_gemm_accum_fp32(inputs, grad_output, main_grad)
            return main_grad

        return accumulate
    if operation == "quantise_fp8":

        def apart(x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
            return _quantized(partial(loaded.quantize_tensorwise, x), scale)

        return apart
    if operation == "rms_norm_quantise":
        return lambda x, weight, scale: _quantized(loaded.Normalized(x, weight, EPS).tensorwise, scale)
    if operation == "swiglu_quantise":

        def both(gate_and_up: Tensor, grad: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
            sources = loaded.SwiGLU(gate_and_up), loaded.SwiGLUGradient(grad, gate_and_up)
            return tuple(part for source in sources for part in _quantized(source.tensorwise, scale))

        return both
    return loaded


def _quantized(quantize: Callable[..., Any], scale: Tensor) -> tuple[Tensor, ...]:
    """Both orders in e4m3, by a known scale, and the largest magnitude."""
    inverse, noted = torch.zeros(2, dtype=torch.float32, device=scale.device).unbind()
    return *quantize(Scaling(inverse, scale=scale, noted=noted), torch.float8_e4m3fn), noted


def _measure(
    case: Case, dtype: torch.dtype, device: torch.device, effort: Effort, limits: Ceilings, baselines: Sequence[str]
) -> list[Row]:
    first = case.inputs()
    size = sum(x.numel() * x.element_size() for x in first)
    sets = [first, *(case.inputs() for _ in range(min(31, effort.cache // size)))]
    expected = _answer(case, contenders(case, dtype, device, ())["torch"](), first)
    rows = []
    for name, load in contenders(case, dtype, device, baselines).items():
        try:
            implementation = load()
            found = _answer(case, implementation, first)
        except Exception as error:  # a baseline that this machine or these sizes do not suit; its row says so
            problem = (str(error).splitlines() or [repr(error)])[0]
            rows.append(Row(case.operation, case.sizes.name, "forward", name, problem=problem))
            continue
        _check(case, name, found, expected, dtype)
        rows += _time(case, name, implementation, sets, device, effort, limits)
        forget_optimizers()
    return rows


def _copies(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same leaves again: an implementation may overwrite what it is given."""
    return tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)


def _leaves(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in inputs if x.requires_grad]


def _answer(case: Case, implementation: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and, where there are any, gradients for output gradients of one."""
    own = _copies(inputs)
    outputs = case.call(implementation, own)
    answer = [x.detach().clone() for x in outputs]
    forget_optimizers()
    if _leaves(own):
        answer += torch.autograd.grad(outputs, _leaves(own), [torch.ones_like(x) for x in outputs])
    return answer


def _check(case: Case, name: str, found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        scale = theirs.float().abs().max().clamp(min=1e-6)
        apart = ((ours.float() - theirs.float()).abs().max() / scale).item()
        if not apart <= _AGREEMENT[dtype]:
            where = f"{case.operation} {case.sizes.name}"
            raise UserError(f"{where}: {name} does not compute what torch's does, results differ by {apart:.1e} of the largest")


def _time(
    case: Case,
    name: str,
    implementation: Any,
    sets: Sequence[tuple[Tensor, ...]],
    device: torch.device,
    effort: Effort,
    limits: Ceilings,
) -> list[Row]:
    # logits and weights are overwritten; what the values are makes no difference to the time
    sets = [_copies(inputs) for inputs in sets] if not _leaves(sets[0]) else sets
    limit = limits.product if case.flops else limits.copy
    peak = _peak(case, implementation, sets[0], device)

    def row(direction: str, seconds: float, work: float) -> Row:
        rate = work / seconds
        return Row(case.operation, case.sizes.name, direction, name, seconds, rate, case.flops, rate / limit, peak, None)

    forward = timed([partial(case.call, implementation, inputs) for inputs in sets], device, effort)
    direction = "forward" if case.backward else "whole"
    rows = [row(direction, forward, case.forward)]
    if case.backward:
        calls = []
        for inputs in sets:
            outputs = case.call(implementation, inputs)
            grads = [torch.randn_like(x) for x in outputs]
            calls.append(partial(torch.autograd.grad, outputs, _leaves(inputs), grads, retain_graph=True))
        rows.append(row("backward", timed(calls, device, effort), case.backward))
    return rows


def _peak(case: Case, implementation: Any, inputs: tuple[Tensor, ...], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    outputs = case.call(implementation, inputs)
    if _leaves(inputs):
        torch.autograd.grad(outputs, _leaves(inputs), [torch.ones_like(x) for x in outputs])
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
