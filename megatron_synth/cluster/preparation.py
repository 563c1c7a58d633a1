"""`prepare --slurm`: an array whose tasks tokenize a share of the splits each, and a job that assembles the shards after them.

A task that loses its node, or comes to its time limit, goes back into the queue alone and goes on from its journal. When all
have ended, however that was, the last job does what is lacking and puts the output in its place.
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from megatron_synth.cluster import slurm, snapshot
from megatron_synth.cluster.sbatch import JobSpec, changed, interpreter, render, render_array, submit, submit_array
from megatron_synth.config.cluster import ClusterConfig
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import to_yaml
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.core.files import write_atomic
from megatron_synth.core.log import say
from megatron_synth.core.records import read_text
from megatron_synth.core.share import MAX_SHARES

JOBS = "slurm"
SHARES, ASSEMBLY = "shares", "assembly"


@dataclass(frozen=True)
class JobOptions:
    """tasks: of the array, each on a node. workers: processes of each; None: all cores. dry_run: print, submit nothing."""

    tasks: int
    workers: int | None
    cluster: ClusterConfig
    dry_run: bool


def submit_preparation(config: PrepareConfig, options: JobOptions) -> str | None:
    """Put the array and the job that assembles into the queue; says their numbers. The array's; None: nothing was submitted.

    Raises:
        UserError: a job works on the output already, or SLURM refuses. Nothing is left then.
    """
    if options.tasks > MAX_SHARES:
        raise UserError(f"--tasks: at most {MAX_SHARES:,}, found {options.tasks:,}")
    output = Path(config.output)
    folder = (_jobs_of(output) / datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]).resolve()
    tasks, last, commands = _specs(config, options, folder)
    if options.dry_run:
        _show(tasks, last, commands)
        return None
    for job, state in job_states(output).items():
        if state.active:
            raise UserError(
                f"{output}: job {job} of this output is {state.state} already, and goes on by itself; `scancel {job}` ends it, "
                "or choose another output"
            )
    folder.mkdir(parents=True)
    try:
        write_atomic(folder / "config.yaml", to_yaml(config))
        code = snapshot.take(folder / "code")
        array = submit_array(tasks, commands)
        try:
            assembly = submit(_after(last, array))
        except BaseException:
            slurm.cancel(array)
            raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    say(f"job {array} is in the queue: {options.tasks} shares of {output}, code {code}; job {assembly} then assembles it")
    say(f"  {folder}")
    say(f"  megatron-synth prepare {folder / 'config.yaml'} --status")
    say(f"  scancel {array} {assembly}    ends them; what is done is kept")
    return array


def _jobs_of(output: Path) -> Path:
    """The folder of an output's jobs: scripts, logs, and the package that they run. It stays beside the output."""
    return output.with_name(f"{output.name}.{JOBS}")


def job_states(output: Path) -> dict[str, slurm.JobState]:
    """What SLURM knows of the jobs that were submitted for an output, those of arrays by task."""
    files = sorted(_jobs_of(output).glob("*/*/job.id"))
    if not files or not slurm.available():
        return {}
    return slurm.states([read_text(file, 128).strip() for file in files])


def _specs(config: PrepareConfig, options: JobOptions, folder: Path) -> tuple[JobSpec, JobSpec, list[str]]:
    """The array, the job after it (without its dependency), and the commands of the tasks."""
    run = [interpreter(options.cluster), "-m", "megatron_synth", "prepare", str(folder / "config.yaml")]
    run += [] if options.workers is None else ["--workers", str(options.workers)]
    name = f"prepare-{Path(config.output).resolve().name}"

    def spec(part: str, command: tuple[str, ...] = ()) -> JobSpec:
        return JobSpec(
            name=name if part == SHARES else f"{name}-{part}",
            folder=folder / part,
            chdir=Path.cwd(),
            command=command,
            ranks_per_node=options.workers or 1,
            # without a number of workers a task takes all cores of its node
            cluster=changed(options.cluster, exclusive=options.workers is None or options.cluster.exclusive),
            mounts=(Path(config.output).resolve().parent, folder),
            code=folder / "code",
        )

    commands = [shlex.join([*run, "--share", f"{number}/{options.tasks}"]) for number in range(options.tasks)]
    return spec(SHARES), spec(ASSEMBLY, tuple(run)), commands


def _after(last: JobSpec, array: str) -> JobSpec:
    """The job, once all tasks of an array have ended, however that was."""
    options = (*last.cluster.sbatch, f"--dependency=afterany:{array}")
    return JobSpec(**{**vars(last), "cluster": changed(last.cluster, sbatch=options)})


def _show(tasks: JobSpec, last: JobSpec, commands: list[str]) -> None:
    scripts = {f"{SHARES}/array.sbatch": render_array(tasks, len(commands)), f"{ASSEMBLY}/train.sbatch": render(last)}
    for name, script in scripts.items():
        if slurm.available():
            say(f"{name}: {slurm.test(script)}")
        say(f"would be {tasks.folder.parent / name}:\n\n{script}")
    listed = "\n".join(f"  {command}" for command in commands)
    say(f"tasks of the array:\n{listed}\nnothing was submitted; the second job would wait for the first")
