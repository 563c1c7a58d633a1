"""A whole optimizer step on paper: what its launches ask of a chip, by class, over what the chip was measured to give.

    python -m tests.nocuda.paper [--only TEXT] [--out FOLDER]

A step runs on the device that computes nothing. Every operation of torch tells its operands and the size of its product, every
Triton kernel its tensors. The time of one is the longest of: its floating-point operations at the measured rate, its bytes,
each operand once, at the measured speed of the memory, and the shortest time between two launches. Times add up: nothing
overlaps. So it is what no run can beat, not what a run will take: the last column is the share of it that the goal needs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.nocuda.ordered import _BY_CALLS, _NO_ACCESS, _written_arguments, stored_pointers

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 65_536  # of a step of bench/h200.yaml and bench/h200-3b.yaml


@dataclass(frozen=True)
class Chip:
    """What a chip was measured to give: FLOP/s of products, bytes/s."""

    name: str
    bf16: float
    memory: float


# products of 8192^3 and copies; see estimate/step_time.py for FP8 and attention, which are published rates of either chip
CHIPS = (Chip("H100", 798e12, 3.0e12), Chip("H200", 788e12, 4.3e12))
FP8, FORWARD, BACKWARD = 0.644 * 1979e12, 667e12, 444e12
LAUNCH = 2e-6
"""Seconds from one kernel to the next, at least: what a graphics processor needs to start one."""
GOALS = {"1.3B BF16": 52_000, "1.3B FP8": 64_000, "3B BF16": 23_500, "3B FP8": 30_000}
CASES = {
    "1.3B BF16": ("bench/h200.yaml",),
    "1.3B FP8 current": ("bench/h200.yaml", "precision.fp8=current", "precision.fp8_backend=own"),
    "1.3B FP8 delayed": ("bench/h200.yaml", "precision.fp8=delayed", "precision.fp8_backend=own"),
    "1.3B FP8 blockwise": (
        *("bench/h200.yaml", "precision.fp8=blockwise", "precision.fp8_format=e4m3", "precision.fp8_backend=own"),
    ),
    "3B BF16": ("bench/h200-3b.yaml",),
    "3B FP8 current": ("bench/h200-3b.yaml", "precision.fp8=current", "precision.fp8_backend=own"),
}
_NO_KERNEL = {"_unsafe_view", "_reshape_alias", "detach", "alias", "is_same_size", "_local_scalar_dense"}
CLASSES = (
    "products, BF16",
    "products, FP8",
    "attention",
    "quantizers",
    "norms, SwiGLU, rotation",
    "loss",
    "optimizer",
    "other",
)


@dataclass(frozen=True)
class Work:
    """One kernel. `rate`: which of a chip's rates its `flops` go by, empty where bytes alone count."""

    group: str
    name: str
    flops: float
    moved: int
    rate: str = ""

    def seconds(self, chip: Chip) -> tuple[float, str]:
        """Its time, and what limits it."""
        rates = {"bf16": chip.bf16, "fp8": FP8, "forward": FORWARD, "backward": BACKWARD}
        parts = {"memory": self.moved / chip.memory, "launch": LAUNCH}
        if self.rate:
            parts["products"] = self.flops / rates[self.rate]
        limit = max(parts, key=lambda name: parts[name])
        return parts[limit], limit


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def of_torch(name: str, tensors: list[Tensor], moved: int, causal: bool) -> Work:
    """An operation of torch by its name and operands, inputs first."""
    if name in ("mm", "addmm", "_scaled_mm", "_scaled_mm_v2", "bmm"):
        a, b = [one for one in tensors if one.dim() >= 2][-3 if name == "addmm" else 0 :][:2]
        fp8 = a.element_size() == 1
        return Work(
            "products, FP8" if fp8 else "products, BF16", name, 2.0 * a.numel() * b.shape[-1], moved, "fp8" if fp8 else "bf16"
        )
    if "attention" in name:
        query = next(one for one in tensors if one.dim() == 4)
        back = "backward" in name
        batch, heads, length, channels = query.shape
        flops = 4.0 * batch * heads * length * length * channels * (0.5 if causal else 1.0) * (2.5 if back else 1.0)
        return Work("attention", name, flops, moved, "backward" if back else "forward")
    group = "optimizer" if "adam" in name or "norm" in name or "foreach" in name else "other"
    return Work(group, name, 0.0, moved)


def of_triton(name: str, moved: int) -> Work:
    """A Triton kernel by its name."""
    if "adam" in name:
        group = "optimizer"
    elif "cross_entropy" in name:
        group = "loss"
    elif any(word in name for word in ("tensorwise", "blocks", "amax", "transpose", "statistics")):
        group = "quantizers"
    else:
        group = "norms, SwiGLU, rotation"
    return Work(group, name, 0.0, moved)


class _Seen(TorchDispatchMode):
    def __init__(self, found: list[Work]):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = str(func.overloadpacket).partition(".")[2]
        if func.namespace in _BY_CALLS or func.is_view or name in _NO_ACCESS or name in _NO_KERNEL:
            return result
        places, names = _written_arguments(func)
        given = [one for value in (*args, *kwargs.values()) for one in tree_leaves(value) if isinstance(one, Tensor)]
        changed = [
            *(value for index, value in enumerate(args) if index in places),
            *(kwargs[key] for key in names if key in kwargs),
        ]
        written = {id(one) for value in changed for one in tree_leaves(value) if isinstance(one, Tensor)}
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor) and id(one) not in written]
        only_writes = {"copy_", "fill_", "zero_", "_foreach_zero_"}
        moved = sum(_size(one) for one in made if one.is_cuda)
        for one in given:
            if one.is_cuda:
                out = any(one is kwargs.get(key) for key in ("out",)) or (name in only_writes and id(one) in written)
                moved += _size(one) * (2 if id(one) in written and not out else 1)
        if any(one.is_cuda for one in (*given, *made)):
            causal = any(value is True for value in (*args, *kwargs.values()))
            self._found.append(of_torch(name, [*given, *made], moved, causal))
        return result


@contextmanager
def seen() -> Iterator[list[Work]]:
    """Within, the work of torch and of Triton in this thread is noted."""
    from triton.runtime.jit import JITFunction

    found: list[Work] = []
    launch = JITFunction.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        compiled = launch(self, *args, **options)
        stored = stored_pointers(compiled.asm["ttir"])
        tensors = {one.data_ptr(): one for one in args if isinstance(one, Tensor)}  # what is read and written has one pointer
        twice = "adam" in self.fn.__name__ or "cross_entropy_grad" in self.fn.__name__
        moved = sum(_size(one) for one in tensors.values())
        if twice:
            constant = {path[0] for path in compiled.src.constants if isinstance(path, tuple)}
            left = [value for index, value in enumerate(args) if index not in constant]
            moved += sum(_size(value) for index, value in enumerate(left) if isinstance(value, Tensor) and index in stored)
        found.append(of_triton(self.fn.__name__.removesuffix("_kernel"), moved))
        return compiled

    JITFunction.run = run  # type: ignore[method-assign]
    try:
        with torch.autograd.set_multithreading_enabled(False), _Seen(found):
            yield found
    finally:
        JITFunction.run = launch  # type: ignore[method-assign]


def collect(arguments: list[str]) -> list[Work]:
    """The work of one step; in a process that has the device preloaded."""
    from megatron_synth.config.load import load_file
    from megatron_synth.config.schema import Config
    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import plan

    config = load_file(Config, arguments[0], arguments[1:])
    layout = plan(config, 1)
    with process_group(layout, 1) as ranks:
        from megatron_synth.bench.train.engine import Engine, random_batches
        from megatron_synth.model.fp8 import setup

        trial = setup._disagreement
        setup._disagreement = lambda *given: (trial(*given), None)[1]  # it runs; its numbers mean nothing here
        engine = Engine(config, layout, ranks)
        (batches,) = random_batches(config, layout, ranks, 1)
        engine.step(batches)
        with seen() as found:
            engine.step(batches)
    return found


def rows(case: str, found: list[Work]) -> list[str]:
    """A line of the table for each chip: milliseconds by class, the step, tokens/s and the goal."""
    lines = []
    goal = next((value for name, value in GOALS.items() if case.startswith(name)), 0)
    for chip in CHIPS:
        spent = Counter[str]()
        for work in found:
            spent[work.group] += work.seconds(chip)[0]  # type: ignore[assignment]
        total = sum(spent.values())
        cells = [f"{1000 * spent[group]:.0f}" if spent[group] else "" for group in CLASSES]
        speed = TOKENS / total
        cells += [f"{1000 * total:.0f}", f"{speed / 1000:.1f}", f"{goal / 1000:g}", f"{100 * goal / speed:.0f} %"]
        lines.append(f"| {case} | {chip.name} | " + " | ".join(cells) + " |")
    return lines


def limits(case: str, found: list[Work]) -> str:
    """A line of the second table: shares of the step on an H200 by what limits it, and the three largest kernels of memory."""
    chip = CHIPS[-1]
    by, longest = Counter[str](), Counter[str]()
    for work in found:
        seconds, limit = work.seconds(chip)
        by[limit] += seconds  # type: ignore[assignment]
        if limit == "memory":
            longest[work.name] += seconds  # type: ignore[assignment]
    total = sum(by.values())
    most = ", ".join(f"`{name}` {1000 * seconds:.0f} ms" for name, seconds in longest.most_common(3))
    return (
        f"| {case} | "
        + " | ".join(f"{100 * by[name] / total:.0f} %" for name in ("products", "memory", "launch"))
        + f" | {most} |"
    )


def main() -> int:
    from tests.nocuda.build import build, environment

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose names hold TEXT")
    parser.add_argument("--out", type=Path, default=ROOT / "build/rehearsal-out")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.case:
        print(json.dumps([asdict(work) for work in collect(options.case)]))
        return 0
    library = build(ROOT / "build/nocuda")
    table = [
        "| ms of a step | chip | " + " | ".join(CLASSES) + " | step | k tokens/s | goal | needs |",
        "| --- | --- |" + " ---: |" * 12,
    ]
    second = [
        "| limited by, on an H200 | products | memory | launches | most of memory's time |",
        "| --- |" + " ---: |" * 3 + " --- |",
    ]
    for name, arguments in CASES.items():
        if options.only not in name:
            continue
        command = [sys.executable, "-m", "tests.nocuda.paper", "--case", *arguments]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        variables = {**environment(library), "PYTHONPATH": paths}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]
        found = [Work(**one) for one in json.loads(done.stdout.splitlines()[-1])]
        table += rows(name, found)
        second.append(limits(name, found))
        print(*rows(name, found), sep="\n", flush=True)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    used = f"torch {version('torch')}, triton {version('triton')}"
    end = f"`python -m tests.nocuda.paper`, commit {commit}, {datetime.now(UTC):%Y-%m-%d}, {used}, no GPU."
    lines = [*table, "", *second, "", end]
    (options.out / "paper.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
