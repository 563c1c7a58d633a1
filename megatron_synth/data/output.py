"""The output folder of a preparation: written beside its place under a hidden name, put there when it is whole."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.data.indexed import ShardWriter
from megatron_synth.data.manifest import Counts, ShardInfo
from megatron_synth.data.tokenise import Tokens


class SourceWriter:
    """Writes the shards of one source."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], shard_tokens: int):
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.shards: list[ShardInfo] = []
        self.text_bytes = 0
        self._current: ShardWriter | None = None
        folder.mkdir()

    def add(self, part: Tokens) -> None:
        """Append documents, opening a new shard whenever the next document does not fit."""
        self.text_bytes += part.text_bytes
        ends = np.cumsum(part.lengths, dtype=np.int64)
        first, begin = 0, 0
        while first < ends.size:
            if self._current is None:
                self._current = ShardWriter(self.folder / f"shard-{len(self.shards):05d}", self.dtype)
            room = self.shard_tokens - self._current.tokens
            last = int(np.searchsorted(ends, begin + room, side="right"))
            if last == first and self._current.documents == 0:
                last += 1  # longer than a shard
            if last > first:
                end = int(ends[last - 1])
                self._current.add(part.tokens[begin:end], part.lengths[first:last])
                first, begin = last, end
            if first < ends.size:
                self._finish_shard()

    def finish(self) -> Counts:
        """Close the last shard; what was written."""
        if self._current is not None:
            self._finish_shard()
        documents, tokens = sum(one.documents for one in self.shards), sum(one.tokens for one in self.shards)
        return Counts(documents=documents, tokens=tokens, text_bytes=self.text_bytes)

    def abandon(self) -> None:
        """Close open files."""
        if self._current is not None:
            self._current.abandon()

    def _finish_shard(self) -> None:
        assert self._current is not None
        written = self._current.finish()
        self.shards.append(ShardInfo(name=self._current.prefix.name, **vars(written)))
        self._current = None


@contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output`, gone on failure. What killed runs of this machine left is removed first."""
    stem = f".{output.name}.partial-{socket.gethostname()}-"
    for old in output.parent.glob(f"{stem}*"):
        process = old.name.removeprefix(stem)
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(old)
    folder = output.parent / f"{stem}{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # renamed by now when all went well


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def replace(folder: Path, output: Path) -> None:
    """Put the finished `folder` in the place of `output`, old content included."""
    old = folder.with_name(folder.name + "-old")
    if output.exists():
        os.rename(output, old)
    os.rename(folder, output)
    shutil.rmtree(old, ignore_errors=True)
