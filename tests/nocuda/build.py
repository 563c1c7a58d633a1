"""Builds the device that computes nothing: `libcuda.so.1` from device/*.c, with the CUDA headers that torch's wheels bring.

What torch asks of CUDA, cuBLAS and NCCL and device/ does not have becomes a function that records its name and returns success.
Those are the `unknown` lines of a record.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "device"
_ASKED = re.compile(r"(__cuda[A-Z]|cuda[A-Z]|cu[A-Z]|cublas[A-Z]|cublasLt|nccl[A-Z])\w+")


def folder_of(package: str) -> Path:
    """Where a package is installed; it is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is not installed in {sys.executable}"
    return Path(spec.origin).parent


def _symbols(*options: str) -> set[str]:
    text = subprocess.run(["nm", *options], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].partition("@")[0] for line in text.splitlines() if line.strip()}


def build(out: Path) -> Path:
    """The library in the folder `out`; made again only if a source is newer."""
    library = out / "libcuda.so.1"
    sources = sorted(SOURCES.glob("*.c"))
    newest = max(file.stat().st_mtime for file in [*sources, SOURCES / "device.h", Path(__file__)])
    if library.exists() and library.stat().st_mtime > newest:
        return library
    out.mkdir(parents=True, exist_ok=True)
    # torch's own, whose structures are those of its CUDA; their folder crt comes with Triton alone
    headers = [folder_of("torch").parent / "nvidia/cu13/include", folder_of("triton") / "backends/nvidia/include"]
    compiler = os.environ.get("CC", "cc")
    # -Wno-unused-parameter is cc's default; the calls keep the parameters that CUDA gives them
    command = [compiler, "-std=gnu11", "-O2", "-fPIC", "-Wall", "-Werror", *(f"-I{path}" for path in headers), "-c"]
    objects = []
    for source in sources:
        objects.append(out / f"{source.stem}.o")
        subprocess.run([*command, str(source), "-o", str(objects[-1])], check=True)
    have = _symbols("--defined-only", *map(str, objects))
    libraries = [str(file) for file in (folder_of("torch") / "lib").glob("*.so")]
    asked = {name for name in _symbols("-D", "--undefined-only", *libraries) if _ASKED.fullmatch(name)}
    rest = out / "rest.c"
    lines = [f'int {name}(void) {{ unmodeled("{name}"); return 0; }}' for name in sorted(asked - have)]
    rest.write_text("\n".join(["void unmodeled(const char*);", *lines]) + "\n")
    objects.append(out / "rest.o")
    subprocess.run([compiler, "-O2", "-fPIC", "-w", "-fno-builtin", "-c", str(rest), "-o", str(objects[-1])], check=True)
    made = out / "libcuda.so.1.new"
    subprocess.run(
        [compiler, "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(made), *map(str, objects), "-lpthread"], check=True
    )
    made.rename(library)
    link = out / "libcuda.so"
    link.unlink(missing_ok=True)
    link.symlink_to(library.name)
    return library


def environment(library: Path) -> dict[str, str]:
    """Environment variables of a process that is to see the device."""
    return {
        **os.environ,
        "LD_PRELOAD": str(library),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        # cuDNN is a library of its own and asks a real driver
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
        "OMP_NUM_THREADS": "1",
    }


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
