"""megatron-core's reading of checkpoints, such that nothing in a file of them can run code.

megatron-core and torch.distributed.checkpoint unpickle the index, and objects that are stored beside tensors, without
restriction. `connect` puts readers into their place that do not; every read of a checkpoint goes through `load` or `described`.
"""

from __future__ import annotations

import importlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as strategies
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from megatron_synth.config.errors import UserError
from megatron_synth.train.checkpoint.format import index
from megatron_synth.train.checkpoint.format.extra_state import check_extra_state, first_line
from megatron_synth.train.checkpoint.format.pickles import Refused

_COMMON = "common.pt"
_EXTRA = "_extra_state"


class _Reader(FileSystemReader):
    """Reads the index as data."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        read = _index_of(Path(self.path))
        read.storage_meta = StorageMeta(load_id=self.load_id)
        return read


_last: tuple[Any, Metadata] | None = None
"""The index that was read last, with what tells whether its file is still the same: several calls ask for one in a row."""


def _index_of(checkpoint: Path) -> Metadata:
    global _last
    file = checkpoint / index.FILE
    state = file.stat()
    key = (file.absolute(), state.st_ino, state.st_size, state.st_mtime_ns)
    if _last is None or _last[0] != key:
        try:
            _last = key, index.read(file.read_bytes())
        except Refused as error:
            raise Refused(f"{index.FILE} is not the index of a checkpoint: {error}") from None
    return _last[1]


class _Planner(strategies.MCoreLoadPlanner):
    """Reads objects that are stored beside tensors as torch.load does with weights_only."""

    def create_local_plan(self) -> LoadPlan:
        listed = self.metadata.state_dict_metadata
        names = {tensor.key for tensor in self.shapes_validation_sharded_tensors} | {*self.allow_shape_mismatch_sharded_tensors}
        for name in sorted(names):
            if name in listed and not isinstance(listed[name], TensorStorageMetadata):
                raise Refused(f"{name} is stored as an object, expected a tensor")
        plan: LoadPlan = super().create_local_plan()
        return plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        if isinstance(self.state_dict[name], torch.Tensor) or hasattr(self.state_dict[name], "local_shards"):
            raise Refused(f"{name} is stored as an object, expected a tensor")
        try:
            loaded = torch.load(value, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise Refused(f"{name}: {first_line(error)}") from None
        if _EXTRA in name:
            for state in loaded if isinstance(loaded, list) else [loaded]:
                check_extra_state(state, name)
        super().load_bytes(read_item, _stored(loaded))


def _stored(value: Any) -> io.BytesIO:
    """What `torch.load` makes this of again; it holds nothing that was refused."""
    content = io.BytesIO()
    torch.save(value, content)
    content.seek(0)
    return content


class _Common(TorchCommonLoadStrategy):
    """Reads what is equal on all ranks, in common.pt."""

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        try:
            return torch.load(Path(checkpoint_dir) / _COMMON, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise Refused(f"{_COMMON} holds more than tensors and plain values: {first_line(error)}") from None


def _connect() -> None:
    """Let megatron-core read with the readers of this module."""
    module: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.torch")
    assert hasattr(module, "_get_filesystem_reader") and hasattr(module, "MCoreLoadPlanner")
    module._get_filesystem_reader = lambda folder, cache_metadata=False: _Reader(folder)
    module.MCoreLoadPlanner = _Planner


_connect()


def described(checkpoint: Path) -> dict[str, Any]:
    """megatron-core's descriptions of the tensors in a checkpoint, by name, without their data.

    Raises:
        UserError: the index is missing, damaged, or not one.
    """
    try:
        return dict(dist_checkpointing.load_tensors_metadata(str(checkpoint), strategies.TorchDistLoadShardedStrategy()))
    except Exception as error:  # a damaged file leads anywhere
        raise _refusal(checkpoint, "read", error) from error


def load(state: dict[str, Any], checkpoint: Path, what: str, *, whole: bool = True) -> dict[str, Any]:
    """What megatron-core's `dist_checkpointing.load` returns. Called by all ranks.

    Args:
        state: megatron-core's descriptions of what is wanted.
        checkpoint: its folder.
        what: what it is for, in a word or two, for the message.
        whole: whether each tensor is asked for exactly once, by all ranks together, which is then checked.

    Raises:
        UserError: a file is missing, damaged, or holds what does not belong there; or the shapes differ.
    """
    try:
        _index_of(checkpoint)  # torch would print its own account of an index that cannot be read
        with torch.no_grad():  # weights in FP8 are read through plain tensors, which would ask for gradients
            return dict(
                dist_checkpointing.load(
                    state,
                    str(checkpoint),
                    strategies.TorchDistLoadShardedStrategy(),
                    _Common(),
                    validate_access_integrity=whole,
                )
            )
    except (Exception, CheckpointException) as error:  # a damaged file leads anywhere
        raise _refusal(checkpoint, what, error) from error


def _refusal(checkpoint: Path, what: str, error: BaseException) -> UserError:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = str(error) if isinstance(error, (Refused, OSError)) or not str(error) else f"{type(error).__name__}: {error}"
    return UserError(
        f"{checkpoint}: cannot {what} from this checkpoint: {text or repr(error)}. If a file of it is damaged, which "
        "`megatron-synth checkpoint verify` tells, remove the folder; the newest sound one before it is used then"
    )
