"""Memory of this process."""

from __future__ import annotations

from pathlib import Path


def anonymous_bytes() -> int:
    """Memory of this process that is not pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status: the benchmark runs on Linux")
