"""A run is a directory: everything needed to read it, and with its data to resume it, also when it is copied elsewhere.

    config.yaml     the resolved configuration of the latest start
    run.json        who and where: id, digest, versions, git commit, host, device, layout, and every start
    metrics.jsonl   one record per step (metrics.py)
    ledger.json     samples and tokens delivered by source
    events.log      one line per event, with its time
    times.jsonl     what each start spent its time with (times.py)
    nodes.json      what each node waited for (nodes.py)
    report.png      the picture of the run (plot.py)
    samples.jsonl   texts that its model wrote (samples.py)
    tasks.json      results of downstream tasks (tasks.py)
    exported/       its weights in Hugging Face's format, once `generate` has asked for them (interop/export.py)
    tokenizer.json  the tokenizer of the data: the run can be exported where the data is not
    huggingface.json  what the model that it started from came with (checkpoint/companions.py)
    slurm/          a folder for each job that was submitted for the run (cluster/)
    checkpoints/    what resume.py wrote
    .lock           who trains in it now (run_lock.py)

The id is made once. It is also kept in the checkpoints, so that the tracker continues the same run after a restart.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import secrets
import socket
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from megatron_synth import __version__
from megatron_synth.config import yaml12
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import digest, to_yaml
from megatron_synth.config.schema import Config
from megatron_synth.core.files import append_line, write_atomic, write_json
from megatron_synth.core.log import say
from megatron_synth.core.records import read_text
from megatron_synth.train.checkpoint import companions
from megatron_synth.train.record import shapes
from megatron_synth.train.record.shapes import GitInfo, LedgerInfo, RunConfig, RunInfo, StartInfo

JOBS = "slurm"
"""Folder in a run directory with one folder for each job that was submitted for it (cluster/)."""
COMMIT_FILE = Path(__file__).resolve().parents[2] / "commit.json"
"""In a copy of the package that a job runs: the commit that it was copied from."""
_LIBRARIES = ("torch", "megatron-core", "numpy", "transformer-engine", "triton")


class RunDir:
    """An opened run directory. Only rank 0 writes to it."""

    def __init__(self, path: Path, info: RunInfo):
        self.path = path
        self.info = info
        """The content of run.json."""

    @property
    def id(self) -> str:
        """Eight hexadecimal characters, the same for the life of the run."""
        return str(self.info["id"])

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints; it exists."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl."""
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        """ledger.json."""
        return self.path / "ledger.json"

    @property
    def tokenizer(self) -> Path:
        """tokenizer.json; absent where the data does not tell which it is."""
        return self.path / "tokenizer.json"

    @property
    def report(self) -> Path:
        """report.png."""
        return self.path / "report.png"

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Open an existing run to read it; nothing is written. UserError if `path` is not a run directory."""
        path = Path(path).resolve()
        file = path / "run.json"
        if not file.is_file():
            raise UserError(f"{path}: not a run directory, there is no run.json in it")
        return cls(path, shapes.RUN.read(file))

    @classmethod
    def create_or_open(cls, path: str | Path, config: Config, *, layout: str, world_size: int) -> RunDir:
        """Begin a run at `path`, or begin the next start of the run that is there. Rank 0 only.

        layout: the parallel layout in words, such as `TP2 PP1 DP4`. world_size: ranks of this start.
        A new start keeps the id, replaces config.yaml, and logs every setting and circumstance that changed.
        UserError if `path` holds something else, or cannot be written.
        """
        path = Path(path).resolve()
        try:
            return cls._create_or_open(path, config, layout, world_size)
        except OSError as error:
            raise UserError(f"{path}: the run directory cannot be written ({error.strerror or error})") from error

    @classmethod
    def _create_or_open(cls, path: Path, config: Config, layout: str, world_size: int) -> RunDir:
        now = _now()
        found = {
            "digest": digest(config),
            "host": socket.gethostname(),
            "device": device_name(),
            "layout": layout,
            "world_size": world_size,
            "versions": versions(),
            "git": git_state(Path(__file__).parent),
        }
        if (path / "run.json").exists():
            run = cls.open(path)
            # the digest differs when a setting does, and those are listed one by one
            names = [name for name in found if name != "digest"]
            changes = _changes({name: run.info.get(name) for name in names}, {name: found[name] for name in names})
        else:
            cls.check_free(path)
            path.mkdir(parents=True, exist_ok=True)
            run, changes = cls(path, cast(RunInfo, {"id": secrets.token_hex(4), "created": now, "starts": []})), []
        start: StartInfo = {"time": now, "layout": layout, "world_size": world_size, "resumed_from_step": None}
        starts = [*run.info["starts"], start]
        run.info = cast(RunInfo, {**run.info, **found, "starts": starts})
        write_json(path / "run.json", run.info)  # first: it is what makes the folder a run
        run.checkpoints.mkdir(exist_ok=True)
        run.event(f"start {len(starts)} of run {run.id}: {layout}, {world_size} ranks, {found['device']}")
        for change in changes:
            run.event(f"changed: {change}")
        for change in run._replace_config(config):
            run.event(f"changed: {change}")
            say(f"changed: {change}")
        return run

    @staticmethod
    def check_free(path: Path) -> None:
        """UserError if a new run cannot begin at `path`, because something else is there."""
        if path.is_dir() and all(entry.name.startswith(".") or entry.name == JOBS for entry in path.iterdir()):
            return
        if path.exists():
            raise UserError(f"{path}: exists and is not a run directory (no run.json in it); choose another path")

    def _replace_config(self, config: Config) -> list[str]:
        """Write config.yaml; the settings in which it differs from the one that was there."""
        file, text = self.path / "config.yaml", to_yaml(config)
        changes: list[str] = []
        if file.is_file():
            old_text = read_text(file)
            if old_text == text:
                return []
            # compared as plain data: a file of an older version need not be valid in this one
            changes = _changes(yaml12.parse(old_text, str(file)), yaml12.parse(text, str(file)))
        write_atomic(file, text)
        return changes

    def keep(self, tokenizer: Path | None, started_from: Path | None) -> None:
        """Copy what an export needs into the run directory.

        Args:
            tokenizer: the data's tokenizer.json, where it is known.
            started_from: the folder of the run or import whose weights this run starts from.

        Raises:
            UserError: a file cannot be read or written.
        """
        wanted = {self.tokenizer: tokenizer}
        if started_from is not None:
            wanted[self.path / companions.FILE] = started_from / companions.FILE
        for file, source in wanted.items():
            if source is None or not source.is_file() or source.resolve() == file.resolve():
                continue
            try:
                content = source.read_bytes()
                if not file.is_file() or file.read_bytes() != content:
                    write_atomic(file, content)
            except OSError as error:
                raise UserError(f"{source}: cannot be copied to {file} ({error.strerror or error})") from error

    def record_resume(self, step: int) -> None:
        """Note that this start continued from the checkpoint of `step`."""
        self.info["starts"][-1]["resumed_from_step"] = step
        write_json(self.path / "run.json", self.info)
        self.event(f"resumed from step {step}")

    def event(self, text: str) -> None:
        """Append one line to events.log: the time in UTC, a space, `text` with its line breaks replaced by ` | `."""
        append_line(self.path / "events.log", f"{_now()} {' | '.join(text.splitlines())}")

    def write_ledger(self, ledger: dict[str, Any]) -> None:
        """Replace ledger.json."""
        write_json(self.ledger, ledger)

    def read_ledger(self) -> LedgerInfo | None:
        """The content of ledger.json; None if the run has not written one yet. UserError if it is damaged."""
        return shapes.LEDGER.read_optional(self.ledger)

    def read_config(self) -> RunConfig:
        """config.yaml as plain data, so that runs of older versions can be read; UserError if it is missing or damaged."""
        return read_config(self.path / "config.yaml")


def read_config(file: Path) -> RunConfig:
    """The resolved configuration of a run of any version; UserError if it is missing or damaged."""
    if not file.is_file():
        raise UserError(f"{file}: missing; a run directory holds its resolved configuration there")
    return shapes.CONFIG.check(yaml12.parse(read_text(file, yaml12.MAX_BYTES), str(file)), str(file))


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries that decide the numbers, read without importing them."""
    result = {"python": platform.python_version(), "megatron-synth": __version__}
    for name in _LIBRARIES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return result


def git_state(folder: Path) -> GitInfo | None:
    """`{"commit": ..., "dirty": ...}` of the checkout that tracks `folder`; None if none does, or git is absent.

    A package that is merely installed below another project's checkout is not described by that project's commit. The
    copy of the package that a job runs is described by the commit that it was copied from.
    """
    if COMMIT_FILE.is_file() and COMMIT_FILE.parent in (folder := folder.resolve(), *folder.parents):
        return shapes.COMMIT.read(COMMIT_FILE)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if not git("ls-files", "."):
            return None
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def device_name() -> str:
    """Name of the accelerator of this process, or of the processor where there is none."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _changes(old: Any, new: Any, path: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two nested dicts differ, by dotted key, in the order of `new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*new, *(key for key in old if key not in new)]
        absent = "(absent)"
        return [
            change
            for key in keys
            for change in _changes(old.get(key, absent), new.get(key, absent), f"{path}.{key}" if path else str(key))
        ]
    return [] if old == new else [f"{path}: {_shown(old)} -> {_shown(new)}"]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
