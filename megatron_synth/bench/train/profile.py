"""Where the time of an optimizer step goes, by torch's profiler.

On a GPU the kernels on the device are counted, and a gap is time in which no kernel runs. On a CPU the operations' own time
is, and a gap is what no operation accounts for: mostly Python. Shares add up to 1; where kernels of several streams overlap,
communication beside computation is counted as the computation.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from megatron_synth.core.log import say

CATEGORIES: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|c10d::|gloo|all_?reduce|all_?gather|reduce_?scatter|send|recv|barrier"),
    ("attention", r"flash|fmha|attention|mha_|cudnn.*sdpa"),
    ("gemm", r"gemm|aten::(mm|bmm|addmm|matmul|_scaled_mm|baddbmm|linear)$|cutlass|cublas|nvjet|xmma|wgrad"),
    ("optimizer", r"adam|multi_tensor|_foreach|lpnorm"),
    ("data", r"memcpy HtoD|pin_memory|data loading"),
)
"""The first pattern that is found in an operation's or kernel's name decides; all else is `other`."""
NAMES = (*(name for name, _ in CATEGORIES), "other", "gaps")
_PATTERNS = [(name, re.compile(pattern, re.IGNORECASE)) for name, pattern in CATEGORIES]
_ORDER = ("gemm", "attention", "optimizer", "other", "data", "communication")
"""Who is given a moment in which several kernels run."""


def category(name: str) -> str:
    """The category of an operation or kernel."""
    return next((found for found, pattern in _PATTERNS if pattern.search(name)), "other")


def shares(intervals: Iterable[tuple[str, float, float]], begin: float, end: float) -> dict[str, float]:
    """Shares of [begin, end) by category, of (category, start, stop) that may overlap; the rest is gaps."""
    edges = []
    for name, start, stop in intervals:
        start, stop = max(start, begin), min(stop, end)
        if stop > start:
            edges += [(start, 1, name), (stop, -1, name)]
    running = dict.fromkeys(NAMES, 0)
    spent = dict.fromkeys(NAMES, 0.0)
    last = begin
    for at, change, name in sorted(edges):
        spent[next((one for one in _ORDER if running[one]), "gaps")] += at - last
        running[name] += change
        last = at
    spent["gaps"] += end - last
    return {name: value / (end - begin) for name, value in spent.items()}


def profile(step: Callable[[], None], device: torch.device, trace: Path | None = None) -> dict[str, float] | None:
    """Shares of one call of `step`, by the names of `NAMES`; None where the profiler may not look at the device.

    Args:
        step: an optimizer step that has been run before.
        device: where it runs.
        trace: a file for the trace, to be opened in chrome://tracing or perfetto.dev.
    """
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        began = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
        took = time.perf_counter() - began
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    if not on_gpu:
        return _host_shares(profiler, took)
    kernels = [
        (category(event.name), event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    if not kernels:  # containers are often not allowed to count: ERR_NVGPUCTRPERM in NVIDIA's documentation
        say("warning: the profiler saw no kernel on this GPU, so that nothing is known of what a step's time goes to")
        return None
    begin, end = min(start for _, start, _ in kernels), max(stop for _, _, stop in kernels)
    # the host launches the first kernel at once: what comes before it and after the last is a gap as well
    end = max(end, begin + took * 1e6)
    return shares(kernels, begin, end)


def _host_shares(profiler: torch.profiler.profile, took: float) -> dict[str, float]:
    spent = dict.fromkeys(NAMES, 0.0)
    for event in profiler.key_averages():
        # a function's own node also counts the Python code inside it
        if event.key.startswith(("aten::", "c10d::", "gloo")):
            spent[category(event.key)] += event.self_cpu_time_total / 1e6
    total = max(took, sum(spent.values()))
    spent["gaps"] = total - sum(spent.values())
    return {name: value / total for name, value in spent.items()}
