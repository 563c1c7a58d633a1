"""Tensors of a checkpoint read box by box: as much of one as is asked for, whatever layout wrote it, by one process alone.

megatron-core loads a checkpoint into a model that is there. Merging and averages want a few megabytes at a time: each piece of
a tensor is an archive of torch.save within a file, whose values lie in one run of bytes. What describes them is read as data
(`weights_only`), and checked against the index.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import fill
from megatron_synth.train.checkpoint.format import index
from megatron_synth.train.checkpoint.format.extra_state import first_line
from megatron_synth.train.checkpoint.format.pickles import Refused

Shape = tuple[int, ...]


class _Piece(NamedTuple):
    """A box of a tensor: its place in the whole, and where its archive lies."""

    offset: Shape
    shape: Shape
    file: str
    begin: int
    bytes: int


class Stored:
    """The tensors of one checkpoint. Use as a context: files stay open."""

    def __init__(self, checkpoint: Path):
        """Read the index.

        Raises:
            UserError: it is missing, damaged, or not one.
        """
        self.checkpoint = checkpoint
        self._files: dict[str, int] = {}
        self._values: dict[tuple[str, int], int] = {}
        """Where the values of an archive begin in its file."""
        try:
            read = index.read((checkpoint / index.FILE).read_bytes())
            tensors = {k: v for k, v in read.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
            self.shapes: dict[str, Shape] = {key: tuple(entry.size) for key, entry in tensors.items()}
            """Shape of each tensor by name."""
            self.dtypes: dict[str, torch.dtype] = {key: entry.properties.dtype for key, entry in tensors.items()}
            self._pieces: dict[str, list[_Piece]] = {key: [] for key in tensors}
            shapes = {(key, tuple(c.offsets)): tuple(c.sizes) for key, entry in tensors.items() for c in entry.chunks}
            for where, place in (read.storage_data or {}).items():
                if where.fqn not in tensors:
                    continue
                offset = tuple(where.offset or (0,) * len(self.shapes[where.fqn]))
                shape = shapes.pop((where.fqn, offset), None)
                if shape is None:
                    raise Refused(f"{where.fqn} has no piece at {list(offset)}")
                piece = _Piece(offset, shape, place.relative_path, place.offset, place.length)
                self._pieces[where.fqn].append(piece)
            if shapes:
                raise Refused(f"a piece of {next(iter(shapes))[0]} lies nowhere")
        except (OSError, Refused) as error:
            raise self._refusal(error) from None

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """A box of a tensor, [*shape], on the CPU and as it was stored.

        Raises:
            UserError: a file is missing, damaged, or holds what does not belong there; or pieces do not fill the box.
        """
        out = torch.empty(tuple(shape), dtype=self.dtypes[key])
        filled = 0
        try:
            for piece in self._pieces[key]:
                low = [max(a, b) for a, b in zip(offset, piece.offset, strict=True)]
                high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, piece.offset, piece.shape, strict=True)]
                if any(a >= b for a, b in zip(low, high, strict=True)):
                    continue
                size = [b - a for a, b in zip(low, high, strict=True)]
                inner = [a - b for a, b in zip(low, piece.offset, strict=True)]
                target = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
                out[target] = self._box(key, piece, inner, size)
                filled += math.prod(size)
        except (OSError, Refused, RuntimeError, pickle.UnpicklingError) as error:
            raise self._refusal(error) from None
        if filled != out.numel():
            raise self._refusal(Refused(f"{key}: pieces fill {filled} of the {out.numel()} values at {list(offset)}"))
        return out

    def _box(self, key: str, piece: _Piece, inner: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """A box within a piece: the values from its first to its last are read in one go."""
        dtype = self.dtypes[key]
        strides = [math.prod(piece.shape[axis + 1 :]) for axis in range(len(piece.shape))]
        first = sum(at * stride for at, stride in zip(inner, strides, strict=True))
        count = 1 + sum((length - 1) * stride for length, stride in zip(size, strides, strict=True))
        content = bytearray(count * dtype.itemsize)
        self._fill(piece, self._begin(key, piece) + first * dtype.itemsize, content)
        return torch.frombuffer(content, dtype=dtype).as_strided(list(size), strides)

    def _begin(self, key: str, piece: _Piece) -> int:
        """Where the values of a piece begin in its file, its archive checked."""
        place = piece.file, piece.begin
        if place not in self._values:
            descriptor = self._open(piece.file)
            tensor = torch.load(_file(descriptor, piece), map_location="meta", weights_only=True)
            size, dtype = math.prod(piece.shape), self.dtypes[key]
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tensor.numel() != size:
                raise Refused(f"{key}: expected {size} values of {dtype} at {list(piece.offset)}")
            if not tensor.is_contiguous() or tensor.storage_offset() != 0:
                raise Refused(f"{key}: expected values that lie together at {list(piece.offset)}")
            archive: Any = torch._C.PyTorchFileReader(_file(descriptor, piece))
            if archive.has_record("byteorder") and archive.get_record("byteorder") != b"little":
                raise Refused(f"{key}: expected values with the lowest byte first")
            begin = int(archive.get_record_offset("data/0"))
            if begin + size * dtype.itemsize > piece.bytes:
                raise Refused(f"{key}: the values at {list(piece.offset)} end beyond their archive")
            self._values[place] = piece.begin + begin
        return self._values[place]

    def _open(self, name: str) -> int:
        if name not in self._files:
            self._files[name] = os.open(self.checkpoint / name, os.O_RDONLY | os.O_NOFOLLOW)
        return self._files[name]

    def _fill(self, piece: _Piece, begin: int, out: bytearray) -> None:
        if fill(self._open(piece.file), out, begin) < len(out):
            raise Refused(f"{piece.file} ends before byte {begin + len(out)}")

    def _refusal(self, error: BaseException) -> UserError:
        text = first_line(error) if isinstance(error, pickle.UnpicklingError) else str(error)
        return UserError(f"{self.checkpoint}: cannot be read: {text}; restore it from a copy, or take another step of the run")


def _file(descriptor: int, piece: _Piece) -> io.BufferedReader:
    """The archive of a piece, as a file of its own."""
    return io.BufferedReader(_View(descriptor, piece.begin, piece.bytes))


class _View(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, descriptor: int, begin: int, size: int):
        self._descriptor, self._begin, self._size, self._at = descriptor, begin, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._at))
        got = os.preadv(self._descriptor, [view[:count]], self._begin + self._at) if count else 0
        self._at += got
        return got
