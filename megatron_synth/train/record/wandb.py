"""Weights & Biases: a mirror of metrics.jsonl that may fail without harm once training has begun.

An offline run writes its file late: a process that is killed leaves a part of its steps, or none. So a start notes in
wandb/start.json where it writes and from which step on, and at its end that it is whole. The next start puts a folder that is
not whole aside, as `unfinished-...`, and begins its own with those steps, from metrics.jsonl.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import EXIT_STOPPED, UserError
from megatron_synth.config.schema import WandbConfig
from megatron_synth.core.files import write_json

NOTE = "start.json"
"""File in a run's wandb folder: what the latest offline start wrote to, after which step, and whether it is whole."""

_EVALUATED = "eval/step"
"""Name on the server of the last step with an evaluation."""

logger = logging.getLogger(__name__)


class Tracker:
    """The tracker's run, or nothing where tracking is disabled. Only rank 0 has one that is not disabled."""

    def __init__(self, run: Any | None = None, note: Path | None = None, after_step: int = 0):
        """A started run.

        Args:
            run: wandb's; None tracks nothing.
            note: NOTE of an offline run.
            after_step: its file is to hold the steps after this one.
        """
        self._run, self._note, self._after_step = run, note, after_step
        self._sent = self._evaluated = -1
        """Online: the last step, and the last evaluated one, that wandb has from earlier starts."""

    @classmethod
    def start(
        cls,
        config: WandbConfig,
        run_dir: Path,
        run_id: str,
        run_config: Mapping[str, Any],
        name: str | None = None,
        *,
        step: int = 0,
    ) -> Tracker:
        """Start, or continue, the run `run_id`; its files go to `run_dir`/wandb.

        run_config: the resolved configuration, shown beside the run. name: display name if the config has none. step: the run
        goes on from here; `replay` then takes what is missing before.
        A restarted run with the same id continues the same run: online at once, offline when its parts are synced.
        UserError if tracking was asked for and cannot start: that must be fixed before hours are spent.
        """
        if config.mode == "disabled":
            return cls()
        hint = "fix it, or set log.wandb.mode to offline or disabled"
        if config.mode == "offline":
            hint = "fix it, or set log.wandb.mode to disabled"
        try:
            import wandb
        except ImportError as error:
            raise UserError(f"log.wandb.mode is {config.mode}, but wandb cannot be imported ({error}); {hint}") from error
        try:
            run = wandb.init(
                mode=config.mode,
                project=config.project,
                entity=config.entity,
                name=config.name or name or run_dir.resolve().name,
                tags=list(config.tags),
                dir=str(run_dir),
                id=run_id,
                resume="allow",
                config=dict(run_config),
                # our console is the console: wandb neither prints to it nor copies it
                settings=wandb.Settings(console="off", silent=True, init_timeout=60.0),
            )
            note = None
            if config.mode == "offline":
                note, step = run_dir / "wandb" / NOTE, _put_aside(run_dir / "wandb", step)
                write_json(note, {"folder": Path(run.dir).parent.name, "after_step": step, "whole": False})
            # The record's own step is the axis. wandb's counter only grows, and would drop the steps that a run which
            # crashed after its last checkpoint does again.
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
        except Exception as error:  # wandb documents no common base of what init raises
            raise UserError(f"log.wandb.mode is {config.mode}, but wandb did not start: {error}; {hint}") from error
        tracker = cls(run, note, step)
        if config.mode == "online":
            tracker._sent, tracker._evaluated = (_whole(run.summary.get(name)) for name in ("step", _EVALUATED))
        return tracker

    @property
    def active(self) -> bool:
        """Whether records still go anywhere."""
        return self._run is not None

    def log(self, record: Mapping[str, Any], step: int, *, evaluation: bool = False) -> None:
        """Mirror the record of `step`, or the evaluation that follows it. After a first failure: one warning, and nothing more.

        What an online run has had from a start that was killed after its last checkpoint is not sent again.
        """
        if self._run is None or step <= (self._evaluated if evaluation else self._sent):
            return
        values = {name: value for name, value in record.items() if value is not None}
        if evaluation:
            values[_EVALUATED] = step
        try:
            self._run.log(values | {"step": step})
        except Exception as error:  # whatever it is, it must not end the training
            self._give_up(f"logging step {step}", error)

    def replay(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Mirror those records of the steps before this start that no whole file holds."""
        if self._note is not None:
            for record in records:
                if record["step"] > self._after_step:
                    self.log(record, record["step"])

    def finish(self, exit_code: int) -> None:
        """Close the run; a run that was stopped on request is shown as preempted, not as failed."""
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            if exit_code == EXIT_STOPPED:
                run.mark_preempting()
            run.finish(exit_code=exit_code)
            if self._note is not None:
                write_json(self._note, json.loads(self._note.read_text()) | {"whole": True})
        except Exception as error:
            self._give_up("closing the run", error)

    def _give_up(self, while_doing: str, error: Exception) -> None:
        self._run = None
        logger.warning("wandb failed while %s (%s); training goes on without it, metrics.jsonl has it all", while_doing, error)


def _whole(value: Any) -> int:
    """A number of a run's summary on the server, which may hold anything."""
    return value if isinstance(value, int) else -1


def _put_aside(folder: Path, step: int) -> int:
    """Put the last start's folder aside if it is not whole; the step after which the steps are in no whole file."""
    try:
        note = json.loads((folder / NOTE).read_text())
        name, after_step, whole = str(note["folder"]), int(note["after_step"]), bool(note["whole"])
    except (OSError, ValueError, TypeError, KeyError):  # an older version's, or none: what it holds is not known
        return step
    if whole:
        return step
    path = folder / name
    if Path(name).name == name and name.startswith("offline-run-") and path.is_dir():
        path.rename(folder / f"unfinished-{name}")
    return min(step, after_step)
