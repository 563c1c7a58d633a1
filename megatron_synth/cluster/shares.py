"""Work in shares on SLURM: an array whose tasks do a share each, and a job after all of them.

The folder of the jobs has a folder for each time that the work was submitted, with its configuration and code, and in it one of
the array and one of the job after it. A task that loses its node, or comes to its time limit, goes back into the queue alone.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from megatron_synth.cluster import slurm, snapshot
from megatron_synth.cluster.sbatch import JobSpec, changed, render, render_array, submit, submit_array
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import to_yaml
from megatron_synth.core.files import write_atomic
from megatron_synth.core.log import say
from megatron_synth.core.records import read_text

JOBS = "slurm"
SHARES = "shares"


class Jobs(NamedTuple):
    """The array, the job after it (without its dependency), and the commands of the tasks."""

    tasks: JobSpec
    last: JobSpec
    commands: list[str]


def pair(common: JobSpec, command: Sequence[str], shares: int, last: str, *more: str) -> Jobs:
    """An array whose task K runs `command --share K/N`, and a job that runs `command` with more words after it.

    common: what both have, with the folder that theirs are in and the name of the array; the other's has `-<last>` besides.
    """
    commands = [shlex.join([*command, "--share", f"{number}/{shares}"]) for number in range(shares)]
    tasks = replace(common, folder=common.folder / SHARES, code=common.folder / "code")
    whole = replace(tasks, name=f"{common.name}-{last}", folder=common.folder / last, command=(*command, *more))
    return Jobs(tasks, whole, commands)


class Queued(NamedTuple):
    """Numbers of the array and of the job after it, and the commit of the code that they run."""

    array: str
    last: str
    code: str


def new_folder(jobs: Path) -> Path:
    """Where work that is submitted now has its scripts and logs: a name that nobody has yet. It is not made."""
    return (jobs / datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]).resolve()


def enqueue(jobs: Jobs, config: BaseModel, folder: Path) -> Queued:
    """Make the folder with the configuration and the code, and put both jobs into the queue.

    Raises:
        UserError: SLURM refuses, or the folder cannot be written. Nothing is left then.
    """
    folder.mkdir(parents=True)
    try:
        write_atomic(folder / "config.yaml", to_yaml(config))
        code = snapshot.take(folder / "code")
        array = submit_array(jobs.tasks, jobs.commands)
        try:
            last = submit(_after(jobs.last, array))
        except BaseException:
            slurm.cancel(array)
            raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Queued(array, last, code)


def _after(last: JobSpec, array: str) -> JobSpec:
    """The job, once all tasks of an array have ended, however that was: what then is lacking is done or told by it."""
    options = (*last.cluster.sbatch, f"--dependency=afterany:{array}")
    return replace(last, cluster=changed(last.cluster, sbatch=options))


def show(jobs: Jobs) -> None:
    """Say both scripts and the commands, as `--dry-run` does, and what SLURM thinks of them."""
    of_array, of_last = (
        f"{one.folder.name}/{script}" for one, script in ((jobs.tasks, "array.sbatch"), (jobs.last, "train.sbatch"))
    )
    scripts = {of_array: render_array(jobs.tasks, len(jobs.commands)), of_last: render(jobs.last)}
    for name, script in scripts.items():
        if slurm.available():
            say(f"{name}: {slurm.test(script)}")
        say(f"would be {jobs.tasks.folder.parent / name}:\n\n{script}")
    listed = "\n".join(f"  {command}" for command in jobs.commands)
    say(f"tasks of the array:\n{listed}\nnothing was submitted; the second job would wait for the first")


def job_states(jobs: Path) -> dict[str, slurm.JobState]:
    """What SLURM knows of the jobs that were submitted from a folder, those of arrays by task."""
    files = sorted(jobs.glob("*/*/job.id"))
    if not files or not slurm.available():
        return {}
    return slurm.states([read_text(file, 128).strip() for file in files])


def refuse_active(jobs: Path, output: str | Path) -> None:
    """Refuse a second array on an output.

    Raises:
        UserError: a job that was submitted from the folder has not ended.
    """
    for job, state in job_states(jobs).items():
        if state.active:
            raise UserError(
                f"{output}: job {job} of this output is {state.state} already, and goes on by itself; `scancel {job}` ends it, "
                "or choose another output"
            )
