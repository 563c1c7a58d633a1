"""The device's record of a step: reading it, and what is counted in it.

Used inside a process that has the device preloaded (`recording`), and on the file that it wrote (`read`).
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """One call of the host. `values`: a copy's bytes; a product's m, n, k; a collective's bytes and ranks."""

    kind: str
    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: str
    values: tuple[int, ...]
    where: str
    """Lines of the Python stack, innermost first; of waits, faults and pageable copies alone."""

    @property
    def is_ours(self) -> bool:
        """Whether it is the launch of a Triton kernel."""
        return self.name.startswith("triton:")

    @property
    def one_block(self) -> bool:
        """A torch kernel of one block: work that is less than its launch."""
        return self.kind == "launch" and not self.is_ours and self.grid == (1, 1, 1)


def read(file: Path) -> list[Entry]:
    """The entries of a record, in their order."""
    entries = []
    for line in file.read_text(errors="replace").splitlines():
        kind, name, grid, block, shared, stream, values, where = line.split("\t")
        numbers = [tuple(int(part) for part in text.split(",")) for text in (grid, block, values)]
        entries.append(Entry(kind, name, numbers[0], numbers[1], int(shared), stream, numbers[2], where))
    return entries


@dataclass(frozen=True)
class Counts:
    """What a record comes to."""

    launches: int
    """Kernels of torch and Triton; products and collectives are counted apart."""
    triton: int
    one_block: int
    products: int
    collectives: int
    waits: tuple[str, ...]
    """Where the host waits for the device."""
    pageable: tuple[str, ...]
    """Copies between the device and memory that is not pinned: the host waits in each."""
    faults: tuple[str, ...]
    """Operands on the host, impossible launches."""
    unknown: tuple[str, ...]
    """Calls that the device does not know."""

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Counts:
        """Counts of these entries."""
        launches = [entry for entry in entries if entry.kind == "launch"]
        told = lambda entry: f"{entry.name} at {entry.where}"  # noqa: E731
        return cls(
            launches=len(launches),
            triton=sum(entry.is_ours for entry in launches),
            one_block=sum(entry.one_block for entry in launches),
            products=sum(entry.kind == "product" for entry in entries),
            collectives=sum(entry.kind == "collective" for entry in entries),
            waits=tuple(told(entry) for entry in entries if entry.kind == "wait"),
            pageable=tuple(told(entry) for entry in entries if entry.kind == "copy" and "pageable" in entry.name),
            faults=tuple(told(entry) for entry in entries if entry.kind == "fault"),
            unknown=tuple(entry.name for entry in entries if entry.kind == "unknown"),
        )


PARTS = {
    "Triton's launches": "/triton/",
    "megatron-core": "/megatron/core/",
    "torch, in Python": "/torch/",
    "this package": "megatron_synth",
    "torch, in C++": "~",
}
"""Whose code the host runs in a step -> what its files are known by; `~` is what is built in. The first that fits."""


def short(name: str) -> str:
    """A kernel's name as a person reads it: of torch's mangled templates, the words that tell them apart."""
    if name.startswith("triton:"):
        return name
    plain = _demangled(name)
    plain = re.sub(r"\(anonymous namespace\)::|at::native::|at_cuda_detail::|std::|void |c10::", "", plain)
    return plain[:170]


@cache
def _demangled(name: str) -> str:
    return subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()


def table(entries: Sequence[Entry], most: int = 40) -> str:
    """The most frequent calls, one to a line."""
    kinds = Counter((entry.kind, short(entry.name), entry.one_block) for entry in entries)
    lines = [
        f"{n:7d}  {kind:10s} {'1 block ' if one else '        '}{name}" for (kind, name, one), n in kinds.most_common(most)
    ]
    return "\n".join(lines)


# ---- inside a process that has the device


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    assert hasattr(library, "nocuda_record"), "the device is not preloaded; see build.environment"
    return library


def place() -> str:
    """The innermost lines of Python outside of torch, at most four: `train/step.py:232 < train/loop.py:310`."""
    lines: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(lines) < 4:
        file = frame.f_code.co_filename
        if "/torch/" not in file and "/nocuda/" not in file:
            lines.append(f"{'/'.join(file.split('/')[-2:])}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(lines)


@ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)
def _locate(out: int, size: int) -> None:
    text = place().encode()[: size - 1]
    ctypes.memmove(out, text + b"\0", len(text) + 1)


def locate_with(library: ctypes.CDLL) -> None:
    """Let the device ask for the lines of Python that made a call."""
    library.nocuda_locate(_locate)


@contextmanager
def recording(file: Path, trace: str = "") -> Iterator[None]:
    """Within, what the host asks of the device is recorded; it is in `file` afterwards.

    Launches whose names hold `trace` are told with their place, too.
    """
    library = _library()
    locate_with(library)
    library.nocuda_trace(trace.encode())
    library.nocuda_record(1)
    try:
        yield
    finally:
        library.nocuda_record(0)
        assert library.nocuda_write(str(file).encode()) == 0, f"{file} could not be written"
