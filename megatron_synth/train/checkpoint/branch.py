"""Branches: runs that go on from a checkpoint of another run, their trunk, under another schedule, budget or mixture.

A branch takes weights, the optimizer's moments and the data position. Steps and samples are counted on, so that the schedule is
that of a run of its length, and sample n of trunk and branch are one sequence. If the branch's mixture agrees with what the
trunk has consumed, it is the plan. Otherwise the branch gets a plan of its own from its first sample on: the trunk's phases up
to there, exactly as they were, and the branch's after them, which `data.phases` says in the branch's config.yaml. Caps on
repetition therefore count both parts.

    RUN/branch.json    what the branch knows of its trunk, which may be removed once the branch has a checkpoint of its own
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

from pydantic import ValidationError, with_config
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from megatron_synth.config import rules
from megatron_synth.config.errors import ConfigError, Problem, UserError
from megatron_synth.config.schema import NOT_BEGUN, Config, DataConfig, PhaseConfig, Progress, SourceConfig
from megatron_synth.core.files import write_json
from megatron_synth.core.records import OPEN, Count, Positive, Reader, first_fault
from megatron_synth.data.mixing.schedule import Phase, Schedule, phases_of, whole_samples
from megatron_synth.data.mixing.skips import Skips
from megatron_synth.storage.faults import StorageError
from megatron_synth.storage.remote import is_remote
from megatron_synth.train.checkpoint import fetched, files
from megatron_synth.train.checkpoint.bucket import RUN, Bucket

FILE = "branch.json"
_KEY = "checkpoint.branch_from"
_DIGITS = 12
"""Of a step, at most."""


@with_config(OPEN)
class TrunkState(TypedDict):
    """trainer.json of a trunk, as far as a branch knows it."""

    run_id: str
    step: Positive
    samples: Positive
    skipped: Count
    ledger: dict[str, Count]
    prefix_digest: str
    config: dict[str, Any]
    unlearned: NotRequired[dict[str, Count]]


@with_config(OPEN)
class TrunkRecord(TrunkState):
    """branch.json."""

    checkpoint: str
    """The folder that the branch began from."""
    url: NotRequired[str | None]
    """`URL@STEP`, where the trunk is in object storage and that folder is a copy."""


_STATE: Reader[TrunkState] = Reader(
    TrunkState, "expected the trainer's state of a checkpoint of this version; take another step of the run", nan_is_null=True
)
_RECORD: Reader[TrunkRecord] = Reader(
    TrunkRecord, "restore it from a copy of the run, or branch again in another", nan_is_null=True
)


class Trunk(NamedTuple):
    """What a branch goes on from."""

    checkpoint: Path
    run_id: str
    step: int
    samples: int
    skipped: int
    """Steps of it that were skipped."""
    ledger: dict[str, int]
    """Samples of the trunk's part by source."""
    prefix_digest: str
    config: dict[str, Any]
    """Of the trunk, as plain data."""
    unlearned: dict[str, int]
    """Of the ledger, the samples of skipped steps."""
    file: Path
    """Where this was read: trainer.json of the trunk's checkpoint, or the branch's own branch.json."""
    url: str | None = None
    """`URL@STEP` of a trunk in object storage, of which `checkpoint` is the copy once training needs it."""

    @property
    def name(self) -> str:
        """The trunk's run directory, and the step: `runs/a@60`."""
        return self.url or f"{files.run_of(self.checkpoint)}@{self.step}"

    @property
    def progress(self) -> Progress:
        """How far the trunk was."""
        return Progress(self.step, self.samples)

    def save(self, run: Path) -> None:
        """Write branch.json into the branch's run directory."""
        content = {**self._asdict(), "checkpoint": str(self.checkpoint.absolute())}
        del content["file"]
        if self.url is None:
            del content["url"]
        write_json(run / FILE, content)


def trunk_of(config: Config, run: Path | None) -> Trunk | None:
    """What a configuration, or the run that has begun in a directory, branches from; None: it is no branch.

    Raises:
        UserError: there is no such run or checkpoint, or the run that is there began otherwise.
    """
    begun = None if run is None else kept(run)
    asked = config.checkpoint.branch_from
    if asked is None:
        if begun is not None:
            raise UserError(
                f"{_KEY}: not set, but {run} is a branch of {begun.name}; set it to that, or use another run directory"
            )
        return None
    if begun is None and run is not None:
        begun = _kept_in_bucket(config, run)
    folder, step = split(asked)
    url = f"{fetched.split(asked)[0]}@{step}" if is_remote(asked) else None
    checkpoint = files.root_of(folder) / files.name_of(step)
    if begun is not None:
        same = begun.url == url if url is not None else begun.checkpoint == checkpoint.absolute()
        if begun.step != step or (not same and _run_id(checkpoint if url is None else url) not in (None, begun.run_id)):
            raise UserError(
                f"{_KEY}: {asked}, but {run} is a branch of {begun.name}; set it to that, or use another run directory"
            )
        return begun
    if url is not None:
        if config.checkpoint.upload_to is not None and fetched.split(config.checkpoint.upload_to)[0] == fetched.split(url)[0]:
            raise UserError(f"{_KEY}: {asked} is what checkpoint.upload_to names; set that to a folder of the branch's own")
        copy = fetched.Copy(fetched.split(url)[0], _KEY)
        head = copy.state(step)
        return _trunk(copy.path_of(step), _checked(head, step), head / files.TRAINER, url)
    if run is not None and folder.resolve() in (run.resolve(), (run / files.FOLDER).resolve()):
        raise UserError(f"{_KEY}: {asked} is the branch's own run directory; choose another with --run-dir")
    if not folder.is_dir():
        raise UserError(f"{_KEY}: {folder}: no such run directory")
    if not checkpoint.is_dir():
        saved = ", ".join(str(files.step_of(one)) for one in files.all_of(files.root_of(folder))) or "none"
        raise UserError(
            f"{_KEY}: {asked}: step {step} is not saved there; saved: {saved}. The trunk keeps steps for branches with "
            "checkpoint.keep_steps, or checkpoint.interval and checkpoint.keep_every"
        )
    return _trunk(checkpoint.absolute(), _checked(checkpoint, step), checkpoint / files.TRAINER)


def _checked(checkpoint: Path, step: int) -> TrunkState:
    """trainer.json of a checkpoint that one can branch from. Raises UserError."""
    state = _STATE.read(checkpoint / files.TRAINER)
    if not state["run_id"]:
        raise UserError(f"{_KEY}: {checkpoint} holds weights alone, made by convert or merge; use checkpoint.init_from")
    if state["step"] != step:
        raise UserError(f"{_KEY}: {checkpoint} is of step {state['step']} by its {files.TRAINER}, expected {step}")
    return state


def _kept_in_bucket(config: Config, run: Path) -> Trunk | None:
    """What a branch whose run directory is empty, as on another machine, has kept of its trunk where it uploads to."""
    if config.checkpoint.upload_to is None or (run / "run.json").exists():
        return None
    bucket = Bucket(config.checkpoint.upload_to)
    content = bucket.record(FILE) if bucket.has_any() else None
    if content is None:
        return None
    file = run / FILE  # which it is, once it is fetched
    found = _RECORD.parse(content, str(bucket.root / RUN / FILE))
    return _trunk(Path(found["checkpoint"]), found, file, found.get("url"))


def split(text: str, key: str = _KEY) -> tuple[Path, int]:
    """Run directory and step of `RUN@STEP`; `key` is whose value it is.

    Raises:
        UserError: it is not of this form.
    """
    run, at, step = text.rpartition("@")
    if not (run and at and step.isascii() and step.isdecimal() and len(step) <= _DIGITS and int(step) > 0):
        raise UserError(f"{key}: expected RUN@STEP, such as runs/trunk@8000, got {text!r:.200}")
    return Path(run), int(step)


def kept(run: Path) -> Trunk | None:
    """What the branch in a run directory has kept of its trunk; None: it is none. UserError if that is damaged."""
    found = _RECORD.read_optional(run / FILE)
    return None if found is None else _trunk(Path(found["checkpoint"]), found, run / FILE, found.get("url"))


def _trunk(checkpoint: Path, state: TrunkState, file: Path, url: str | None = None) -> Trunk:
    own = (
        state["run_id"],
        state["step"],
        state["samples"],
        state["skipped"],
        state["ledger"],
        state["prefix_digest"],
        state["config"],
    )
    return Trunk(checkpoint, *own, state.get("unlearned", {}), file, url)


def _run_id(checkpoint: Path | str) -> str | None:
    """The run that a checkpoint, or that of `URL@STEP`, is of; None: it is not there any more."""
    if isinstance(checkpoint, str):
        url, step = fetched.split(checkpoint)
        assert step is not None
        try:
            checkpoint = fetched.Copy(url, _KEY).state(step)
        except StorageError:
            return None
    file = checkpoint / files.TRAINER
    return _STATE.read(file)["run_id"] if file.is_file() else None


def progress_of(config: Config, run: Path | None) -> Progress:
    """How far the run in a directory is, as `files.progress_of`; a branch that has not saved yet is where its trunk was."""
    found = NOT_BEGUN if run is None else files.progress_of(run)
    trunk = trunk_of(config, run) if found == NOT_BEGUN else None
    return found if trunk is None else trunk.progress


def resolved(config: Config, run: Path | None) -> Config:
    """The configuration with the trunk's part of the mixture in it; `config` itself where there is none to add.

    Applied to its own result it returns that.

    Raises:
        UserError: as `trunk_of`.
        ConfigError: the branch cannot go on with the samples after those of its trunk.
    """
    trunk = trunk_of(config, run)
    if trunk is None:
        return config
    if config.train.steps <= trunk.step:
        raise UserError(
            f"train.steps: {config.train.steps}, but {_KEY} is step {trunk.step} of its trunk, and a branch counts on: set it "
            f"to more than {trunk.step}"
        )
    before = _Before.of(trunk)
    problems = list(_contradictions(config, before))
    if problems:
        raise ConfigError(f"branch of {trunk.name}", problems)
    # what the trunk left out stays out, and is no part of what it consumed
    skips = Skips(before.data.skip)
    end, left_out = skips.end(trunk.samples), skips.until(trunk.samples)
    wrong = [one for one in Skips(config.data.skip).ranges if one[0] < end and one not in left_out]
    if wrong:
        first, last = wrong[0]
        raise UserError(
            f"data.skip: [{first}, {last}] begins within the {end} samples that {trunk.name} has consumed; branch from "
            "before it"
        )
    own = [one for one in config.data.skip if one[0] >= end]
    skip = config.data.skip if set(left_out) <= {*config.data.skip} else (*left_out, *own)
    config = config.model_copy(update={"data": config.data.model_copy(update={"skip": skip})})
    if _agrees(config, before, end):
        return config
    joined = config.model_copy(update={"data": _joined(config, before, end)})
    problems = rules.check(joined)
    if problems:
        raise ConfigError(f"branch of {trunk.name}, whose part of the mixture comes first", problems)
    return joined


class _Before(NamedTuple):
    """The trunk's mixture."""

    data: DataConfig
    seed: int
    window_length: int

    @classmethod
    def of(cls, trunk: Trunk) -> _Before:
        where = f"{trunk.file}: config"
        hint = _RECORD.remedy if trunk.file.name == FILE else "branch with the version that wrote it"
        try:
            content = dict(trunk.config["data"])
            # infinity is no JSON, and is read as null
            content["sources"] = {
                name: {**source, "max_epochs": math.inf if source.get("max_epochs", 1) is None else source.get("max_epochs", 1)}
                for name, source in content["sources"].items()
            }
            content["phases"] = [{**phase, "ramp": _by_alias(phase["ramp"])} for phase in content.get("phases", [])]
            data = DataConfig.model_validate(content)
            seed, length = trunk.config["train"]["seed"], trunk.config["train"]["sequence_length"]
        except ValidationError as error:
            raise UserError(f"{where}.data: {first_fault(error)}; {hint}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: expected the configuration of a run ({error!r}); {hint}") from None
        if type(seed) is not int or type(length) is not int or length < 1 or length % data.windows_per_sequence:
            raise UserError(
                f"{where}.train: expected a seed and a sequence length, found {seed!r:.40} and {length!r:.40}; {hint}"
            )
        return cls(data, seed if data.seed is None else data.seed, length // data.windows_per_sequence)


def _by_alias(ramp: dict[str, Any] | None) -> dict[str, Any] | None:
    """A ramp as a configuration file has it; trainer.json has the names of the fields."""
    names = {"start": "from", "end": "to"}
    return None if ramp is None else {names.get(name, name): value for name, value in ramp.items()}


def _contradictions(config: Config, before: _Before) -> Iterator[Problem]:
    """What keeps one order of the samples from holding for trunk and branch."""
    if config.data_seed != before.seed:
        message = (
            f"{config.data_seed}, the trunk's is {before.seed}: which windows of a source it has seen follows from it; set "
        )
        yield Problem("data.seed", f"{message}data.seed={before.seed}")
    if config.window_length != before.window_length:
        message = (
            f"gives windows of {config.window_length} tokens, the trunk's have {before.window_length}, in which repetition is "
        )
        yield Problem("train.sequence_length", f"{message}counted; keep it, or take the weights alone (checkpoint.init_from)")
    for name, source in config.data.sources.items():
        old = before.data.sources.get(name)
        for key in ("unique_tokens", "shift_windows", "where"):
            if old is not None and getattr(old, key) != getattr(source, key):
                message = (
                    f"was {getattr(old, key)} in the trunk and is {getattr(source, key)}; keep it, or name the source anew"
                )
                yield Problem(f"data.sources.{name}.{key}", message)


def _agrees(config: Config, before: _Before, samples: int) -> bool:
    """Whether the trunk's samples, up to number `samples`, are those that the configuration's own mixture begins with."""

    def prefix(data: DataConfig) -> list[Any] | None:
        schedule = _schedule(data, before.window_length)
        long_enough = schedule.samples is None or schedule.samples >= samples
        return schedule.describe_until(samples, list(data.sources)) if long_enough else None

    return prefix(config.data) == prefix(before.data)


def _schedule(data: DataConfig, length: int) -> Schedule:
    ratios = tuple(source.ratio or Fraction(0) for source in data.sources.values())
    return Schedule(phases_of(data, length) or [Phase(None, ratios)])


def _joined(config: Config, before: _Before, samples: int) -> DataConfig:
    """The trunk's phases up to its end, then the branch's, counted from there."""
    end = samples * before.window_length
    first = list(_cut(before, samples))
    used = {name for phase in first for name in _names(phase)}
    names = [*(name for name in before.data.sources if name in used), *config.data.sources]
    sources: Mapping[str, SourceConfig] = {**before.data.sources, **config.data.sources}
    then = [_moved(phase, config.data, end) for phase in config.data.phases or (PhaseConfig(),)]
    return config.data.model_copy(
        update={
            "sources": {name: sources[name].model_copy(update={"ratio": None}) for name in dict.fromkeys(names)},
            "phases": (*first, *then),
        }
    )


def _cut(before: _Before, samples: int) -> Iterator[PhaseConfig]:
    """The phases of the trunk's first samples, each with its ratios and its end."""
    data, length = before.data, before.window_length
    begin = 0
    for phase, until in zip(data.phases or (PhaseConfig(),), data.phase_ends or (None,), strict=True):
        if begin >= samples:
            return
        last = samples if until is None else min(samples, whole_samples(until, length))
        ramp = phase.ramp
        if ramp is not None and ramp.until is None:  # the line stays what it was, also where it is left
            ramp = ramp.model_copy(update={"until": until})
        yield PhaseConfig(until=last * length, ratios=None if ramp else data.phase_ratios(phase), ramp=ramp)
        begin = last


def _moved(phase: PhaseConfig, data: DataConfig, tokens: int) -> PhaseConfig:
    """A phase of the branch, counted from the trunk's begin in place of the branch's."""
    until = None if phase.until is None else phase.until + tokens
    ramp = phase.ramp
    if ramp is not None and ramp.until is not None:
        ramp = ramp.model_copy(update={"until": ramp.until + tokens})
    return PhaseConfig(tokens=phase.tokens, until=until, ratios=None if ramp else data.phase_ratios(phase), ramp=ramp)


def _names(phase: PhaseConfig) -> Iterator[str]:
    for ratios in [phase.ratios] if phase.ramp is None else [phase.ramp.start, phase.ramp.end]:
        yield from (name for name, ratio in (ratios or {}).items() if ratio)
