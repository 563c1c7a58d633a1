"""Faults that are planted are found: a rehearsal that sees nothing proves nothing.

Run by `make gpu-rehearsal`, in its environment; each case is a process that has the device preloaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nocuda.build import build, environment
from tests.nocuda.record import Counts, read
from tests.nocuda.rehearse import CASES, ROOT, problems

BEGIN = """
import ctypes, sys, torch
from pathlib import Path
from tests.nocuda.record import recording
x = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
host = torch.ones(64, 64, dtype=torch.bfloat16)
pinned = host.pin_memory()
library = ctypes.CDLL(None)
torch.mm(x, x)
with recording(Path(sys.argv[1])):
"""
# what is planted -> its code, and what must be told of it
FAULTS = {
    "nothing": ("torch.mm(x, x).add_(1)", None),
    "a copy that does not wait": ("pinned.copy_(x, non_blocking=True); x.copy_(pinned, non_blocking=True)", None),
    "a wait by .item()": ("x.sum().item()", ("waits", "stream at <string>")),
    "a wait by nonzero": ("x.nonzero()", ("waits", "stream")),
    "a wait for the device": ("torch.cuda.synchronize()", ("waits", "device at <string>")),
    "a tensor from a list": ("torch.tensor([1.0, 2.0], device='cuda')", ("pageable", "host to device, pageable")),
    "a number into an element": ("x[3, 3] = 1.0", ("pageable", "host to device, pageable")),
    "a pageable copy": ("host.copy_(x, non_blocking=True)", ("pageable", "device to host, pageable")),
    "memory that is not the device's": (
        "library.cudaMemsetAsync(ctypes.c_void_p(host.data_ptr()), 0, 4, None)",
        ("faults", "host"),
    ),
    "a product of the host's memory": (
        "at = lambda t: ctypes.c_void_p(t.data_ptr()); one = ctypes.byref(ctypes.c_float(1)); "
        "handle = ctypes.c_void_p(torch.cuda.current_blas_handle()); "
        "library.cublasSgemm_v2(handle, 0, 0, 8, 8, 8, one, at(host), 8, at(x), 8, one, at(x), 8)",
        ("faults", "operand on the host: gemm fp32"),
    ),
    "a grid over 65,535": ("kernel[(1, 70000)](x)", ("faults", "with a grid of 1 x 70000 x 1")),
    "a call that the device does not know": ("torch.linalg.lu_factor(torch.zeros(64, 4, 4, device='cuda'))", ("unknown", "")),
}
KERNEL = """
import triton
@triton.jit
def kernel(x_ptr):
    pass
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT / "build/nocuda")


def record_of(body: str, library: Path, folder: Path) -> Counts:
    script, record = folder / "planted.py", folder / "record.tsv"
    begin = KERNEL + BEGIN if "kernel[" in body else BEGIN
    script.write_text(begin + "".join(f"    {line}\n" for line in body.split("; ")))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    # by -c, so that the place is told as <string>; Triton alone needs a file
    how = [str(script)] if "kernel[" in body else ["-c", script.read_text()]
    done = subprocess.run(
        [sys.executable, *how, str(record)], env={**environment(library), "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return Counts.of(read(record))


@pytest.mark.parametrize("planted", FAULTS)
def test_it_is_found(planted: str, library: Path, tmp_path: Path) -> None:
    body, expected = FAULTS[planted]
    counts = record_of(body, library, tmp_path)
    found = {kind: getattr(counts, kind) for kind in ("waits", "pageable", "faults", "unknown")}
    if expected is None:
        assert not any(found.values()), found
    else:
        kind, text = expected
        assert any(text in one for one in found[kind]), found


def test_operands_on_the_host_are_refused_by_triton(library: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="cannot be accessed from Triton"):
        record_of("kernel[(1,)](host)", library, tmp_path)


def test_each_limit_of_a_case_is_held() -> None:
    case = CASES[0]
    good = {
        **{kind: [] for kind in ("faults", "pageable", "unknown")},
        "waits": ["stream at train/step.py:1"],
        "launches": case.launches,
        "one_block": case.one_block,
        "peak_bytes": 101,
        "modeled_bytes": 100,
    }
    assert problems(case, good) == []
    for change in (
        {"faults": ["operand on the host: gemm"]},
        {"pageable": ["host to device, pageable at here"]},
        {"unknown": ["cudaGraphLaunch"]},
        {"waits": [*good["waits"], "stream at train/step.py:2"]},
        {"waits": []},
        {"waits": ["event at elsewhere.py:3"]},
        {"launches": case.launches + 1},
        {"one_block": case.one_block + 1},
        {"peak_bytes": 104},
        {"peak_bytes": 96},
    ):
        assert len(problems(case, {**good, **change})) == 1, change
