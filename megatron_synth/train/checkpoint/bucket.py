"""Checkpoints of a run in object storage: uploaded while training goes on, fetched where the run directory has none.

    UPLOAD_TO/checkpoints/step_00000120/...     as on the disk; manifest.json is written last and removed first
    UPLOAD_TO/checkpoints/latest                the name of the one to resume, written after that
    UPLOAD_TO/run/...                           what a run is beside its checkpoints: run.json, metrics.jsonl, events.log, ...

So what has a manifest is whole, whenever a process, a machine or the connection was lost. What is fetched is as doubtful as any
untrusted file: names are those of a checked manifest, contents are held against its checksums.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import CheckpointConfig
from megatron_synth.core.files import write_atomic
from megatron_synth.core.log import human, say
from megatron_synth.storage import objects
from megatron_synth.storage.faults import ObjectMissing, StorageError
from megatron_synth.storage.remote import Remote, remote
from megatron_synth.train.checkpoint import files

RUN = "run"
# the first one makes a folder a run: a start that is killed while it fetches the others finds its own run again
RUN_FILES = (
    "run.json",
    "branch.json",
    "config.yaml",
    "events.log",
    "huggingface.json",
    "ledger.json",
    "metrics.jsonl",
    "nodes.json",
    "times.jsonl",
    "tokenizer.json",
)
UPLOADS_AT_ONCE = 4
_IDENTITY = "run.json"


class Bucket:
    """The folder of one run in object storage, as `checkpoint.upload_to` names it.

    key: what was set to it, for messages.
    """

    def __init__(self, url: str, key: str = "checkpoint.upload_to"):
        self.root = remote(url, key)
        self._checkpoints = self.root / files.FOLDER

    def candidates(self) -> list[str]:
        """Names of checkpoints in the order in which to try them; those that were not uploaded whole are among them.

        Raises:
            StorageError: the store cannot be asked.
        """
        names = [name for name in objects.listing(self._checkpoints)[1] if name[:5] == "step_" and name[5:].isdecimal()]
        found = sorted((name for name in names if name == files.name_of(int(name[5:]))), reverse=True)
        try:
            latest = objects.read(self._checkpoints / files.LATEST).decode("utf-8", "replace").strip()
        except ObjectMissing:
            return found
        return [*(name for name in found if name <= latest), *(name for name in found if name > latest)]

    def has_any(self) -> bool:
        """Whether a run can go on from here, as far as names tell."""
        return bool(self.candidates())

    def place(self, name: str) -> Remote:
        """The folder of a checkpoint."""
        return self._checkpoints / name

    def manifest(self, name: str) -> bytes | None:
        """The manifest of a checkpoint; None where it has none, and so is not whole. Raises StorageError."""
        try:
            return objects.read(self._checkpoints / name / files.MANIFEST)
        except ObjectMissing:
            return None

    def checked(self, step: int, manifest: bytes, file: str) -> bytes:
        """A small file of a checkpoint, held against its manifest.

        Raises:
            UserError: it is not there, or is not what the manifest says.
        """
        folder = self._checkpoints / files.name_of(step)
        try:
            wanted = files.parse_manifest(manifest)[file]
        except ValueError as error:
            raise UserError(f"{folder}: damaged: {error}; name another step") from None
        content = objects.read(folder / file)
        if files.FileInfo(len(content), xxhash.xxh3_64_hexdigest(content)) != wanted:
            raise UserError(f"{folder / file}: damaged: it is not what {files.MANIFEST} says; name another step")
        return content

    def record(self, name: str) -> bytes | None:
        """A record of the run; None where it has none of that name. Raises StorageError."""
        try:
            return objects.read(self.root / RUN / name)
        except ObjectMissing:
            return None

    def records(self) -> dict[str, Remote]:
        """The records of the run by name; of a run directory that was copied there as it is, too. Raises StorageError."""
        return objects.listing(self.root / RUN)[0] or objects.listing(self.root)[0]

    def check_same_run(self, run: Path) -> None:
        """Refuse a folder of another run: two would remove each other's checkpoints.

        Raises:
            UserError: it holds another run, or what it holds cannot be read.
        """
        try:
            there = json.loads(objects.read(self.root / RUN / _IDENTITY))["id"]
        except ObjectMissing:
            return
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"{self.root / RUN / _IDENTITY}: damaged; restore it, or set checkpoint.upload_to to another folder"
            ) from None
        try:
            here = json.loads((run / _IDENTITY).read_text(encoding="utf-8"))["id"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return  # there is no run yet, or its own reader complains
        if there != here:
            raise UserError(
                f"checkpoint.upload_to: {self.root} holds run {there!r:.40}, and {run} is run {here}; set it to a folder of "
                "this run's own"
            )

    # ---- to an empty machine

    def fetch_newest(self, run: Path, warn: Callable[[str], None]) -> Path | None:
        """Copy the newest sound checkpoint to a run directory, unless one as new is there; what was copied.

        warn: hears of each that is damaged and passed over.

        Raises:
            UserError: all are damaged, or one cannot be copied.
        """
        self.check_same_run(run)
        here = files.candidates(run) if run.is_dir() else []
        passed: list[str] = []
        for name in self.candidates():
            if here and here[0].name >= name:
                return None
            try:
                objects.look(self._checkpoints / name / files.MANIFEST)
            except ObjectMissing:
                continue  # its upload was cut short
            try:
                self.fetch_records(run)
                found, checkpoint = self.fetch(name, run / files.FOLDER)
            except OSError as error:
                raise UserError(
                    f"{error.filename or run}: {error.strerror or error} while {self._checkpoints / name} was copied there; "
                    "make room"
                ) from error
            if checkpoint is not None:
                for text in passed:
                    warn(f"{text}; going back to {name}")
                write_atomic(run / files.FOLDER / files.LATEST, name + "\n")
                say(f"fetched {self._checkpoints / name} to {run}")
                return checkpoint
            passed.append(f"{self._checkpoints / name}: damaged: {'; '.join(found[:3])}")
        if passed and not here:
            faulty = "\n  ".join(passed)
            raise UserError(
                f"{self.root}: no checkpoint there can be used:\n  {faulty}\nRestore one, or remove them to begin again"
            )
        for text in passed:
            warn(f"{text}; going on from {here[0]}")
        return None

    def fetch(self, name: str, root: Path) -> tuple[list[str], Path | None]:
        """Copy a checkpoint to a folder of checkpoints: what is wrong with it there, or where it now is.

        Raises:
            UserError: there is no room, or the store cannot be asked.
            OSError: it cannot be written.
        """
        folder, target = self._checkpoints / name, root / f"{name}.fetched{files.TEMPORARY}"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        try:
            (target / files.MANIFEST).write_bytes(objects.read(folder / files.MANIFEST))
            try:
                wanted = files.read_manifest(target)
            except ValueError as error:
                return [str(error)], None
            assert wanted is not None, "there is a manifest"
            there = objects.listing(folder)[0]
            sizes = {file: there[file].size if file in there else None for file in wanted}
            wrong = [file for file, info in wanted.items() if sizes[file] != info.bytes]
            if wrong:
                return [f"{file} has {sizes[file]} bytes, expected {wanted[file].bytes}" for file in wrong], None
            needed, free = sum(info.bytes for info in wanted.values()), shutil.disk_usage(target).free
            if needed > free:
                raise UserError(f"{target}: {human(free)} bytes free, {human(needed)} needed for {folder}; make room")
            for file, info in wanted.items():
                with open(target / file, "xb") as copy:
                    for data in objects.chunks(folder / file, info.bytes):
                        copy.write(data)
            found = files.faults(target, checksums=True)
            if found:
                return found, None
            if (root / name).exists():
                files.remove(root / name)
            target.rename(root / name)
            files.sync_folder(root)
            return [], root / name
        finally:
            shutil.rmtree(target, ignore_errors=True)

    def fetch_records(self, run: Path) -> None:
        """Copy the records of the run into a run directory. Raises StorageError, and OSError where it cannot be written."""
        there = self.records()
        run.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            if name in there:
                write_atomic(run / name, objects.read(there[name]))

    # ---- from a run

    def upload(self, checkpoint: Path) -> None:
        """Copy a whole checkpoint, and what the run is beside it; it can be seen when all of it is there.

        Raises:
            UserError: it cannot be read, or not be copied.
        """
        folder = self._checkpoints / checkpoint.name
        try:
            wanted = files.read_manifest(checkpoint)
            assert wanted is not None, "checkpoints of this version have a manifest"
            objects.remove(folder / files.MANIFEST)
            with ThreadPoolExecutor(UPLOADS_AT_ONCE, "upload") as pool:
                list(pool.map(lambda name: objects.upload(checkpoint / name, folder / name), wanted))
            run = files.run_of(checkpoint)
            for name in RUN_FILES:
                if (run / name).is_file():
                    objects.write(self.root / RUN / name, (run / name).read_bytes())
            objects.upload(checkpoint / files.MANIFEST, folder / files.MANIFEST)
            objects.write(self._checkpoints / files.LATEST, f"{checkpoint.name}\n".encode())
        except (OSError, ValueError) as error:
            raise UserError(f"{checkpoint}: could not be read to be uploaded to {folder}: {error}") from error

    def prune(self, newest: int, keep_last: int, keep_every: int | None, keep_steps: Collection[int]) -> None:
        """Remove what need not be kept, as on the disk. Raises StorageError."""
        named = [Path(f"/{name}") for name in self.candidates()]
        for old in files.removable(named, newest, keep_last, keep_every, keep_steps):
            folder = self._checkpoints / old.name
            objects.remove(folder / files.MANIFEST)
            for place in objects.listing(folder)[0].values():
                objects.remove(place)


class Uploader:
    """Uploads checkpoints in a thread, the newest first: one that is followed while it waits is left out.

    warn: hears of an upload that failed. The next checkpoint tries again.
    """

    def __init__(self, bucket: Bucket, settings: CheckpointConfig, warn: Callable[[str], None]):
        self._bucket, self._settings, self._warn = bucket, settings, warn
        self._changed = threading.Condition()
        self._now: Path | None = None
        self._next: Path | None = None
        self._error: UserError | None = None
        self._thread: threading.Thread | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        """Of checkpoints that must stay until they are uploaded."""
        with self._changed:
            return tuple(files.step_of(one) for one in (self._now, self._next) if one is not None)

    def offer(self, checkpoint: Path) -> None:
        """Upload this one, in place of any that still waits."""
        with self._changed:
            self._next = checkpoint
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
                self._thread.start()

    def offer_if_lacking(self, checkpoint: Path) -> None:
        """Upload this one, unless a start would resume from it there. Raises StorageError."""
        if checkpoint.name not in self._bucket.candidates()[:1]:
            self.offer(checkpoint)

    def wait(self, timeout: float) -> bool:
        """Whether all is uploaded, within `timeout` seconds.

        Raises:
            UserError: the newest could not be.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: self._thread is None, timeout)
            if done and self._error is not None:
                raise UserError(f"{self._error}. The checkpoint in the run directory is whole: the same command tries again")
            return done

    def _work(self) -> None:
        while True:
            with self._changed:
                self._now, self._next = self._next, None
                if self._now is None:
                    self._thread = None
                    self._changed.notify_all()
                    return
                checkpoint = self._now
            self._error = self._upload(checkpoint)

    def _upload(self, checkpoint: Path) -> UserError | None:
        kept = self._settings
        try:
            self._bucket.upload(checkpoint)
            say(f"uploaded {checkpoint.name} to {self._bucket.root}")
        except UserError as error:
            self._warn(f"{error}. Training goes on")
            return error
        try:
            self._bucket.prune(files.step_of(checkpoint), kept.keep_last, kept.keep_every, kept.keep_steps)
        except StorageError as error:  # more is there than need be, and nothing is lost
            self._warn(str(error))
        return None
