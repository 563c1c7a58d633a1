"""A file system of a given speed: a folder, seen through FUSE, with so many bytes per second and so much latency a read.

    python -m benchmarks.scale.slow_disk FOLDER MOUNT CONTROL       # until MOUNT is unmounted

CONTROL is a file with two numbers, bytes per second and seconds of latency, read anew for every request. Requests wait beside
each other for the latency, and one after the other for their bytes, as at the end of a network.
"""

from __future__ import annotations

import os
import sys
import threading
import time

import mfusepy  # type: ignore[import-not-found, unused-ignore]

BACKGROUND = 64
"""Requests of read-ahead that the kernel has under way; its default is 12."""


class SlowDisk(mfusepy.Operations):  # type: ignore[misc, unused-ignore]
    """The folder, read-only."""

    use_ns = True

    def __init__(self, folder: str, control: str):
        self._folder, self._control = folder, control
        self._lock = threading.Lock()
        self._free = 0.0
        self._files: dict[str, int] = {}

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        """As the folder's, whole seconds apart."""
        found = os.lstat(self._folder + path)
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid")
        return {name: getattr(found, name) for name in names} | {"st_mtime": found.st_mtime_ns}

    def readdir(self, path: str, fh: int) -> list[str]:
        """The names in a folder."""
        return [".", "..", *os.listdir(self._folder + path)]

    def open(self, path: str, flags: int) -> int:
        """A descriptor of the file beneath."""
        return os.open(self._folder + path, os.O_RDONLY)

    def release(self, path: str, fh: int) -> int:
        """Close it."""
        os.close(fh)
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """The bytes, when they would have come."""
        with open(self._control) as file:
            rate, latency = map(float, file.read().split())
        data = os.pread(fh, size, offset)
        with self._lock:
            self._free = max(self._free, time.monotonic()) + len(data) / rate
            due = self._free + latency
        time.sleep(max(0.0, due - time.monotonic()))
        return data


def main(argv: list[str]) -> int:
    """Serve until unmounted."""
    folder, mount, control = argv
    options = {"max_background": BACKGROUND, "fsname": "slow-disk"}
    mfusepy.FUSE(SlowDisk(folder, control), mount, foreground=True, nothreads=False, ro=True, **options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
