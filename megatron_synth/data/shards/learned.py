"""Which tokens are learned: a bit for each token of a shard, in a file `X.learned` beside its .bin and .idx.

Bit t % 8 of byte t // 8, the lowest first, is 1 where token t is a label that counts in the loss; it is read as an input either
way. The bits after the last token are 0. Sources whose tokens are all learned have no such files. The manifest has of each the
SHA-256 and how many tokens are learned.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_synth.config.errors import UserError
from megatron_synth.data.shards import native
from megatron_synth.data.shards.open_files import AGAIN, OpenFile, map_file, opened_whole, read_exactly, unreadable

SUFFIX = ".learned"
_PART = 4 * 2**20

Bools = npt.NDArray[np.bool_]


def mask_bytes(tokens: int) -> int:
    """Size of the file of so many tokens."""
    return -(-tokens // 8)


def bools_of(content: npt.NDArray[np.uint8], begin: int, count: int) -> Bools:
    """Of tokens [begin, begin + count) whether they are learned, fewer where it ends. content: from byte begin // 8 on."""
    return np.unpackbits(content, bitorder="little")[begin % 8 :][:count].view(np.bool_)


class LearnedWriter:
    """Writes the file of one shard, part after part."""

    def __init__(self, path: Path):
        self._file = open(path, "wb")  # noqa: SIM115 (open until finish or abandon)
        self._hash = hashlib.sha256()
        self._rest = np.empty(0, np.bool_)
        self._learned = 0

    def add(self, learned: Bools) -> None:
        """The next tokens [T], in order."""
        self._learned += int(np.count_nonzero(learned))
        waiting = np.concatenate([self._rest, learned])
        whole = len(waiting) // 8 * 8
        self._write(waiting[:whole])
        self._rest = waiting[whole:]

    def finish(self) -> tuple[str, int]:
        """Write what is left and force it to disk; the SHA-256 of the file and how many tokens are learned."""
        self._write(self._rest)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest(), self._learned

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()

    def _write(self, learned: Bools) -> None:
        data = np.packbits(learned, bitorder="little").tobytes()
        self._file.write(data)
        self._hash.update(data)


class LearnedFile:
    """The file of one shard, whose size was checked, for reading at random."""

    def __init__(self, path: Path, tokens: int, *, memory_map: bool):
        self.path, self.tokens, self._memory_map = path, tokens, memory_map
        self.mapped: npt.NDArray[np.uint8] | None = None
        """The file, once mapped."""
        self._file: OpenFile | None = None

    def map(self) -> npt.NDArray[np.uint8]:
        """The file, mapped.

        Raises:
            UserError: it cannot be, or has become shorter.
        """
        mapped = self.mapped  # another thread may close it
        if mapped is None:
            size = mask_bytes(self.tokens)
            content = map_file(self.path, size)
            content.madvise(mmap.MADV_RANDOM)
            mapped = self.mapped = np.frombuffer(content, np.uint8, size)
        return mapped

    @property
    def is_open(self) -> bool:
        """Whether a file is held open."""
        return self._file is not None or self.mapped is not None

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        self.mapped = self._file = None

    def read(self, begin: int, out: Bools) -> None:
        """Fill `out` [N] with whether tokens [begin, begin + N) are learned.

        Raises:
            UserError: the file cannot be read there, or has become shorter.
        """
        assert 0 <= begin <= self.tokens - len(out), (self.path, begin, out.shape)
        first = begin // 8
        content = np.empty(mask_bytes(begin + len(out)) - first, np.uint8)
        library = native.library()
        if self._memory_map and library is not None:
            mapped = self.map()
            try:
                native.read_map(library, mapped, first, content)
            except native.BusError as error:
                raise unreadable(self.path, mapped, error) from None
        elif self._memory_map:
            content[:] = self.map()[first : first + len(content)]
        else:
            try:
                file = self._file or OpenFile(self.path)
                self._file = file
                read_exactly(file.fd, self.path, content.data, first)
            except OSError as error:
                raise UserError(f"{self.path}: {error.strerror} while reading at offset {first}; {AGAIN}") from None
        out[:] = bools_of(content, begin, len(out))


def check_file(path: Path, tokens: int, learned_tokens: int, sha256: str) -> None:
    """Read a file whole and compare it with the manifest.

    Raises:
        UserError: it cannot be read, or its size, checksum or number of learned tokens is not the manifest's.
    """
    size, total, found, last = mask_bytes(tokens), hashlib.sha256(), 0, 0
    buffer = np.empty(_PART, np.uint8)
    with opened_whole(path, size) as file:
        for at in range(0, size, _PART):
            part = buffer[: min(_PART, size - at)]
            read_exactly(file, path, part.data, at)
            total.update(part.data)
            found += int(np.bitwise_count(part).sum(dtype=np.int64))
            last = int(part[-1])
    if total.hexdigest() != sha256:
        raise UserError(f"{path}: altered: its checksum is not the manifest's; {AGAIN}")
    if found != learned_tokens or last >> (tokens % 8 or 8):
        raise UserError(f"{path}: {found} bits for {learned_tokens} learned tokens of {tokens}; {AGAIN}")
