"""Checkpoints as files: which there are, whether they are sound, which may go. Needs neither torch nor megatron-core.

    checkpoints/step_00000120/          one checkpoint
        __0_0.distcp ... .metadata      model and optimizer, megatron-core's distributed format; common.pt, metadata.json
        trainer.json                    everything else: step, samples consumed, ledger, run id, configuration
        manifest.json                   size and XXH3 of every other file, written last
    checkpoints/latest                  the name of the one to resume

A checkpoint is written in a folder whose name ends in .tmp and renamed when its manifest is on the disk. So a folder without
that ending and with a manifest is whole, and the manifest tells whether it still is.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import xxhash
from pydantic import with_config
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import NOT_BEGUN, Progress
from megatron_synth.core.files import read_regular, write_atomic
from megatron_synth.core.names import plain_name
from megatron_synth.core.records import OPEN, Count, Reader
from megatron_synth.data.mixing.ledger import EarlierLabels

FOLDER = "checkpoints"
TRAINER = "trainer.json"
MANIFEST = "manifest.json"
LATEST = "latest"
TEMPORARY = ".tmp"
FORMAT = 2
"""Value of `format` in trainer.json from which on a checkpoint has a manifest."""
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class FileInfo:
    """What a manifest says of a file."""

    bytes: int
    xxh3: str
    """XXH3, 64 bits, hexadecimal."""


def name_of(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step_"))


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_hashed(path: Path, content: bytes) -> FileInfo:
    """Write a small file to the disk, and read it back.

    Raises:
        OSError: it cannot be written, or reads back otherwise.
    """
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    info = FileInfo(len(content), xxhash.xxh3_64_hexdigest(content))
    read_back(path, info)
    return info


def read_back(path: Path, info: FileInfo) -> None:
    """Compare a file that was just brought to the disk with what was written, from the disk where the system lets go of it.

    Raises:
        OSError: it differs.
    """
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    size, digest = path.stat().st_size, hash_file(path)
    if FileInfo(size, digest) != info:
        raise OSError(
            f"{path.name} reads back with {size} bytes and the checksum {digest}, expected {info.bytes} and {info.xxh3}: the "
            "disk does not hold what is written to it"
        )


def write_manifest(folder: Path, files: Mapping[str, FileInfo]) -> None:
    """Write manifest.json, after all files that it names."""
    listed = {name: {"bytes": info.bytes, "xxh3": info.xxh3} for name, info in sorted(files.items())}
    write_hashed(folder / MANIFEST, (json.dumps({"files": listed}, indent=1) + "\n").encode())
    sync_folder(folder)


def hash_file(path: Path) -> str:
    """XXH3 of a file's content."""
    digest = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


# ---- sound or not


def read_manifest(checkpoint: Path) -> dict[str, FileInfo] | None:
    """Files of a checkpoint by name; None for one made before manifests.

    Raises:
        ValueError: it should be there and is not, or cannot be read; the text names the file and the fault.
    """
    file = checkpoint / MANIFEST
    try:
        text = read_regular(file).decode("utf-8")
    except FileNotFoundError:
        if _format(checkpoint) < FORMAT:
            return None
        raise ValueError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from None
    return parse_manifest(text)


def parse_manifest(text: str | bytes) -> dict[str, FileInfo]:
    """Files by name, of the content of a manifest. ValueError if that is damaged."""
    try:
        files = {
            plain_name(name, "the name of a file"): FileInfo(int(info["bytes"]), str(info["xxh3"]))
            for name, info in json.loads(text)["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is damaged ({error!r})") from None
    if TRAINER not in files:
        raise ValueError(f"{MANIFEST} is damaged (it does not list {TRAINER})")
    return files


def _format(checkpoint: Path) -> int:
    try:
        return int(json.loads(read_regular(checkpoint / TRAINER).decode("utf-8")).get("format", 1))
    except FileNotFoundError:
        raise ValueError(f"{TRAINER} is missing") from None
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{TRAINER} is damaged ({error})") from None


@with_config(OPEN)
class SavedState(TypedDict):
    """trainer.json, as far as it is read without the engine; `resume.TrainerState` is the whole."""

    step: Count
    samples: Count
    plan_digest: str
    ledger: dict[str, Count]
    prefix_digest: NotRequired[str]
    labels: NotRequired[dict[str, Count]]
    labels_earlier: NotRequired[EarlierLabels | None]
    config: NotRequired[dict[str, Any]]


STATE: Reader[SavedState] = Reader(
    SavedState,
    "expected the trainer's state of a checkpoint; restore it, or remove the checkpoint",
    nan_is_null=True,  # its configuration may have max_epochs: .inf
)


def faults(checkpoint: Path, *, checksums: bool, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files, one line each; empty if it is sound.

    Args:
        checkpoint: its folder.
        checksums: read every file; otherwise sizes alone are compared.
        part: of the files' contents, read those of this part only: ranks share the work. Sizes are cheap and always compared.
        parts: number of parts.
    """
    try:
        files = read_manifest(checkpoint)
    except ValueError as error:
        return [str(error)]
    if files is None:
        needed = ("metadata.json", "common.pt", ".metadata")
        linked = [f"{path.name} is a link" for path in checkpoint.iterdir() if path.is_symlink()]
        return [f"{name} is missing" for name in needed if not (checkpoint / name).is_file()] + linked
    found = []
    # the largest first, dealt in turn, so that parts are about equal
    for number, (name, info) in enumerate(sorted(files.items(), key=lambda entry: (-entry[1].bytes, entry[0]))):
        file = checkpoint / name
        try:
            size = file.lstat().st_size
            if not stat.S_ISREG(file.lstat().st_mode):
                found.append(f"{name} is a link, a folder or a device, expected a file of the checkpoint's own")
            elif size != info.bytes:
                found.append(f"{name} has {size} bytes, expected {info.bytes}")
            elif checksums and number % parts == part and (digest := hash_file(file)) != info.xxh3:
                found.append(f"{name} has the checksum {digest}, expected {info.xxh3}")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror or error})")
    return found


def progress_of(run: Path) -> Progress:
    """How far the run has come that would go on from the newest checkpoint in `run`, as far as sizes tell; none: not begun.

    Raises:
        UserError: all checkpoints are damaged.
    """
    checkpoint = first_sound(candidates(run), lambda one: faults(one, checksums=False), None, run)
    if checkpoint is None:
        return NOT_BEGUN
    saved = STATE.read(checkpoint / TRAINER)
    return Progress(saved["step"], saved["samples"])


# ---- which there are


def root_of(path: Path) -> Path:
    """The checkpoints folder of a run directory, or `path` itself."""
    return path / FOLDER if (path / FOLDER).is_dir() else path


def run_of(checkpoint: Path) -> Path:
    """The run directory of a checkpoint, or the folder of what was imported; the checkpoint itself if it lies alone."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == FOLDER else checkpoint


def all_of(root: Path) -> list[Path]:
    """Checkpoints in a folder, by step; those that were being written when the run died are not among them."""
    found = [path for path in root.glob("step_*") if path.name[5:].isdecimal() and path.is_dir()]
    return sorted(found, key=step_of)


def candidates(path: Path) -> list[Path]:
    """Checkpoints of a run directory or checkpoints folder in the order in which to try them; `path` itself if it is one.

    First the one that `latest` names, then those before it, the newest first. Later ones are of a future that the run has left.
    """
    if (path / TRAINER).is_file() or (path / MANIFEST).is_file():
        return [path]
    root = root_of(path)
    found = all_of(root)[::-1]
    try:
        latest = root / read_regular(root / LATEST).decode("utf-8").strip()
        newest = step_of(latest)
    except (OSError, ValueError):
        return found
    return [*(one for one in found if step_of(one) <= newest), *(one for one in found if step_of(one) > newest)]


def first_sound(
    listed: Iterable[Path], faults_of: Callable[[Path], list[str]], warn: Callable[[str], None] | None, path: Path
) -> Path | None:
    """The first of `listed` without faults; None if the list is empty. `warn` hears of each that is passed over.

    Raises:
        UserError: all are damaged. The message names `path`, and the faults of each.
    """
    passed: list[str] = []
    for checkpoint in listed:
        found = faults_of(checkpoint)
        if not found:
            if warn is not None:
                for text in passed:
                    warn(f"{text}; going back to {checkpoint.name}")
            return checkpoint
        passed.append(f"{checkpoint}: damaged: {'; '.join(found[:3])}" + (" and more" if len(found) > 3 else ""))
    if passed:
        faulty = "\n  ".join(passed)
        raise UserError(
            f"{path}: no checkpoint of it can be used:\n  {faulty}\nRestore one from a copy, or remove them to begin again"
        )
    return None


# ---- which may go


def removable(
    checkpoints: Iterable[Path], newest: int, keep_last: int, keep_every: int | None, keep_steps: Collection[int] = ()
) -> list[Path]:
    """Checkpoints that need not be kept, by step.

    Later ones than the step `newest` are of a future that the run has left: they stay and are replaced when it comes there
    again. Names of one folder, such as a link and what it points to, are one checkpoint: the newest name counts, and the
    others stay with it. That one of those kept is sound is for the caller to know.
    """
    named = {one.resolve(): one for one in sorted(checkpoints, key=step_of)}
    old = sorted((one for one in named.values() if step_of(one) <= newest), key=step_of)[:-keep_last]
    old = [one for one in old if step_of(one) not in keep_steps]
    return [one for one in old if keep_every is None or step_of(one) % keep_every]


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that a crash in the middle leaves nothing that looks like one. Of a link, the link alone."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    doomed = checkpoint.with_name(checkpoint.name + ".removed" + TEMPORARY)
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def check_writable(root: Path) -> None:
    """Refuse a checkpoints folder that exists and cannot be written to.

    Raises:
        UserError: names the folder and the reason.
    """
    if root.is_dir():
        try:
            write_atomic(root / f"probe{TEMPORARY}", "")
            (root / f"probe{TEMPORARY}").unlink()
        except OSError as error:
            raise UserError(f"{root}: the run directory cannot be written ({error.strerror or error})") from error


def clear_unfinished(root: Path) -> None:
    """Remove what earlier starts left half-written."""
    for path in root.glob(f"step_*{TEMPORARY}"):
        shutil.rmtree(path, ignore_errors=True)
