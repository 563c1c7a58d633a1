"""The compiled functions of native.c: copying rows out of memory maps, and finding documents, without the interpreter.

They are compiled when the package is installed, which needs a C compiler and nothing else. Without one the same is done by
numpy, at about half the speed, and a read error of a memory map ends the process instead of becoming a message;
`missing` tells.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

Library = ctypes.CDLL
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

MAPS = threading.RLock()
"""Held while compiled code reads memory maps, and while one is closed."""


class BusError(Exception):
    """A read of a memory map failed: a disk error, or a file that was cut off while in use."""

    def __init__(self, address: int, row: int = 0):
        super().__init__(f"bus error at address {address:#x}")
        self.address, self.row = address, row


@lru_cache(maxsize=1)
def library() -> Library | None:
    """The compiled functions; None where they were not compiled, or are those of another version."""
    path = _compiled()
    return _loaded(path) if path is not None and _is_current(path) else None


def _compiled() -> Path | None:
    stem = Path(__file__).parent / "_native"
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = stem.with_name(stem.name + suffix)
        if path.is_file():
            return path
    return None


def _is_current(path: Path) -> bool:
    """Whether the functions are those of native.c as it is now; where that is not installed they came together."""
    source = Path(__file__).with_name("native.c")
    if not source.is_file():
        return True
    digest = getattr(ctypes.CDLL(str(path)), "source_digest", None)
    if digest is None:  # of a version that did not say
        return False
    digest.restype = ctypes.c_int64
    return bool(digest() == int(hashlib.sha256(source.read_bytes()).hexdigest()[:15], 16))


def missing() -> str | None:
    """Why numpy does the work, in words; None where the compiled functions do."""
    if library() is not None:
        return None
    slow = "rows are copied by numpy, at half the speed"
    if _compiled() is not None:
        return f"{slow}: the compiled functions are of another version; install megatron-synth again"
    return f"{slow}: there was no C compiler when megatron-synth was installed"


def _loaded(path: Path) -> Library:
    loaded = ctypes.CDLL(str(path))
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    for name, arguments in {
        "catch_bus_errors": [],
        "failed_address": [],
        "find_runs": [pointer, pointer],
        "copy_rows": [pointer, integer, integer, pointer, pointer],
        "read_map": [pointer, pointer, integer],
        "sample_documents": [pointer],
        "document_starts": [pointer],
        "first_documents": [pointer, pointer, integer, pointer],
        "lay_out": [pointer],
        "mask_out": [pointer, integer, pointer, integer, integer],
        "count_up": [pointer, integer, pointer],
    }.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, integer
    for name in ("lay_out", "mask_out", "count_up"):
        getattr(loaded, name).restype = None
    assert loaded.catch_bus_errors() == 0
    return loaded


def address_of(array: npt.NDArray[np.generic]) -> int:
    """Where the memory of a contiguous array begins."""
    try:
        return ctypes.addressof(_Byte.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # empty, or read-only; numpy's own way takes four times as long
        address: int = array.__array_interface__["data"][0]
        return address


_Byte = ctypes.c_char
_INT32_MAX = 2**31 - 1
"""Vocabularies are smaller (`model.vocab_size` has an upper limit)."""


class _Rows(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("maps", "codes", "lasts", "source_ids", "shards", "begins")),
        *((name, ctypes.c_int64) for name in ("rows", "length", "wide")),
        *((name, ctypes.c_void_p) for name in ("views", "runs", "learned")),
    ]


class RowCopier:
    """Copies rows of tokens from where their shards are mapped."""

    def __init__(
        self,
        compiled: Library,
        maps: Sequence[Int64],
        codes: Sequence[int],
        vocab_sizes: Sequence[int | None],
        source_ids: Int64,
        shards: Int64,
        begins: Int64,
        length: int,
        *,
        wide: bool,
        views: Sequence[int] | None = None,
        learned: Sequence[Int64 | None] | None = None,
    ):
        """What rows there are.

        Args:
            compiled: `library()`.
            maps: of each source, the address at which each of its shards lies in memory, 0 for one that does not; it may
                change, under `MAPS`.
            codes: of each source, the code of its token type in an index file.
            vocab_sizes: of each source, how many token ids there are; None: that is not known, and none is refused.
            source_ids: [N] source of each row.
            shards: [N] its shard, -1 for a row that lies in several.
            begins: [N] its first token there.
            length: tokens of a row.
            wide: the copies are int64, else int32.
            views: of each source, `Places.view`; None: all 0.
            learned: of each source, as `maps` for its files of learned tokens; None: all its tokens are. None: so are all.

        Raises:
            BusError: a view could not be read.
        """
        self._copy = compiled.copy_rows
        self._failed_address = compiled.failed_address
        addresses = np.array([address_of(one) for one in maps], dtype=np.int64)
        code_array = np.array(codes, dtype=np.int64)
        last_array = np.array([-1 if size is None else min(size - 1, _INT32_MAX) for size in vocab_sizes], dtype=np.int64)
        arrays = [
            addresses,
            code_array,
            last_array,
            *(np.ascontiguousarray(one, np.int64) for one in (source_ids, shards, begins)),
        ]
        self._keep = (arrays, tuple(maps))  # the structure holds addresses only
        of_sources = np.array([0] * len(maps) if views is None else views, np.int64)
        masks = list(learned or [None] * len(maps))
        mask_array = np.array([0 if one is None else address_of(one) for one in masks], np.int64)
        runs = np.zeros(len(source_ids), np.int64)
        self._rows = _Rows(*map(address_of, arrays), len(source_ids), length, int(wide))
        self._rows.views, self._rows.runs, self._rows.learned = map(address_of, (of_sources, runs, mask_array))
        arrays += [of_sources, runs, mask_array, *(one for one in masks if one is not None)]
        if of_sources.any():
            found = compiled.find_runs(ctypes.addressof(self._rows), address_of(runs))
            if found < 0:
                raise BusError(self._failed_address(), -1 - found)
        self._address = ctypes.addressof(self._rows)

    def copy(self, begin: int, end: int, out: int, learned: int | None = None) -> int:
        """Copy rows [begin, end) to address `out` on, and to `learned` on whether their labels are, a byte each.

        Returns `end`, or the first row that is not copied: it lies in no map, or holds an id that its source's vocabulary does
        not have.

        Raises:
            BusError: a read failed.
        """
        with MAPS:
            done: int = self._copy(self._address, begin, end, out, learned)
        if done < 0:
            raise BusError(self._failed_address(), -1 - done)
        return done


def read_map(compiled: Library, mapped: npt.NDArray[np.generic], offset: int, out: npt.NDArray[np.generic]) -> None:
    """Fill `out` with the bytes of `mapped` from byte `offset` on. BusError when they cannot be read."""
    assert out.flags.c_contiguous and 0 <= offset <= mapped.nbytes - out.nbytes
    if not compiled.read_map(address_of(mapped) + offset, address_of(out), out.nbytes):
        raise BusError(compiled.failed_address())


class Index(ctypes.Structure):
    """Where the documents of a shard begin, as compiled code reads it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("pointers", "documents")),
        *((name, ctypes.c_int64) for name in ("num_pointers", "entries", "num_tokens", "token_bytes")),
        ("sample", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("samples", "step")),
    ]


def sample_documents(compiled: Library, index: int) -> None:
    """Fill the sample of the `Index` at this address. BusError when the file cannot be read."""
    if not compiled.sample_documents(index):
        raise BusError(compiled.failed_address())


def first_documents(compiled: Library, index: int, positions: Int64) -> Int64:
    """Of each position [N] the first document that starts there or later, of the `Index` at this address: [N].

    Raises:
        BusError: the index could not be read.
    """
    positions, found = np.ascontiguousarray(positions, np.int64), np.empty(len(positions), np.int64)
    with MAPS:
        sound = compiled.first_documents(index, address_of(positions), len(positions), address_of(found))
    if not sound:
        raise BusError(compiled.failed_address())
    return found


class _Search(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("indexes", "source_ids", "shards", "begins", "ends")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("counts", "offsets")),
        *((name, ctypes.c_int64) for name in ("capacity", "row", "used", "full")),
    ]


def document_starts(
    compiled: Library,
    indexes: Sequence[Int64],
    source_ids: Int64,
    shards: Int64,
    begins: Int64,
    ends: Int64,
    unresolved: Callable[[int], Int64 | None] | None = None,
) -> tuple[Int64, Int64]:
    """Where documents start in each of N rows.

    Args:
        compiled: `library()`.
        indexes: of each source, the address of each shard's `Index`, 0 for one that is not open.
        source_ids: [N] source of each row.
        shards: [N] its shard, -1 for a row that lies in several.
        begins: [N] first token of each row in its shard.
        ends: [N] token after the last.
        unresolved: called with a row whose shard has no open index, or that lies in several: gives its offsets, or None once
            the index is open. Not needed where there is no such row.

    Returns:
        All offsets from each row's begin, row by row, ascending in each, int64; and how many each has, int64 [N].

    Raises:
        BusError: an index could not be read.
    """
    counts = np.empty(len(begins), np.int64)
    offsets = np.empty(4 * len(begins) + 64, np.int64)
    tables = np.array([address_of(one) for one in indexes], np.int64)
    own = [tables, *(np.ascontiguousarray(one, np.int64) for one in (source_ids, shards, begins, ends))]
    search = _Search(*map(address_of, own), len(begins), address_of(counts), address_of(offsets))
    search.capacity = len(offsets)
    while True:
        search.full = 0
        with MAPS:
            sound = compiled.document_starts(ctypes.addressof(search))
        row, used = search.row, search.used
        if not sound:
            raise BusError(compiled.failed_address(), row)
        if row == len(begins):
            return offsets[:used], counts
        found = None
        if not search.full:
            assert unresolved is not None
            found = unresolved(row)
        needed = 2 * len(offsets) if search.full else used + (0 if found is None else len(found))
        if needed > len(offsets):
            offsets = np.concatenate([offsets, np.empty(needed, np.int64)])
            search.offsets, search.capacity = address_of(offsets), len(offsets)
        if found is not None:
            offsets[used : used + len(found)] = found
            counts[row] = len(found)
            search.row, search.used = row + 1, used + len(found)


class _Layout(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("counts", "offsets")),
        *((name, ctypes.c_int64) for name in ("batches", "rows", "length")),
        *((name, ctypes.c_void_p) for name in ("edges", "edges_split", "ends", "ends_split")),
    ]


def lay_out(
    compiled: Library, offsets: Int64, counts: Int64, sequence_length: int, rows: int
) -> tuple[Int32, Int64, Int64, Int64]:
    """The arrays of `boundaries.BoundaryTable`: cu_seqlens and where each batch's begin, ends and where each batch's begin."""
    batches = len(counts) // rows
    edges = np.empty(len(offsets) + len(counts) + batches, np.int32)
    ends = np.empty(len(offsets), np.int64)
    splits = np.empty((2, batches + 1), np.int64)
    layout = _Layout(address_of(counts), address_of(offsets), batches, rows, sequence_length)
    layout.edges, layout.edges_split = address_of(edges), address_of(splits)
    layout.ends, layout.ends_split = address_of(ends), address_of(splits[1])
    compiled.lay_out(ctypes.addressof(layout))
    return edges, splits[0], ends, splits[1]


def loss_mask(
    shape: tuple[int, int], places: Int64, places_at: int | None = None, counting: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.bool_]:
    """`shape` True, but False at `places` of the flat array.

    places_at: their address, where it is known. counting: [shape], contiguous, in place of all True; it is changed.
    """
    compiled = library()
    if compiled is None:
        mask = np.ones(shape, dtype=np.bool_) if counting is None else counting.reshape(shape)
        mask.reshape(-1)[places] = False
        return mask
    mask = np.empty(shape, dtype=np.bool_) if counting is None else counting.reshape(shape)
    at = address_of(places) if places_at is None else places_at
    compiled.mask_out(address_of(mask), shape[0] * shape[1], at, len(places), int(counting is not None))
    return mask


def counting(edges: Int32, shape: tuple[int, int]) -> Int32:
    """`shape`, which from place to place of the flat array counts from 0 within each stretch [edges[i], edges[i + 1])."""
    compiled = library()
    if compiled is None:
        lengths = np.diff(edges)
        return (np.arange(edges[-1], dtype=np.int32) - np.repeat(edges[:-1], lengths)).reshape(shape)
    out = np.empty(shape, np.int32)
    compiled.count_up(address_of(edges), len(edges) - 1, address_of(out))
    return out
