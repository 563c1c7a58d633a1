"""What a bare .bin/.idx pair holds: a digest of all its bytes, and its smallest and largest token id.

Nothing else says what such a pair holds, so it is read whole once by each process that opens it: at the speed of the disk, or
of memory where another process of the machine has read it just before. Size and times of a file, or some of its blocks, would
be read sooner, and would miss tokens that were replaced.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import open_regular
from megatron_synth.data.shards.indexed import Shard, beyond_vocabulary
from megatron_synth.data.shards.open_files import AGAIN

READ_BYTES = 4 << 20


@dataclass(frozen=True)
class Content:
    """All that is in a pair, in short."""

    digest: str
    """XXH3, 128 bits, of both files."""
    smallest: tuple[int, int]
    """Smallest token id and the byte of the .bin file at which it stands first; (0, 0) without tokens."""
    largest: tuple[int, int]
    """Likewise the largest."""

    def check_ids(self, path: Path, vocab_size: int) -> None:
        """Refuse (UserError) token ids that a vocabulary of this size does not have. path: the .bin file."""
        for token, byte in (self.smallest, self.largest):
            if not 0 <= token < vocab_size:
                raise beyond_vocabulary(path, byte, token, vocab_size)


def content_of(shard: Shard) -> Content:
    """Read both files of a pair from front to back.

    Raises:
        UserError: one cannot be read.
    """
    files = tuple((str(path), *_identity(path)) for path in (shard.idx_path, shard.bin_path))
    return _read(files, shard.dtype.str)


def _identity(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {AGAIN}") from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@functools.lru_cache(maxsize=64)  # training and validation, or a plan and its run, may open one pair more than once
def _read(files: tuple[tuple[str | int, ...], ...], dtype: str) -> Content:
    total = xxhash.xxh3_128()
    smallest, largest = (0, 0), (0, 0)
    for number, (path, *identity) in enumerate(files):
        size, offset = int(identity[2]), 0
        total.update(size.to_bytes(8, "little"))
        try:
            with os.fdopen(open_regular(Path(str(path))), "rb", buffering=0) as file:
                while block := file.read(READ_BYTES):
                    total.update(block)
                    if number:  # a short read ends within a token only when the file is cut off
                        tokens = np.frombuffer(
                            block[: len(block) // np.dtype(dtype).itemsize * np.dtype(dtype).itemsize], dtype
                        )
                        smallest = _beyond(smallest, tokens, offset, np.argmin, first=offset == 0)
                        largest = _beyond(largest, tokens, offset, np.argmax, first=offset == 0)
                    offset += len(block)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror} while reading it; {AGAIN}") from None
        if offset != size:
            raise UserError(f"{path}: {size} bytes expected, found {offset}: it changed while it was read; {AGAIN}")
    return Content(total.hexdigest(), smallest, largest)


def _beyond(best: tuple[int, int], tokens: np.ndarray, offset: int, pick: object, *, first: bool) -> tuple[int, int]:
    """The better of `best` and the pick of these tokens, which begin at byte `offset`."""
    if not len(tokens):
        return best
    place = int(pick(tokens))  # type: ignore[operator]
    token = int(tokens[place])
    better = first or (token < best[0] if pick is np.argmin else token > best[0])
    return (token, offset + place * tokens.itemsize) if better else best
