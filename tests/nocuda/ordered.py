"""The order of streams, checked: who reads and writes which memory is told to the device, which knows events and waits.

`device/order.c` holds each access against those before it. What an operation of torch reads and writes follows from its
schema, what a Triton kernel does from its intermediate code, copies and collectives from their calls. A fault is a line in the
file that NOCUDA_ORDER names: both accesses with the lines of Python that made them.

A buffer that the host writes or reads too early is found by the protection of its pages, so whoever does it is found, a
thread, numpy or C.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.nocuda.record import locate_with, place

_NO_ACCESS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "record_stream", "set_", "is_pinned"}
_BY_CALLS = {"c10d", "_c10d_functional", "symm_mem"}
"""Namespaces whose accesses the device sees for itself, on the streams of NCCL."""


class _Teller:
    """Hands accesses to the device."""

    def __init__(self) -> None:
        self._tell = ctypes.CDLL(None).nocuda_access
        self._tell.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p]
        self._tell.restype = None

    def __call__(self, tensor: Tensor, writes: bool, who: bytes) -> None:
        """`tensor` is read, or written, by work on the current stream."""
        if tensor.is_cuda and tensor.numel():
            begin, end = extent(tensor)
            self._tell(torch.cuda.current_stream(tensor.device).cuda_stream, begin, end - begin, writes, who)


def extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor and of the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


@cache
def _written_arguments(func: Any) -> tuple[frozenset[int], frozenset[str]]:
    """Places and names of the arguments that an operation writes."""
    arguments = func._schema.arguments
    written = [one.alias_info is not None and one.alias_info.is_write for one in arguments]
    return (
        frozenset(index for index, writes in enumerate(written) if writes),
        frozenset(one.name for one, writes in zip(arguments, written, strict=True) if writes),
    )


class Accesses(TorchDispatchMode):
    """Within, operations of torch tell what they read and write. To be entered last: it sees what the program asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._tell = _Teller()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = str(func.overloadpacket).partition(".")[2]
        if func.namespace in _BY_CALLS or func.is_view or name in _NO_ACCESS:
            return result
        places, names = _written_arguments(func)
        given = [(value, index in places) for index, value in enumerate(args)]
        given += [(value, key in names) for key, value in kwargs.items()]
        who = f"{name} at {place()}".encode()
        for value, writes in given:
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor):
                    self._tell(tensor, writes, who)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._tell(tensor, True, who)
        return result


@cache
def stored_pointers(code: str) -> frozenset[int]:
    """Numbers of the arguments of a kernel through which it stores, from Triton's intermediate code; followed by names."""
    comes_from: dict[str, frozenset[int]] = {}
    stored: set[int] = set()
    head = re.search(r"tt\.func public @\w+\((.*?)\) attributes", code, re.DOTALL)
    if head is None:
        return frozenset(range(256))
    for index, name in enumerate(re.findall(r"(%\w+):", head.group(1))):
        comes_from[name] = frozenset([index])
    pointers = set(re.findall(r"(%\w+): !tt\.ptr", head.group(1)))
    for line in code.splitlines():
        made, _, rest = line.partition(" = ")
        used = [one for one in re.findall(r"%[\w#]+", rest or line) if one in comes_from]
        origins = frozenset().union(*(comes_from[one] for one in used))
        if "tt.store" in line or "tt.atomic" in line or "descriptor_store" in line:
            target = re.search(r"%[\w#]+", line.partition("tt.store")[2] or line)
            stored |= comes_from.get(target.group(), origins) if target else origins
        if rest and "tt.load" not in rest:
            for one in re.findall(r"%\w+", made):
                comes_from[one] = comes_from.get(one, frozenset()) | origins
    known = {index for name in pointers for index in comes_from[name]}
    # a pointer that is carried round a loop has another name there: then everything may be stored to
    return frozenset(stored & known) or frozenset(known)


@contextmanager
def _triton_told() -> Iterator[None]:
    """Within, launches of Triton's kernels tell which of their tensors they store to."""
    from triton.runtime.jit import JITFunction

    tell, launch = _Teller(), JITFunction.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        compiled = launch(self, *args, **options)
        stored = stored_pointers(compiled.asm["ttir"])
        bound = [*args, *(options[name] for name in self.arg_names[len(args) :] if name in options)]
        constant = {path[0] for path in compiled.src.constants if isinstance(path, tuple)}
        left = [value for index, value in enumerate(bound) if index not in constant]
        who = f"triton:{self.fn.__name__} at {place()}".encode()
        for index, value in enumerate(left):
            if isinstance(value, Tensor):
                tell(value, index in stored, who)
        return compiled

    JITFunction.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        JITFunction.run = launch  # type: ignore[method-assign]


@contextmanager
def ordered() -> Iterator[None]:
    """Within, what torch and Triton do on streams is checked. NOCUDA_ORDER must name a file."""
    locate_with(ctypes.CDLL(None))
    with _triton_told(), Accesses():
        yield


def faults(file: Path) -> list[str]:
    """What was found in a wrong order, of all processes that wrote `file`.

    Raises:
        AssertionError: no process has looked at anything.
    """
    lines = file.read_text().splitlines()
    ends = [line for line in lines if line.startswith("accesses ")]
    assert any(int(line.split()[1].rstrip(",")) for line in ends), f"{file}: nothing was checked"
    return [line for line in lines if not line.startswith("accesses ")]
