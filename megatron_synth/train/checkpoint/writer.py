"""Saving while training goes on: a copy to the host at the end of the step, files written by a thread.

    rank r      copy its pieces into a reused host buffer              <- all that training waits for
    rank r      thread: write one file, flush it to the disk, tell rank 0 what is in it
    rank 0      thread: when all have told, write the index and the manifest, rename the folder, point `latest` to it

A save needs no collective: ranks leave each other messages (mailbox.py). If a rank cannot write, rank 0 hears why, removes the
folder, and what was there before stays. The next save begins when this one has ended.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from torch.utils.serialization import config as serialization

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_atomic
from megatron_synth.core.log import human, say
from megatron_synth.train.checkpoint import files
from megatron_synth.train.checkpoint.files import FileInfo
from megatron_synth.train.checkpoint.format import index
from megatron_synth.train.checkpoint.format.index import Entry
from megatron_synth.train.checkpoint.mailbox import Mailbox
from megatron_synth.train.checkpoint.sharding import LocalState, Piece

_ALIGNMENT = 64


class SaveFailed(UserError):
    """A checkpoint could not be written; those before it are untouched."""


@dataclass(frozen=True)
class SaveRequest:
    """What a save is, beside its tensors.

    trainer: content of trainer.json.
    committed, failed: called on rank 0, in the writing thread, when the checkpoint is whole, or with the reason why it could
        not be written. They may print: an OSError of theirs is raised by the next `begin` or `outcome`.
    keep_last, keep_every, keep_steps: which checkpoints to keep then.
    """

    step: int
    trainer: dict[str, Any]
    committed: Callable[[Path], None]
    failed: Callable[[str], None]
    keep_last: int | None = None
    keep_every: int | None = None
    keep_steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Report:
    """What a rank tells rank 0."""

    entries: list[Entry]
    files: dict[str, FileInfo]
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        entries = [{**vars(entry), "dtype": entry.dtype and str(entry.dtype).removeprefix("torch.")} for entry in self.entries]
        return {"entries": entries, "files": {name: vars(info) for name, info in self.files.items()}, "error": self.error}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> _Report:
        """From what `to_json` gave."""
        entries = [
            Entry(
                one["key"],
                None if one["size"] is None else tuple(one["size"]),
                tuple(one["offset"]),
                tuple(one["shape"]),
                None if one["dtype"] is None else getattr(torch, one["dtype"]),
                one["file"],
                one["begin"],
                one["bytes"],
            )
            for one in value["entries"]
        ]
        return cls(entries, {name: FileInfo(**info) for name, info in value["files"].items()}, value["error"])


PINNED_AT_ONCE = 512 * 2**20
"""Bytes of the host that are pinned by one call; no copy crosses from one such part to the next."""


class HostBuffer:
    """Memory of the host that is asked for once: the first touch of a page costs more than ten copies into it.

    Pinned where there is a GPU, so that copies run beside its work. torch's allocator of pinned memory rounds up to a power
    of two, 70 GB to 137, so the pages of a mapping are pinned instead, a bounded part at a time.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._memory: memoryview | None = None
        self._owner: mmap.mmap | None = None
        self._pinned: list[int] = []

    @property
    def bytes(self) -> int:
        """How much it holds."""
        return 0 if self._memory is None else self._memory.nbytes

    def reserve(self, size: int) -> None:
        """Hold at least `size` bytes; what was in it is lost.

        Raises:
            OSError: the host does not have them, or does not pin them.
        """
        if size <= self.bytes:
            return
        self._release()  # before the next: both at once may be too much
        self._owner = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._owner.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memoryview(self._owner)
        if self._on_gpu:
            try:
                self._pin(size)
            except OSError:
                self._release()
                raise

    def _pin(self, size: int) -> None:
        address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
        for begin in range(0, size, PINNED_AT_ONCE):
            part = min(PINNED_AT_ONCE, size - begin)
            error = torch.cuda.cudart().cudaHostRegister(address + begin, part, 0)
            if int(error):
                done = f"{human(begin)} of {human(size)} bytes of the host's memory could be pinned"
                raise OSError(f"{done} (CUDA error {int(error)}); see `ulimit -l` and the memory limit of the job")
            self._pinned.append(address + begin)

    def _release(self) -> None:
        for address in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._pinned.clear()
        self._memory = self._owner = None

    def fill(self, begin: int, data: torch.Tensor) -> None:
        """Copy a tensor to `begin`, in row-major order. On a GPU the copy is only begun, on the current stream."""
        flat, done = data.detach().reshape(-1), 0
        step = data.element_size()
        while done < flat.numel():
            place = begin + done * step
            count = flat.numel() - done
            if self._on_gpu:
                count = min(count, (PINNED_AT_ONCE - place % PINNED_AT_ONCE) // step)
            self.tensor(place, count, data.dtype).copy_(flat[done : done + count], non_blocking=True)
            done += count

    def tensor(self, begin: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A part of it as a flat tensor with a storage of its own size."""
        assert self._memory is not None
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=begin)


class CheckpointWriter:
    """Writes checkpoints below `root`, one at a time. All ranks make one, and call its methods alike.

    Args:
        root: the checkpoints folder, on a file system that all ranks share.
        attempt: a word that no other start of the run has used, equal on all ranks.
        device: where the tensors are.
    """

    def __init__(self, root: Path, attempt: str, device: torch.device):
        self._root, self._attempt, self._device = root, attempt, device
        self._rank, self._world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._mailbox = Mailbox(attempt)
        self._buffer = HostBuffer(device)
        self._thread: threading.Thread | None = None
        self._saves = 0
        self._untold: OSError | None = None
        """Why a save could not be told of on the console."""
        self.blocked_s = 0.0
        """How long the last `begin` took: the wait for the save before, and the copy."""

    @property
    def busy(self) -> bool:
        """Whether this rank's part of a save is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, state: Callable[[], LocalState], request: SaveRequest) -> None:
        """Copy `state` to the host and let a thread write it. Waits first for the save before this one.

        Nothing is raised for a disk that cannot be written to, nor for a host without room for the copy: rank 0 calls
        `request.failed`.
        """
        began = time.perf_counter()
        self.join()
        self._raise_untold()
        found = state()
        error = ""
        try:
            staged, ready = self._stage(found)
        except (OSError, RuntimeError) as failure:  # the host's memory; torch has errors of its own for it
            staged, ready, error = [], None, str(failure)
        self._saves += 1
        self.blocked_s = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._work, args=(found, staged, ready, request, str(self._saves), error), name="checkpoint", daemon=True
        )
        self._thread.start()

    def join(self, timeout: float | None = None) -> None:
        """Wait for this rank's thread, `timeout` seconds at most; on rank 0 its end is that of the save."""
        if self._thread is not None:
            self._thread.join(timeout)
            self._thread = None

    def outcome(self) -> None:
        """Wait until the last save has ended on all ranks.

        Raises:
            SaveFailed: it failed, on all ranks alike.
            OSError: how it ended could not be printed.
        """
        self.join()
        if self._saves:
            error = str(self._mailbox.get(f"{self._saves}/end"))
            torch.distributed.barrier()  # rank 0 holds the store: it must not leave before all have read
            if error:
                raise SaveFailed(error)
        self._raise_untold()

    def _raise_untold(self) -> None:
        untold, self._untold = self._untold, None
        if untold is not None:
            raise untold

    # ---- at the end of the step

    def _stage(self, state: LocalState) -> tuple[list[torch.Tensor], Any]:
        """Copies of the pieces in the host's buffer, and the event of the device after which they are there."""
        # with fp32 weights a master weight is the weight itself: one copy serves both
        places: dict[tuple[int, int, torch.dtype], int] = {}
        sources: list[tuple[int, torch.Tensor]] = []
        size = 0
        order = []
        for piece in state.pieces:
            key = (piece.data.data_ptr(), piece.data.numel(), piece.data.dtype)
            if key not in places:
                places[key] = size
                sources.append((size, piece.data))
                size += -(-piece.data.nbytes // _ALIGNMENT) * _ALIGNMENT
            order.append(places[key])
        self._buffer.reserve(size)
        for begin, data in sources:
            self._buffer.fill(begin, data)
        ready = None
        if self._device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        views = [
            self._buffer.tensor(begin, piece.data.numel(), piece.data.dtype).view(piece.shape)
            for begin, piece in zip(order, state.pieces, strict=True)
        ]
        return views, ready

    # ---- in the thread

    def _work(
        self, state: LocalState, staged: list[torch.Tensor], ready: Any, request: SaveRequest, number: str, error: str
    ) -> None:
        folder = self._root / f"{files.name_of(request.step)}.{self._attempt}{files.TEMPORARY}"
        report = _Report([], {}, error) if error else self._write_own(folder, state.pieces, staged, state.objects, ready)
        if self._rank:
            self._mailbox.put(f"{number}/{self._rank}", report.to_json())
            return
        reports = [report]
        for rank in range(1, self._world_size):
            reports.append(_Report.from_json(self._mailbox.get(f"{number}/{rank}")))
        errors = [f"rank {rank}: {one.error}" for rank, one in enumerate(reports) if one.error is not None]
        try:
            if errors:
                raise OSError(errors[0].removeprefix("rank 0: "))
            final = self._commit(folder, reports, state.common, request)
        except Exception as error:  # whatever it is, the ranks wait for the word
            if not isinstance(error, OSError):
                traceback.print_exc()
            shutil.rmtree(folder, ignore_errors=True)
            text = self._explain(folder, request.step, error)
            self._tell(lambda: request.failed(text))
            self._mailbox.put(f"{number}/end", text)
            return
        self._tell(lambda: self._prune(request))
        self._tell(lambda: request.committed(final))
        self._mailbox.put(f"{number}/end", "")

    def _tell(self, what: Callable[[], object]) -> None:
        """Do `what`, which may print. A console that is gone is for the main thread to raise: the ranks wait for the word."""
        try:
            what()
        except OSError as error:
            self._untold = error

    def _write_own(
        self, folder: Path, pieces: list[Piece], staged: list[torch.Tensor], objects: dict[str, bytes], ready: Any
    ) -> _Report:
        """This rank's file."""
        try:
            if ready is not None:
                ready.synchronize()
            folder.mkdir(parents=True, exist_ok=True)
            name = f"__{self._rank}_0.distcp"
            with TensorFile(folder / name) as file:
                for key, content in objects.items():
                    file.add_object(key, content)
                for piece, tensor in zip(pieces, staged, strict=True):
                    file.add(piece.key, piece.size, piece.offset, tensor)
            assert file.info is not None
            return _Report(file.entries, {name: file.info})
        except Exception as error:  # whatever it is, rank 0 waits for the word
            if not isinstance(error, (OSError, RuntimeError)):  # torch wraps what a file raises
                traceback.print_exc()
            return _Report([], {}, f"{error}")

    def _commit(self, folder: Path, reports: list[_Report], common: dict[str, Any], request: SaveRequest) -> Path:
        """Rank 0, when all ranks have written: make it a checkpoint."""
        written: dict[str, FileInfo] = {}
        for report in reports:
            written |= report.files
        seal(folder, [entry for report in reports for entry in report.entries], written, common, request.trainer)
        final = self._root / files.name_of(request.step)
        if final.exists() or final.is_symlink():  # of a future that the run has left
            files.remove(final)
        folder.rename(final)
        files.sync_folder(self._root)
        write_atomic(self._root / files.LATEST, final.name + "\n")
        return final

    def _prune(self, request: SaveRequest) -> None:
        """Remove what need not be kept. That it cannot be removed harms no checkpoint.

        The one of this step is kept, and has been read back: however damaged the others are, a sound one stays.
        """
        if request.keep_last is None:
            return
        kept = request.keep_last, request.keep_every, request.keep_steps
        for old in files.removable(files.all_of(self._root), request.step, *kept):
            try:
                files.remove(old)
            except OSError as error:
                say(f"warning: {old}: could not be removed: {error}")

    def _explain(self, folder: Path, step: int, error: Exception) -> str:
        try:
            free = f" ({human(shutil.disk_usage(self._root).free)} bytes are free there)"
        except OSError:
            free = ""
        return (
            f"{folder}: the checkpoint of step {step} could not be written: {error}{free}. Older checkpoints are untouched. "
            "Make room or fix the path; the same command, started again, resumes from the last one"
        )


def seal(
    folder: Path, entries: list[Entry], written: dict[str, FileInfo], common: dict[str, Any], trainer: dict[str, Any]
) -> None:
    """Write what makes a checkpoint of files of tensors: the index, what is equal on all ranks, trainer.json, the manifest.

    Args:
        folder: where the files are.
        entries: what is in them.
        written: of each of them, by name.
        common: of megatron-core.
        trainer: content of trainer.json.
    """
    index.write(folder, entries)
    listed = folder / index.FILE
    written[index.FILE] = FileInfo(listed.stat().st_size, files.hash_file(listed))
    content = io.BytesIO()
    torch.save(common, content)
    written["common.pt"] = files.write_hashed(folder / "common.pt", content.getvalue())
    config = json.dumps(asdict(CheckpointingConfig("torch_dist")))
    written[CONFIG_FNAME] = files.write_hashed(folder / CONFIG_FNAME, config.encode())
    text = json.dumps(trainer, indent=2, ensure_ascii=False) + "\n"
    written[files.TRAINER] = files.write_hashed(folder / files.TRAINER, text.encode())
    files.write_manifest(folder, written)


class TensorFile:
    """A file of tensors of a checkpoint, written one after the other. Use as a context; `info` is known after it."""

    def __init__(self, path: Path):
        self._path = path
        self.entries: list[Entry] = []
        self.info: FileInfo | None = None

    def __enter__(self) -> TensorFile:
        self._raw = self._path.open("wb", buffering=0)
        self._file = _HashedFile(self._raw)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with self._raw:
            if error is None:
                os.fsync(self._raw.fileno())
        if error is None:
            self.info = FileInfo(self._file.tell(), self._file.digest())
            files.read_back(self._path, self.info)  # so that older ones may go: this one was sound since it was written

    def add_object(self, key: str, content: bytes) -> None:
        """Append what is no tensor, serialized."""
        begin = self._file.tell()
        self._file.write(content)
        self.entries.append(Entry(key, None, (), (), None, self._path.name, begin, len(content)))

    def add(self, key: str, size: tuple[int, ...], offset: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Append a box of the tensor `key`, whose whole shape is `size`, at `offset`."""
        begin = self._file.tell()
        try:
            with _without_crc():
                torch.save(tensor, self._file)  # type: ignore[arg-type]
        except RuntimeError as error:
            cause = error.__context__
            if isinstance(cause, OSError):  # a full disk, which torch tells as a wrong place in its archive
                raise OSError(cause.errno, cause.strerror, str(self._path)) from None
            raise
        place = self._path.name, begin, self._file.tell() - begin
        self.entries.append(Entry(key, size, offset, tuple(tensor.shape), tensor.dtype, *place))


def _without_crc() -> Any:
    """Within, torch.save leaves out a checksum that the manifest's makes superfluous, at three times the speed."""
    return serialization.patch({"save.compute_crc32": False})  # type: ignore[attr-defined]


class _HashedFile(io.RawIOBase):
    """What is written to it goes to a file and into a checksum, while it is in the cache."""

    def __init__(self, file: io.FileIO):
        self._file, self._digest, self._size = file, xxhash.xxh3_64(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += self._file.write(view[done:])
        self._digest.update(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def digest(self) -> str:
        """Of all that was written."""
        return self._digest.hexdigest()
