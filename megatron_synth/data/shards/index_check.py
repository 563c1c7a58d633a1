"""Whether an index says what Megatron's reader and ours take it to say: checked whole, before anything of its shard is used.

Megatron reads each sequence where its pointer says, so that an index may leave out parts of the .bin file, or put them in
another order. Our stream is the .bin file itself: such an index is refused, and so is one whose documents do not follow each
other. What compiled code is handed after this check lies within the files.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import open_regular
from megatron_synth.data.shards.open_files import read_exactly

ENTRIES = 1 << 18
"""Sequences that are looked at together: 5 MB of the file."""


def check_index(
    path: Path, at: int, sequences: int, document_entries: int, bin_bytes: int, token_bytes: int, *, one_each: bool
) -> None:
    """Read the arrays of an index once, from front to back.

    Args:
        path: the .idx file.
        at: where its arrays begin.
        sequences: in them (N).
        document_entries: in them, one more than documents.
        bin_bytes: size of the .bin file.
        token_bytes: bytes of a token.
        one_each: each document is one sequence, as `prepare` writes them; a changed bit anywhere is then a contradiction.

    Raises:
        UserError: names the file and the byte of the first contradiction.
    """
    at_pointers, at_documents = at + 4 * sequences, at + 12 * sequences
    try:
        file = open_regular(path)
        try:
            end = 0
            for first in range(0, sequences, ENTRIES):
                count = min(ENTRIES, sequences - first)
                lengths = _read(file, path, np.int32, at + 4 * first, count)
                pointers = _read(file, path, np.int64, at_pointers + 8 * first, count)
                end = _check_sequences(path, at + 4 * first, at_pointers + 8 * first, lengths, pointers, end, token_bytes)
            if end != bin_bytes:
                raise _wrong(path, at, f"its sequences are {end} bytes, the .bin file has {bin_bytes}")
            if (one_each and document_entries != sequences + 1) or (sequences and not document_entries):
                raise _wrong(path, at - 8, f"{document_entries} documents + 1 for {sequences} sequences")
            last = 0
            for first in range(0, document_entries, ENTRIES):
                count = min(ENTRIES, document_entries - first)
                place = at_documents + 8 * first
                documents = _read(file, path, np.int64, place, count)
                if one_each:
                    _refuse_first(
                        path, place, documents != np.arange(first, first + count), documents, "one sequence for each document"
                    )
                else:
                    before = np.append(last if first else 0, documents[:-1])
                    what = f"at most {sequences}, the number of sequences"
                    _refuse_first(path, place, documents > sequences, documents, what)
                    _refuse_first(path, place, documents < before, documents, "at least the number before it")
                if first == 0 and documents[0] != 0:
                    raise _wrong(path, place, f"the first document begins with sequence {documents[0]}, expected 0")
                last = int(documents[-1])
            if last != sequences:
                place = at_documents + 8 * (document_entries - 1)
                raise _wrong(path, place, f"the last document ends before sequence {last}, expected {sequences}")
        finally:
            os.close(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; prepare the source again, or copy it again") from None


def _check_sequences(
    path: Path, at_lengths: int, at_pointers: int, lengths: np.ndarray, pointers: np.ndarray, begin: int, token_bytes: int
) -> int:
    """Hold sequences against the place `begin` at which the first of them must begin; where the last one ends."""
    _refuse_first(path, at_lengths, lengths < 0, lengths, "no negative length", size=4)
    # fewer than 2**31 tokens of at most 8 bytes, at most ENTRIES times: no overflow
    ends = np.cumsum(lengths.astype(np.int64) * token_bytes) + begin
    due = np.append(begin, ends[:-1])
    what = "the end of the sequence before: an index that leaves out or reorders parts of the .bin file is not read"
    _refuse_first(path, at_pointers, pointers != due, pointers, what)
    return int(ends[-1])


def _refuse_first(path: Path, place: int, wrong: np.ndarray, values: np.ndarray, expected: str, *, size: int = 8) -> None:
    if wrong.any():
        number = int(np.argmax(wrong))
        raise _wrong(path, place + size * number, f"found {values[number]}, expected {expected}")


def _read(file: int, path: Path, dtype: Any, offset: int, count: int) -> np.ndarray:
    out = np.empty(count, dtype)
    read_exactly(file, path, out.data, offset, "copy it again")
    return out


def _wrong(path: Path, place: int, what: str) -> UserError:
    return UserError(
        f"{path}, byte {place}: {what}; prepare the source again, or write the pair with each sequence after the one before"
    )
