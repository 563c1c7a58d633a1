"""Runs in object storage that are named by URL: what is needed of one is copied to a folder of the user's, and used from there.

    CACHE/runs/a-0123456789abcdef/    a run directory: the records, and the checkpoints that were asked for
        .fetched.json                 what the store called each record when it was copied
        .heads/step_00000900/         of a checkpoint manifest.json and trainer.json alone, for plans

A copy is used again while the bucket has the same manifest. Of several processes that ask for one copy, one makes it and the
others wait. A process says by a lock that it uses the folder, and what it may use is not taken away by another.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import cache_folder, write_atomic, write_json
from megatron_synth.core.log import say
from megatron_synth.data.staging.copies import locked, own_folder
from megatron_synth.storage import objects
from megatron_synth.storage.faults import StorageError
from megatron_synth.storage.remote import is_remote
from megatron_synth.train.checkpoint import files
from megatron_synth.train.checkpoint.bucket import RUN_FILES, Bucket

FOLDER, HEADS = "runs", ".heads"
_LOCK, _USED, _KNOWN = ".fetch.lock", ".used", ".fetched.json"
_IDENTITY = "run.json"
_DIGITS = 12
"""Of a step, at most."""
_NAME = 80
"""Characters of a folder's name that are the run's."""
_held: dict[Path, int] = {}
"""Descriptors of the locks of this process, kept for its life."""
_given: dict[Path, set[str]] = {}
"""Names of checkpoints that this process has been told of, by folder."""


def split(text: str) -> tuple[str, int | None]:
    """URL of a run, and the step where `URL@STEP` says one. The place of a checkpoint names it, too."""
    url, at, step = text.rpartition("@")
    if at and is_remote(url) and step.isascii() and step.isdecimal() and len(step) <= _DIGITS:
        return url.rstrip("/"), int(step)
    url = text.rstrip("/")
    parent, _, name = url.rpartition("/")
    if name[:5] == "step_" and name[5:].isascii() and name[5:].isdecimal() and parent.endswith(f"/{files.FOLDER}"):
        return parent.removesuffix(f"/{files.FOLDER}"), int(name[5:])
    return url.removesuffix(f"/{files.FOLDER}"), None


def local(text: str, key: str = "") -> Path:
    """A run directory or checkpoint as a path of this machine: a path is itself, of a URL the copy.

    Args:
        text: a path, or a URL: of a run its copy is a run directory, of `URL@STEP` the copy is a checkpoint in one.
        key: what was set to it, for messages.

    Raises:
        UserError: there is no such run or checkpoint, or it cannot be copied.
    """
    if not is_remote(text):
        return Path(text)
    url, step = split(text)
    copy = Copy(url, key)
    if step is not None:
        return copy.step(step)
    copy.newest()
    return copy.folder


def local_records(text: str) -> Path:
    """A run directory as a path of this machine: of a URL the copy of its records, without checkpoints. Raises UserError."""
    if not is_remote(text):
        return Path(text)
    url, step = split(text)
    if step is not None:
        raise UserError(f"{text}: the records of a run are of all of it; leave out @{step}")
    return Copy(url, "").records()


class Copy:
    """The copy of one run of a bucket.

    Args:
        url: the folder of the run, as `checkpoint.upload_to` names it.
        key: what was set to it, for messages.
    """

    def __init__(self, url: str, key: str):
        self._key = key
        self._bucket = Bucket(url, key)
        root = self._bucket.root
        self.folder = cache_folder() / FOLDER / f"{root.name[:_NAME]}-{hashlib.sha256(root.url.encode()).hexdigest()[:16]}"

    def path_of(self, step: int) -> Path:
        """Where the copy of a checkpoint is, or would be."""
        return self.folder / files.FOLDER / files.name_of(step)

    def records(self) -> Path:
        """The folder, with the records of the run. Raises UserError."""
        with self._working():
            if not self._fetch_records():
                raise StorageError(f"{self._bucket.root}: no run there, it has no {_IDENTITY}; {_EXPECTED}")
        return self.folder

    def newest(self) -> Path:
        """The newest sound checkpoint.

        Raises:
            UserError: there is none, or it cannot be copied.
        """
        passed: list[str] = []
        with self._working():
            self._fetch_records()
            for name in self._bucket.candidates():
                manifest = self._bucket.manifest(name)
                if manifest is None:
                    continue  # its upload was cut short
                faults = self._have(name, manifest)
                if faults:
                    passed.append(f"{self._bucket.place(name)}: damaged: {'; '.join(faults[:3])}")
                    continue
                for text in passed:
                    say(f"warning: {text}; going back to {name}")
                self._name_latest(name)
                return self.folder / files.FOLDER / name
            if passed:
                faulty = "\n  ".join(passed)
                raise StorageError(
                    f"{self._bucket.root}: no checkpoint there can be used:\n  {faulty}\nRestore one from a copy"
                )
            raise StorageError(f"{self._bucket.root}: no checkpoint there; {_EXPECTED}")

    def step(self, step: int) -> Path:
        """The checkpoint of a step.

        Raises:
            UserError: it is not there, is damaged, or cannot be copied.
        """
        name = files.name_of(step)
        with self._working():
            manifest = _manifest_of(self._bucket, step)
            self._fetch_records()
            faults = self._have(name, manifest)
            if faults:
                raise StorageError(f"{self._bucket.place(name)}: damaged: {'; '.join(faults[:3])}; name another step")
        return self.path_of(step)

    def state(self, step: int) -> Path:
        """A folder with manifest.json and trainer.json of the checkpoint of a step, and perhaps all of it: enough to plan with.

        Raises:
            UserError: as `step`.
        """
        with self._working():
            manifest = _manifest_of(self._bucket, step)
            whole, head = self.path_of(step), self.folder / HEADS / files.name_of(step)
            for found in (whole, head):
                if _content(found / files.MANIFEST) == manifest and (found / files.TRAINER).is_file():
                    return found
            shutil.rmtree(head, ignore_errors=True)
            head.mkdir(parents=True)
            write_atomic(head / files.TRAINER, self._bucket.checked(step, manifest, files.TRAINER))
            write_atomic(head / files.MANIFEST, manifest)
            return head

    # ---- under the lock

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Within, this process alone changes the folder; what goes wrong is told with the setting and the folder."""
        try:
            own_folder(self.folder, "set XDG_CACHE_HOME to a folder of your own")
            with locked(self.folder / _LOCK):
                if self.folder not in _held:
                    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                    _held[self.folder] = os.open(self.folder / _USED, flags, 0o600)
                    fcntl.flock(_held[self.folder], fcntl.LOCK_SH)
                yield
        except OSError as error:
            raise UserError(
                f"{error.filename or self.folder}: {error.strerror or error} while {self._bucket.root} was copied there; make "
                "room, or set XDG_CACHE_HOME to another disk"
            ) from error
        except StorageError as error:
            raise UserError(f"{self._key}: {error}" if self._key else str(error)) from error

    def _fetch_records(self) -> bool:
        """Copy the records that changed; whether there is a run. What is here of another run goes."""
        there = self._bucket.records()
        known = _known(self.folder / _KNOWN)
        now = {name: [there[name].etag, there[name].size] for name in RUN_FILES if name in there}
        changed = [name for name, what in now.items() if known.get(name) != what or not (self.folder / name).is_file()]
        contents = {name: objects.read(there[name]) for name in changed}
        if _IDENTITY in contents and _content(self.folder / _IDENTITY) is not None:
            before, after = _id(_content(self.folder / _IDENTITY)), _id(contents[_IDENTITY])
            if before != after:  # another run has taken the place in the bucket
                self._clear()
                contents = {name: objects.read(there[name]) for name in now}
        for name, content in contents.items():
            write_atomic(self.folder / name, content)
        for name in known:
            if name not in now and name in RUN_FILES:
                (self.folder / name).unlink(missing_ok=True)
        if now != known:
            write_json(self.folder / _KNOWN, now)
        return _IDENTITY in there

    def _have(self, name: str, manifest: bytes) -> list[str]:
        """Have a checkpoint here, as its manifest in the bucket says; what is wrong with it there."""
        root = self.folder / files.FOLDER
        here = root / name
        if not (_content(here / files.MANIFEST) == manifest and not files.faults(here, checksums=False)):
            root.mkdir(exist_ok=True)
            files.clear_unfinished(root)
            if here.exists():
                self._refuse_used(f"{here} is not as in the bucket any more")
            faults, _ = self._bucket.fetch(name, root)
            if faults:
                return faults
            say(f"fetched {self._bucket.place(name)} to {here}")
        _given.setdefault(self.folder, set()).add(name)
        return []

    def _name_latest(self, name: str) -> None:
        """Say which checkpoint is the one to use. The one that was it before goes, unless it may be in use."""
        latest = self.folder / files.FOLDER / files.LATEST
        before = (_content(latest) or b"").decode("utf-8", "replace").strip()
        if before == name:
            return
        write_atomic(latest, f"{name}\n")
        old = self.folder / files.FOLDER / before
        is_ours = before[:5] == "step_" and before[5:].isdecimal() and old.is_dir()
        if is_ours and before not in _given.get(self.folder, ()) and self._is_alone():
            files.remove(old)

    def _clear(self) -> None:
        self._refuse_used(f"{self.folder} holds another run than the bucket does by now")
        for path in self.folder.iterdir():
            if path.name in (_LOCK, _USED):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _refuse_used(self, why: str) -> None:
        if not self._is_alone():
            raise UserError(f"{why}, and another process uses the copy; wait until it has ended")

    def _is_alone(self) -> bool:
        """Whether no other process uses the folder."""
        held = _held[self.folder]
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        finally:  # nobody else takes it meanwhile: that is done under the other lock
            fcntl.flock(held, fcntl.LOCK_SH)


_EXPECTED = "expected the folder that checkpoint.upload_to of a run names"


def fetch_into(text: str, run: Path) -> Path:
    """Make a run directory of a run in object storage, or of `URL@STEP`; the checkpoint.

    Raises:
        UserError: `run` holds something else, there is no such run or checkpoint, or it cannot be copied.
    """
    url, step = split(text)
    if run.is_dir() and any(run.iterdir()) and not (run / _IDENTITY).is_file():
        found = {path.name for path in run.iterdir()}
        if not found <= {".lock", files.FOLDER, *RUN_FILES}:
            raise UserError(f"{run}: holds something else than a run; choose a new folder")
    bucket = Bucket(url, "URL")
    bucket.check_same_run(run)
    if step is None:
        checkpoint = bucket.fetch_newest(run, lambda text: say(f"warning: {text}"))
        if checkpoint is None and not files.candidates(run):
            raise UserError(f"{bucket.root}: no checkpoint there; {_EXPECTED}")
        return checkpoint or files.candidates(run)[0]
    name, had = files.name_of(step), files.candidates(run) if run.is_dir() else []
    manifest = _manifest_of(bucket, step)
    here = run / files.FOLDER / name
    if _content(here / files.MANIFEST) == manifest and not files.faults(here, checksums=True):
        return here
    try:
        if not had or had[0].name < name:  # else what is here is of a later step
            bucket.fetch_records(run)
        faults, _ = bucket.fetch(name, run / files.FOLDER)
        if faults:
            raise StorageError(f"{bucket.place(name)}: damaged: {'; '.join(faults[:3])}; name another step")
        if not had:
            write_atomic(run / files.FOLDER / files.LATEST, f"{name}\n")
    except OSError as error:
        raise UserError(
            f"{error.filename or run}: {error.strerror or error} while {bucket.place(name)} was copied there; make room"
        ) from error
    say(f"fetched {bucket.place(name)} to {run}")
    return here


def _manifest_of(bucket: Bucket, step: int) -> bytes:
    """The manifest of the checkpoint of a step; StorageError, with the steps that are there, if it is not."""
    found = bucket.manifest(files.name_of(step))
    if found is not None:
        return found
    there = sorted(int(name[5:]) for name in bucket.candidates() if bucket.manifest(name) is not None)
    if not there:
        raise StorageError(f"{bucket.root}: no checkpoint there; {_EXPECTED}")
    raise StorageError(f"{bucket.root}: there is no checkpoint of step {step}; there are {', '.join(map(str, there))}")


def _known(file: Path) -> dict[str, list[object]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _id(content: bytes | None) -> object:
    try:
        return json.loads(content or b"")["id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None
