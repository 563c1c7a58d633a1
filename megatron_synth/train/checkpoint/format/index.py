"""`.metadata`, the index of a checkpoint: which piece of which tensor lies where, as torch.distributed.checkpoint writes it.

It is a pickle. Here it is read without running anything of it (pickles.py), and every field is checked: names of files are
plain, numbers are in range, the pieces of a tensor add up to the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_synth.core.names import plain_name
from megatron_synth.train.checkpoint.format.pickles import Inert, Refused, read_inert

FILE = ".metadata"
_DCP = "torch.distributed.checkpoint."
_CLASSES = {
    "torch.Size",
    "torch.serialization._get_layout",
    "builtins.getattr",  # how an enumeration was pickled by Python 3.11.0 to 3.11.3
    "io.BytesIO",
    "_io.BytesIO",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
}
_LARGEST = 1 << 62


@dataclass(frozen=True)
class Entry:
    """Where a piece of a tensor, or an object, lies. size is None for an object."""

    key: str
    size: tuple[int, ...] | None
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    file: str
    begin: int
    bytes: int


def write(folder: Path, entries: Sequence[Entry]) -> None:
    """Write the index of the files in `folder`."""
    described: dict[str, Any] = {}
    results = []
    for entry in entries:
        if entry.size is None:
            index = MetadataIndex(entry.key)
            described[entry.key] = BytesStorageMetadata()
        else:
            offset, shape = torch.Size(entry.offset), torch.Size(entry.shape)
            index = MetadataIndex(entry.key, offset)
            if entry.key not in described:
                assert entry.dtype is not None
                properties = TensorProperties(dtype=entry.dtype)
                described[entry.key] = TensorStorageMetadata(properties, torch.Size(entry.size), [])
            described[entry.key].chunks.append(ChunkStorageMetadata(offset, shape))
        place = _StorageInfo(entry.file, entry.begin, entry.bytes)
        results.append(WriteResult(index=index, size_in_bytes=entry.bytes, storage_data=place))
    FileSystemWriter(folder).finish(Metadata(described, planner_data={}), [results])


def read(content: bytes) -> Metadata:
    """The index, from the content of the file. What else torch keeps there is left out.

    Raises:
        Refused: it is not an index, or would lead out of the checkpoint's folder. The message says what is wrong.
    """
    root = read_inert(content, _allowed)
    fields = _fields(root, "metadata.Metadata")
    try:
        described = {_text(key): _storage(value) for key, value in _dict(fields.get("state_dict_metadata")).items()}
        places = {_index(key): _place(value) for key, value in _dict(fields.get("storage_data")).items()}
    except ValueError as error:
        raise Refused(str(error)) from None
    for key, entry in described.items():
        if isinstance(entry, TensorStorageMetadata):
            held = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if held != math.prod(entry.size):
                raise Refused(f"the pieces of {key!r:.120} hold {held} values, expected {math.prod(entry.size)}")
    return Metadata(described, planner_data={}, storage_data=places)


def _allowed(module: str, name: str) -> bool:
    if (f"{module}.").startswith(_DCP) or f"{module}.{name}" in _CLASSES:
        return True
    return module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)


def _fields(value: Any, name: str) -> dict[str, Any]:
    """The attributes of an object of a class of torch.distributed.checkpoint."""
    if not isinstance(value, Inert) or value.name != _DCP + name or type(value.state) not in (dict, type(None)):
        raise Refused(f"expected a {name.rpartition('.')[2]}, found {_shown(value)}")
    return value.state or {}


def _storage(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(value, Inert) and value.name == f"{_DCP}metadata.BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(value, "metadata.TensorStorageMetadata")
    size = _size(fields.get("size"))
    chunks = fields.get("chunks")
    if type(chunks) is not list:
        raise Refused(f"expected a list of pieces, found {_shown(chunks)}")
    return TensorStorageMetadata(
        TensorProperties(_dtype(fields.get("properties"))), size, [_chunk(one, size) for one in chunks]
    )


def _chunk(value: Any, whole: torch.Size) -> ChunkStorageMetadata:
    fields = _fields(value, "metadata.ChunkStorageMetadata")
    offsets, sizes = _size(fields.get("offsets")), _size(fields.get("sizes"))
    inside = len(offsets) == len(sizes) == len(whole) and all(
        offset + size <= limit for offset, size, limit in zip(offsets, sizes, whole, strict=True)
    )
    if not inside:
        raise Refused(f"a piece at {list(offsets)} of {list(sizes)} is not within {list(whole)}")
    return ChunkStorageMetadata(offsets, sizes)


def _dtype(value: Any) -> torch.dtype:
    """Of the properties of a tensor; the others are those of every tensor in a file."""
    state = value.state if isinstance(value, Inert) else None
    first = state[0] if type(state) is tuple and state else state.get("dtype") if type(state) is dict else None
    # a global that is no object: the stand-in's class itself
    name = first.name if isinstance(first, type) and issubclass(first, Inert) else ""
    dtype = getattr(torch, name.removeprefix("torch."), None) if name.startswith("torch.") else None
    if not isinstance(dtype, torch.dtype):
        raise Refused(f"expected the type of a tensor, found {_shown(first)}")
    return dtype


def _index(value: Any) -> MetadataIndex:
    fields = _fields(value, "metadata.MetadataIndex")
    offset, hint = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _text(fields.get("fqn")), None if offset is None else _size(offset), None if hint is None else _number(hint)
    )


def _place(value: Any) -> _StorageInfo:
    fields = _fields(value, "filesystem._StorageInfo")
    if fields.get("transform_descriptors"):
        raise Refused(f"expected pieces as they are, found {_shown(fields['transform_descriptors'])}")
    name = plain_name(fields.get("relative_path"), "the file of a piece")
    return _StorageInfo(name, _number(fields.get("offset")), _number(fields.get("length")))


def _size(value: Any) -> torch.Size:
    sizes: Any = value.args[0] if isinstance(value, Inert) and value.name == "torch.Size" and len(value.args) == 1 else None
    if type(sizes) not in (tuple, list):
        raise Refused(f"expected the shape of a tensor, found {_shown(value)}")
    shape = torch.Size([_number(one) for one in sizes])
    if math.prod(shape) > _LARGEST:
        raise Refused(f"a tensor of {list(shape)} values")
    return shape


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise Refused(f"expected a whole number of 0 or more, found {_shown(value)}")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise Refused(f"expected a name, found {_shown(value)}")
    return value


def _dict(value: Any) -> dict[Any, Any]:
    if type(value) is not dict:
        raise Refused(f"expected a table, found {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """What it is, without going into it: it may be nested without end."""
    if isinstance(value, (int, str)):
        return f"{value!r:.120}"
    return value.name if isinstance(value, Inert) else type(value).__name__
