"""Checksums of the blocks of a shard, taken while it is written.

XXH3 (64 bit) is a checksum, not a signature: it finds every damage that chance does, at the speed of memory. The SHA-256
of the whole file stands beside it in the manifest for those who need more.
"""

from __future__ import annotations

import xxhash

BLOCK_BYTES = 4 * 2**20
DIGITS = 16  # hexadecimal digits of one checksum


def checksum(data: bytes | bytearray | memoryview) -> str:
    """The checksum of one block."""
    return xxhash.xxh3_64_hexdigest(data)


def block_count(size: int, block_bytes: int) -> int:
    """Blocks of a file of `size` bytes; the last may be short."""
    return -(-size // block_bytes)


def expected_blocks(joined: str) -> list[str]:
    """The checksums that one string of the manifest holds."""
    return [joined[at : at + DIGITS] for at in range(0, len(joined), DIGITS)]


class BlockHasher:
    """Takes the bytes of a file in pieces of any size and gives the checksum of each block, joined to one string."""

    def __init__(self, block_bytes: int = BLOCK_BYTES):
        self._block_bytes = block_bytes
        self._current = xxhash.xxh3_64()
        self._filled = 0
        self._done: list[str] = []

    def update(self, data: bytes) -> None:
        """Append bytes."""
        rest = memoryview(data)
        while len(rest):
            part = rest[: self._block_bytes - self._filled]
            self._current.update(part)
            self._filled += len(part)
            rest = rest[len(part) :]
            if self._filled == self._block_bytes:
                self._close()

    def finish(self) -> str:
        """Checksums of all blocks, `DIGITS` hexadecimal digits each."""
        if self._filled:
            self._close()
        return "".join(self._done)

    def _close(self) -> None:
        self._done.append(self._current.hexdigest())
        self._current, self._filled = xxhash.xxh3_64(), 0
