"""Memory of this process."""

from __future__ import annotations

from pathlib import Path


def anonymous_bytes() -> int:
    """Memory of this process that is not pages of files."""
    return _status("RssAnon")


def peak_bytes() -> int:
    """The most memory that this process had resident, files included."""
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status: the benchmark runs on Linux")
