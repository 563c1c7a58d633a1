"""Pickles of checkpoints are read as data: whatever stands in them, nothing of it runs."""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_synth.core.names import plain_name
from megatron_synth.train.checkpoint.format import extra_state, index
from megatron_synth.train.checkpoint.format.index import Entry
from megatron_synth.train.checkpoint.format.pickles import Refused

ENTRIES = [
    Entry("embedding.weight", (4, 8), (0, 0), (3, 8), torch.float32, "__0_0.distcp", 0, 96),
    Entry("embedding.weight", (4, 8), (3, 0), (1, 8), torch.float32, "__1_0.distcp", 0, 32),
    Entry("norm.weight", (8,), (0,), (8,), torch.bfloat16, "__1_0.distcp", 32, 16),
    Entry("layer._extra_state/shard_0_1", None, (), (), None, "__1_0.distcp", 48, 10),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("index")
    index.write(folder, ENTRIES)
    return (folder / index.FILE).read_bytes()


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def _hostile(mark: str) -> dict[str, bytes]:
    """Pickles that would make the file `mark`, use up memory or the stack, or change classes."""
    command = f"touch {mark}"
    line = f"{command}'\n".encode()
    metadata = b"\x8c\x27torch.distributed.checkpoint.metadata\x8c\x08Metadata\x93"
    nested: Any = Call(os.system, command)
    for _ in range(40):
        nested = [nested, {"a": nested}]
    return {
        "a call": pickle.dumps(Call(os.system, command)),
        **{f"a call in protocol {n}": pickle.dumps(Call(os.system, command), n) for n in range(6)},
        "exec": pickle.dumps(Call(exec, f"open({mark!r}, 'w')")),
        "eval": pickle.dumps(Call(eval, f"open({mark!r}, 'w')")),
        "open": pickle.dumps(Call(open, mark, "w")),
        "an attribute": pickle.dumps(Call(getattr, "posix", "system")),
        "import": pickle.dumps(Call(__import__, "antigravity")),
        "subclasses": pickle.dumps(Call(type, "A", (dict,), {"__reduce__": 1})),
        "torch.load": pickle.dumps(Call(torch.load, mark)),
        "a file": pickle.dumps(Call(torch.serialization._legacy_load, mark)),
        "nested": pickle.dumps(nested),
        "in the index": pickle.dumps(Metadata({"a": Call(os.system, command)}, storage_data={})),  # type: ignore[dict-item]
        "beside the index": pickle.dumps(Metadata({}, planner_data=Call(os.system, command), storage_data={})),
        "GLOBAL": b"cos\nsystem\n(S'" + line + b"tR.",
        "INST": b"(S'" + line + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + line + b"o.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + bytes([len(command)]) + command.encode() + b"\x85R.",
        "STACK_GLOBAL of a path": b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93"
        + b"\x8c"
        + bytes([len(command)])
        + command.encode()
        + b"\x85R.",
        "STACK_GLOBAL of numbers": b"\x80\x04K\x01K\x02\x93.",
        "NEWOBJ_EX": b"\x80\x04" + metadata + b")}\x92.",
        "EXT1": b"\x80\x02\x82\x01.",
        "PERSID": b"Pposix.system\n.",
        "BINPERSID": b"\x80\x04K\x01Q.",
        "BUILD of a class": b"\x80\x04" + metadata + b"}\x8c\x08__init__\x8c\x01xsb.",
        "BUILD of a class, slots": b"\x80\x04" + metadata + b"N}\x8c\x08__init__\x8c\x01xs\x86b.",
        "memo of 2**31": b"\x80\x04Nr" + struct.pack("<I", 2**31 - 1) + b".",
        "memo of 10**18": b"Np" + b"9" * 18 + b"\n.",
        "a frame of 2**60": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
        "a text of 4 GiB": b"\x80\x04X" + struct.pack("<I", 2**32 - 1) + b"N.",
        "bytes of 2**62": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"N.",
        "a deep tuple": b"\x80\x04)" + b"\x85" * 300_000 + b".",
        "a deep tuple as a key": b"\x80\x04})" + b"\x85" * 300_000 + b"Ns.",
        "a deep list": b"\x80\x04" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
        "doubled tuples": b"\x80\x04)" + b"\x94h\x00\x86" * 1 + b"2\x86" * 60 + b".",
        "a list in itself": b"\x80\x04]\x94h\x00a.",
        "a number without end": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01.",
        "no end": b"\x80\x04N",
        "nothing": b"",
        "a text": b"hello",
    }


@pytest.mark.parametrize("name", _hostile(""))
def test_hostile_pickles_are_refused_and_do_nothing(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    modules = set(sys.modules)
    with pytest.raises(Refused):
        index.read(_hostile(str(mark))[name])
    with pytest.raises(Refused):
        extra_state._check_pickle(_hostile(str(mark))[name]) if name in _RUNS else index.read(b"")
    assert not mark.exists() and "antigravity" not in set(sys.modules) - modules
    assert type(Metadata.__init__).__name__ == "function"


_RUNS = ("a call", "exec", "eval", "nested", "torch.load", "in the index", "STACK_GLOBAL", "OBJ", "INST", "GLOBAL")


def test_an_index_is_what_was_written(good: bytes) -> None:
    found, plain = index.read(good), pickle.loads(good)
    assert found.state_dict_metadata == plain.state_dict_metadata
    assert found.storage_data == plain.storage_data
    norm = found.state_dict_metadata["norm.weight"]
    assert isinstance(norm, TensorStorageMetadata) and norm.properties.dtype is torch.bfloat16


MUTATIONS = 1500


def test_mutations_of_an_index_are_refused_or_read(good: bytes) -> None:
    """No other error, and no name that leads out of the folder."""
    generator = random.Random(0)
    names = [name for name in dir(pickle) if name.isupper() and isinstance(getattr(pickle, name), bytes)]
    refused = 0
    for _ in range(MUTATIONS):
        content = bytearray(good)
        for _ in range(generator.choice((1, 1, 1, 2, 8))):
            place = generator.randrange(len(content))
            kind = generator.randrange(5)
            if kind == 0:
                content[place] ^= 1 << generator.randrange(8)
            elif kind == 1:
                content[place : place + 1] = getattr(pickle, generator.choice(names))
            elif kind == 2:
                del content[place : place + generator.randrange(1, 40)]
            elif kind == 3:
                start = generator.randrange(len(content))
                content[place:place] = content[start : start + generator.randrange(1, 60)]
            else:
                content[place : place + 8] = generator.randbytes(8)
            if not content:
                break
        try:
            found = index.read(bytes(content))
        except Refused:
            refused += 1
            continue
        for place_of in found.storage_data.values():
            assert plain_name(place_of.relative_path, "a file")
    assert refused > MUTATIONS / 2


@pytest.mark.parametrize("name", ["/etc/passwd", "../other", "a/b", "..", ".", "", "a\x1b[2J", "a\nb", "b\\c", "x" * 256])
def test_files_of_an_index_are_in_its_folder(name: str, tmp_path: Path) -> None:
    index.write(tmp_path, [Entry("a", (2,), (0,), (2,), torch.float32, name, 0, 8)])
    with pytest.raises(Refused, match="the file of a piece"):
        index.read((tmp_path / index.FILE).read_bytes())


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([Entry("a", (4,), (0,), (2,), torch.float32, "f", 0, 8)], "hold 2 values, expected 4"),
        ([Entry("a", (4,), (2,), (3,), torch.float32, "f", 0, 8)], "is not within"),
        ([Entry("a", (2**40, 2**40), (0, 0), (1, 1), torch.float32, "f", 0, 8)], "values"),
        ([Entry("a", (2,), (0,), (2,), torch.float32, "f", -1, 8)], "0 or more"),
    ],
)
def test_pieces_add_up(entries: list[Entry], says: str, tmp_path: Path) -> None:
    index.write(tmp_path, entries)
    with pytest.raises(Refused, match=says):
        index.read((tmp_path / index.FILE).read_bytes())


def test_states_of_transformer_engine_hold_tensors_alone(tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    def packed(value: Any) -> torch.Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)

    extra_state.check_extra_state(torch.empty(0, dtype=torch.uint8), "layer")
    extra_state.check_extra_state(packed({"scale_fwd": torch.ones(3), "extra": {"n": 1}}), "layer")
    inner = io.BytesIO()
    torch.save(Call(os.system, f"touch {mark}"), inner)
    for hostile in (
        Call(os.system, f"touch {mark}"),
        {"scale_fwd": Call(torch.storage._load_from_bytes, inner.getvalue())},
        collections.OrderedDict(a=Call(eval, "1")),
    ):
        with pytest.raises(Refused, match="layer: "):
            extra_state.check_extra_state(packed(hostile), "layer")
    assert not mark.exists()
