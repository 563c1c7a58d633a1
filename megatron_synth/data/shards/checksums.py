"""Whether the files of a prepared source still hold what `prepare` wrote: all at once, or each block as it is first read.

The manifest carries a checksum for each block of every .bin file and one of each .idx file. Manifests of version 1
have one checksum per file; they can be verified, but not block by block while training.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import open_regular, read_regular
from megatron_synth.data.shards.block_hash import block_count, checksum, expected_blocks
from megatron_synth.data.shards.columns import SUFFIX as COLUMNS
from megatron_synth.data.shards.columns import ColumnFile
from megatron_synth.data.shards.indexed import HEADER, MAGIC, TOKEN_TYPES, VERSION, with_suffix
from megatron_synth.data.shards.learned import SUFFIX as LEARNED
from megatron_synth.data.shards.learned import check_file
from megatron_synth.data.shards.manifest import FILE_NAME, Manifest, ShardInfo
from megatron_synth.data.shards.open_files import AGAIN

BLOCKS_PER_TASK = 64  # large enough to cost nothing, small enough to share one shard among all threads


@dataclass(frozen=True)
class Fault:
    """Something wrong in one file.

    block, first_byte, end_byte: where, as far as it is known; message: what, and what was expected.
    """

    file: str
    message: str
    block: int | None = None
    first_byte: int | None = None
    end_byte: int | None = None

    def __str__(self) -> str:
        where = "" if self.first_byte is None else f", byte {self.first_byte}"
        if self.block is not None:
            where = f", block {self.block} (bytes {self.first_byte} to {self.end_byte})"
        return f"{self.file}{where}: {self.message}"


@dataclass(frozen=True)
class Verification:
    """What was read, how long it took, and all that is wrong; unblocked: shards of manifests without block checksums."""

    sources: int
    shards: int
    read_bytes: int
    seconds: float
    unblocked: int
    faults: tuple[Fault, ...]


class BlockChecker:
    """Verifies each block of a source, and each index, once: before anything of it is first used.

    Safe to share between threads; two may verify the same block, none may use one that nobody has verified.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        missing = [shard.name for shard in manifest.shards if shard.bin_blocks is None]
        if missing:
            raise UserError(
                f"{folder / FILE_NAME}: no checksums of blocks for {missing[0]} (format_version {manifest.format_version}); "
                f"prepare the source again, or check less than blocks"
            )
        self._folder, self._manifest = folder, manifest
        self._lock = threading.Lock()
        self._verified: dict[int, bytearray] = {}  # shard -> for each block 0 or 1

    def check(self, shard_number: int, first_byte: int, end_byte: int) -> None:
        """Verify the blocks of the .bin file that hold bytes [first_byte, end_byte), and, at first, the shard's index.

        A block is read, compared with its checksum and searched for token ids beyond the vocabulary. A UserError names file,
        block and bytes, and nothing of that block may be used.
        """
        verified = self._verified.get(shard_number)
        if verified is None:
            verified = self._open(shard_number)
        size = self._manifest.block_bytes
        first, last = first_byte // size, -(-end_byte // size)
        if 0 not in verified[first:last]:
            return
        shard = self._manifest.shards[shard_number]
        assert shard.bin_blocks is not None and 0 <= first_byte <= end_byte <= shard.bin_bytes, (shard.name, end_byte)
        path = with_suffix(self._folder / shard.name, ".bin")
        expected = expected_blocks(shard.bin_blocks)
        buffer = bytearray(size)
        with _opened(path) as file:
            for block in range(first, last):
                if verified[block]:
                    continue
                data = _read_block(file, path, buffer, block, size, shard.bin_bytes)
                if isinstance(data, Fault):
                    fault: Fault | None = data
                else:
                    fault = _compare(path, block, size, data, expected[block])
                    fault = fault or _beyond_vocabulary(path, self._manifest, block, data)
                if fault is not None:
                    raise UserError(f"{fault}; {AGAIN}")
                verified[block] = 1

    def _open(self, shard_number: int) -> bytearray:
        shard = self._manifest.shards[shard_number]
        _, faults = _check_index(self._folder, self._manifest, shard)
        if shard.learned_tokens is not None:
            faults += _check_learned(self._folder, shard)[1]
        if faults:
            raise UserError(f"{faults[0]}; {AGAIN}")
        with self._lock:
            blocks = bytearray(block_count(shard.bin_bytes, self._manifest.block_bytes))
            return self._verified.setdefault(shard_number, blocks)


def verify(
    folders: Sequence[Path], *, workers: int, progress: Callable[[int], None] = lambda read: None, sha256: bool = False
) -> Verification:
    """Read all files of prepared sources and compare them with their manifests.

    Args:
        folders: each with a manifest.json.
        workers: threads; reading and hashing need no interpreter lock.
        progress: called with the bytes that each step has read, from several threads.
        sha256: check the SHA-256 of whole files, too; one thread reads a file, at hashing speed.
    """
    start = time.perf_counter()
    manifests = [Manifest.load(folder) for folder in folders]
    found: dict[tuple[int, int], dict[int, str]] = defaultdict(dict)  # (source, shard) -> block -> checksum, bad ones only
    total, faults = 0, []

    def run(task: tuple[int, int, int, int, str]) -> tuple[int, list[Fault]]:
        source, number, first, last, kind = task
        manifest, shard = manifests[source], manifests[source].shards[number]
        if kind == "index":
            read, wrong = _check_index(folders[source], manifest, shard)
        elif kind == "columns":
            read, wrong = _check_columns(folders[source], manifest, shard)
        elif kind == "learned":
            read, wrong = _check_learned(folders[source], shard)
        elif kind == "sha256":
            read, wrong = _check_whole(folders[source], manifest, shard)
        else:
            read, wrong = _check_blocks(folders[source], manifest, shard, first, last, found[source, number])
        progress(read)
        return read, wrong

    tasks = [
        (source, number, first, last, kind)
        for source, manifest in enumerate(manifests)
        for number, shard in enumerate(manifest.shards)
        for first, last, kind in _tasks(manifest, shard, sha256)
    ]
    for task in tasks:
        found[task[:2]]  # made here: a defaultdict is not to be grown by several threads
    with ThreadPoolExecutor(workers) as pool:
        for read, wrong in pool.map(run, tasks):
            total += read
            faults += wrong
    faults = _name_origins(folders, manifests, found, faults)
    return Verification(
        sources=len(folders),
        shards=sum(len(manifest.shards) for manifest in manifests),
        read_bytes=total,
        seconds=time.perf_counter() - start,
        unblocked=sum(shard.bin_blocks is None for manifest in manifests for shard in manifest.shards),
        faults=tuple(faults),
    )


def _tasks(manifest: Manifest, shard: ShardInfo, sha256: bool) -> Iterator[tuple[int, int, str]]:
    yield 0, 0, "index"
    if shard.columns_bytes is not None:
        yield 0, 0, "columns"
    if shard.learned_tokens is not None:
        yield 0, 0, "learned"
    count = block_count(shard.bin_bytes, manifest.block_bytes)
    if shard.bin_blocks is None or sha256:
        yield 0, count, "sha256"
    if shard.bin_blocks is not None:
        for first in range(0, max(count, 1), BLOCKS_PER_TASK):  # an empty file is looked at, too
            yield first, min(first + BLOCKS_PER_TASK, count), "blocks"


def _check_index(folder: Path, manifest: Manifest, shard: ShardInfo) -> tuple[int, list[Fault]]:
    path = with_suffix(folder / shard.name, ".idx")
    try:
        data = read_regular(path)
    except OSError as error:
        return 0, [Fault(str(path), _cannot_read(error))]
    if len(data) != shard.idx_bytes:
        return len(data), [_wrong_size(path, len(data), shard.idx_bytes, None)]
    if hashlib.sha256(data).hexdigest() == shard.idx_sha256:
        return len(data), []
    at = _first_contradiction(data, np.dtype(manifest.dtype), shard.bin_bytes)
    return len(data), [Fault(str(path), "altered: its checksum is not the manifest's", None, at)]


def _check_columns(folder: Path, manifest: Manifest, shard: ShardInfo) -> tuple[int, list[Fault]]:
    path = with_suffix(folder / shard.name, COLUMNS)
    assert shard.columns_bytes is not None and shard.columns_sha256 is not None
    return shard.columns_bytes, _faults_of(
        path, lambda: ColumnFile(path, manifest.columns, shard.documents, shard.columns_sha256 or "", AGAIN)
    )


def _check_learned(folder: Path, shard: ShardInfo) -> tuple[int, list[Fault]]:
    path = with_suffix(folder / shard.name, LEARNED)
    learned, sha256 = shard.learned_tokens, shard.learned_sha256
    assert learned is not None and sha256 is not None
    return shard.sizes[LEARNED], _faults_of(path, lambda: check_file(path, shard.tokens, learned, sha256))


def _faults_of(path: Path, check: Callable[[], object]) -> list[Fault]:
    """What a check of a whole file finds."""
    try:
        check()
    except UserError as error:
        return [Fault(str(path), str(error).removeprefix(f"{path}: ").removesuffix(f"; {AGAIN}"))]
    return []


def _first_contradiction(data: bytes, dtype: np.dtype[Any], bin_bytes: int) -> int | None:
    """The byte at which an altered index of one sequence per document contradicts itself first; None where it does not."""
    sequences: int
    entries: int
    magic, version, code, sequences, entries = HEADER.unpack_from(data)
    known = magic == MAGIC and version == VERSION and code in TOKEN_TYPES and TOKEN_TYPES[code] == dtype
    if not known or HEADER.size + 12 * sequences + 8 * entries != len(data) or entries != sequences + 1:
        return 0
    at_pointers, at_documents = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences
    lengths = np.frombuffer(data, np.int32, sequences, HEADER.size)
    pointers = np.frombuffer(data, np.int64, sequences, at_pointers)
    documents = np.frombuffer(data, np.int64, entries, at_documents)
    bounds = np.concatenate([pointers, [bin_bytes]])  # step k: from pointer k to the next, or to the end of the file
    wrong = np.flatnonzero(np.diff(bounds) != lengths.astype(np.int64) * dtype.itemsize)
    if wrong.size:
        first = int(wrong[0])
        if sequences and pointers[0] != 0:
            return at_pointers
        # a wrong pointer spoils the step before it and its own, a wrong length only its own
        spoils_two = wrong.size > 1 and wrong[1] == first + 1
        return at_pointers + 8 * (first + 1) if spoils_two else HEADER.size + 4 * first
    wrong = np.flatnonzero(documents != np.arange(entries))
    return at_documents + 8 * int(wrong[0]) if wrong.size else None


def _check_whole(folder: Path, manifest: Manifest, shard: ShardInfo) -> tuple[int, list[Fault]]:
    """Size, SHA-256 and token ids of one .bin file, read once."""
    path = with_suffix(folder / shard.name, ".bin")
    total, faults = hashlib.sha256(), list[Fault]()
    buffer = bytearray(manifest.block_bytes)
    try:
        with _opened(path) as file:
            found = os.fstat(file).st_size
            if found != shard.bin_bytes:
                return 0, [] if shard.bin_blocks is not None else [_wrong_size(path, found, shard.bin_bytes, None)]
            for block in range(block_count(found, manifest.block_bytes)):
                data = _read_block(file, path, buffer, block, manifest.block_bytes, found)
                if isinstance(data, Fault):
                    return block * manifest.block_bytes, [data]
                total.update(data)
                fault = _beyond_vocabulary(path, manifest, block, data)
                if fault is not None and shard.bin_blocks is None:
                    faults.append(fault)
    except UserError as error:
        return 0, [Fault(str(path), str(error).removeprefix(f"{path}: "))] if shard.bin_blocks is None else []
    if total.hexdigest() != shard.bin_sha256:
        faults.append(Fault(str(path), f"altered: its SHA-256 is {total.hexdigest()}, expected {shard.bin_sha256}"))
    return found, faults


def _check_blocks(
    folder: Path, manifest: Manifest, shard: ShardInfo, first: int, last: int, found: dict[int, str]
) -> tuple[int, list[Fault]]:
    """Blocks [first, last) of one .bin file; `found` gets the checksums of those that differ."""
    assert shard.bin_blocks is not None
    path, size = with_suffix(folder / shard.name, ".bin"), manifest.block_bytes
    expected = expected_blocks(shard.bin_blocks)
    buffer, faults, total = bytearray(size), list[Fault](), 0
    try:
        with _opened(path) as file:
            length = os.fstat(file).st_size
            if first == 0 and length != shard.bin_bytes:
                faults.append(_wrong_size(path, length, shard.bin_bytes, size))
            for block in range(first, min(last, block_count(length, size))):
                data = _read_block(file, path, buffer, block, size, min(length, shard.bin_bytes))
                if isinstance(data, Fault):
                    faults.append(data)
                    continue
                total += len(data)
                whole = (block + 1) * size <= length or length >= shard.bin_bytes
                fault = _compare(path, block, size, data, expected[block]) if whole else None
                if fault is not None:
                    found[block] = checksum(data)
                fault = fault or _beyond_vocabulary(path, manifest, block, data)
                if fault is not None:
                    faults.append(fault)
    except UserError as error:
        if first == 0:
            faults.append(Fault(str(path), str(error).removeprefix(f"{path}: ")))
    return total, faults


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        file = open_regular(path)
    except OSError as error:
        raise UserError(f"{path}: {_cannot_read(error)}; {AGAIN}") from None
    try:
        yield file
    finally:
        os.close(file)


def _read_block(file: int, path: Path, buffer: bytearray, block: int, size: int, end: int) -> memoryview | Fault:
    """Bytes of one block of a file that should reach to `end`; a fault when the disk does not give them."""
    begin, wanted = block * size, min(size, end - block * size)
    view, filled = memoryview(buffer)[:wanted], 0
    while filled < wanted:
        try:
            read = os.preadv(file, [view[filled:]], begin + filled)
        except OSError as error:
            return Fault(str(path), _cannot_read(error), block, begin + filled, begin + wanted)
        if read == 0:
            # the end may lie far before this block
            size_now = os.fstat(file).st_size
            return Fault(str(path), f"ends at byte {size_now}, expected {end} bytes", block, begin, begin + wanted)
        filled += read
    return view


def _compare(path: Path, block: int, size: int, data: memoryview, expected: str) -> Fault | None:
    if checksum(data) == expected:
        return None
    return Fault(str(path), "altered: its checksum is not the manifest's", block, block * size, block * size + len(data))


def _beyond_vocabulary(path: Path, manifest: Manifest, block: int, data: memoryview) -> Fault | None:
    dtype, begin = np.dtype(manifest.dtype), block * manifest.block_bytes
    whole = len(data) // dtype.itemsize * dtype.itemsize
    tokens = np.frombuffer(data[:whole], f"u{dtype.itemsize}")  # negative ids read as large ones
    limit = manifest.tokenizer.vocab_size
    if not tokens.size or int(tokens.max()) < limit:
        return None
    at = int(np.argmax(tokens >= limit))
    byte, token = begin + at * dtype.itemsize, int(tokens[at : at + 1].view(dtype)[0])
    return Fault(str(path), f"token id {token}, the vocabulary has {limit}", block, byte, begin + len(data))


def _wrong_size(path: Path, found: int, expected: int, block_bytes: int | None) -> Fault:
    end, message = min(found, expected), f"{found} bytes, {FILE_NAME} announces {expected}"
    word = "truncated" if found < expected else "too long"
    if block_bytes is None or found > expected:
        return Fault(str(path), f"{word}: {message}", None, end)
    block = end // block_bytes
    return Fault(str(path), f"{word}: {message}", block, end, min((block + 1) * block_bytes, expected))


def _cannot_read(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"


def _name_origins(
    folders: Sequence[Path],
    manifests: Sequence[Manifest],
    found: dict[tuple[int, int], dict[int, str]],
    faults: list[Fault],
) -> list[Fault]:
    """Say of altered blocks which other block they are, and of a shard that is another's as a whole only that."""
    if not any(found.values()):
        return faults
    homes: dict[str, tuple[int, int, int]] = {}
    for source, manifest in enumerate(manifests):
        for number, shard in enumerate(manifest.shards):
            for block, one in enumerate(expected_blocks(shard.bin_blocks or "")):
                homes.setdefault(one, (source, number, block))

    def path(source: int, number: int) -> str:
        return str(with_suffix(folders[source] / manifests[source].shards[number].name, ".bin"))

    for (source, number), blocks in found.items():
        origins = {block: homes[one] for block, one in blocks.items() if one in homes}
        file = path(source, number)
        others = {origin[:2] for origin in origins.values()}
        shard = manifests[source].shards[number]
        moved = len(origins) == len(blocks) and all(block == origin[2] for block, origin in origins.items())
        if moved and len(others) == 1 and len(blocks) == len(expected_blocks(shard.bin_blocks or "")):
            kept = [one for one in faults if one.file != file]
            faults = [*kept, Fault(file, f"swapped: holds the tokens of {path(*others.pop())}", 0, 0, shard.bin_bytes)]
            continue
        for at, fault in enumerate(faults):
            if fault.file == file and fault.block in origins and fault.message.startswith("altered"):
                origin = origins[fault.block]
                message = f"swapped: holds block {origin[2]} of {path(*origin[:2])}"
                faults[at] = Fault(file, message, fault.block, fault.first_byte, fault.end_byte)
    return faults
