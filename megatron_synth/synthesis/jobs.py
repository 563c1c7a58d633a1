"""`synthesize run --slurm`: an array whose tasks answer a share each, with an engine on every node, and a job that judges.

A task runs `synthesize run --share K/N` on its node: the engine of the file, or a server that it starts there on the loopback,
and the client beside it. Tasks share nothing but the folder of answers, so one that loses its node, or comes to its time limit,
goes back into the queue alone and asks what is left. When all have ended, a job without GPUs makes the corpus.
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
from megatron_synth.core.files import write_atomic
from megatron_synth.core.lock import refuse_alive
from megatron_synth.core.log import say
from megatron_synth.core.records import read_text
from megatron_synth.synthesis.filters.base import Filters
from megatron_synth.synthesis.recombined import extraction, is_extracted
from megatron_synth.synthesis.run import LOCK
from megatron_synth.synthesis.setup import Setup
from megatron_synth.synthesis.shares import MAX_SHARES, Share
from megatron_synth.synthesis.synthesis_file import SynthesisConfig

JOBS = "slurm"
SHARES = "shares"
JUDGE = "judge"


@dataclass(frozen=True)
class JobOptions:
    """nodes: tasks of the array, each on a node. gpus_per_node: 0 for CPUs. dry_run: print the scripts, submit nothing."""

    nodes: int
    gpus_per_node: int
    cluster: ClusterConfig
    dry_run: bool


def submit_synthesis(config: SynthesisConfig, options: JobOptions) -> str | None:
    """Put the array and the job that judges into the queue; says their numbers. The array's; None if nothing was submitted.

    Raises:
        UserError: the file is wrong, a run or a job works on the output already, or SLURM refuses. Nothing is left then.
    """
    if config.walks is not None and not is_extracted(config):
        config = extraction(config)
        say(f"the concepts of the parents come first, in {config.output}; give the same command again when they are there")
    _check_nodes(config, options)
    setup = Setup.of(config, export=not options.dry_run)
    setup.warn()
    setup.check_key()
    Filters(config.filters)
    folder = (config.folder / JOBS / datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]).resolve()
    tasks, judge, commands = _specs(config, options, folder)
    if options.dry_run:
        _show(tasks, judge, commands)
        return None
    _refuse_second(config)
    folder.mkdir(parents=True)
    try:
        write_atomic(folder / "config.yaml", to_yaml(config))
        code = snapshot.take(folder / "code")
        array = submit_array(tasks, commands)
        try:
            last = submit(_after(judge, array))
        except BaseException:
            slurm.cancel(array)
            raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    say(
        f"job {array} is in the queue: {options.nodes} shares of {config.output}, code {code}; job {last} then makes the corpus"
    )
    say(f"  {folder}")
    say(f"  megatron-synth synthesize status {folder / 'config.yaml'}")
    say(f"  scancel {array} {last}    ends them; what was answered is kept")
    return array


def _check_nodes(config: SynthesisConfig, options: JobOptions) -> None:
    if options.nodes > MAX_SHARES:
        raise UserError(f"--nodes: at most {MAX_SHARES:,}, found {options.nodes:,}")
    engine = config.engine
    wanted = engine.copies * engine.tensor_parallel_size
    if engine.name == "vllm" and options.gpus_per_node and wanted != options.gpus_per_node:
        raise UserError(
            f"engine: copies x tensor_parallel_size is {engine.copies} x {engine.tensor_parallel_size}, a node has "
            f"{options.gpus_per_node} GPUs (--gpus-per-node): set engine.copies so that all are used, and no more"
        )


def _specs(config: SynthesisConfig, options: JobOptions, folder: Path) -> tuple[JobSpec, JobSpec, list[str]]:
    """The array, the job after it (without its dependency), and the commands of the tasks."""
    run = (interpreter(options.cluster), "-m", "megatron_synth", "synthesize", "run", str(folder / "config.yaml"))
    name = f"synthesize-{config.folder.resolve().name}"
    mounts = (config.folder.resolve(), folder)

    def spec(part: str, gpus: int, command: tuple[str, ...] = ()) -> JobSpec:
        return JobSpec(
            name=name if part == SHARES else f"{name}-{part}",
            folder=folder / part,
            chdir=Path.cwd(),
            command=command,
            ranks_per_node=max(gpus, 1),
            gpus_per_node=gpus,
            # a server takes the GPUs, or all cores, of its node
            cluster=changed(options.cluster, exclusive=True) if part == SHARES else options.cluster,
            mounts=mounts,
            code=folder / "code",
        )

    shares = [Share(number, options.nodes) for number in range(options.nodes)]
    commands = [shlex.join([*run, "--share", f"{share.number}/{share.of}"]) for share in shares]
    return spec(SHARES, options.gpus_per_node), spec(JUDGE, 0, (*run, "--judge")), commands


def _after(judge: JobSpec, array: str) -> JobSpec:
    """The job, once all tasks of an array have ended, however that was: what then has no answer is told by it."""
    options = (*judge.cluster.sbatch, f"--dependency=afterany:{array}")
    return JobSpec(**{**vars(judge), "cluster": changed(judge.cluster, sbatch=options)})


def _show(tasks: JobSpec, judge: JobSpec, commands: list[str]) -> None:
    scripts = {f"{SHARES}/array.sbatch": render_array(tasks, len(commands)), f"{JUDGE}/train.sbatch": render(judge)}
    for name, script in scripts.items():
        if slurm.available():
            say(f"{name}: {slurm.test(script)}")
        say(f"would be {tasks.folder.parent / name}:\n\n{script}")
    listed = "\n".join(f"  {command}" for command in commands)
    say(f"tasks of the array:\n{listed}\nnothing was submitted; the second job would wait for the first")


def _refuse_second(config: SynthesisConfig) -> None:
    """Two jobs on one output would ask the same."""
    refuse_alive(config.folder / LOCK)
    for job, state in job_states(config).items():
        if state.active:
            raise UserError(
                f"{config.output}: job {job} of this output is {state.state} already, and goes on by itself; "
                f"`scancel {job}` ends it, or choose another output"
            )


def job_states(config: SynthesisConfig) -> dict[str, slurm.JobState]:
    """What SLURM knows of the jobs that were submitted for an output, those of arrays by task."""
    files = sorted((config.folder / JOBS).glob("*/*/job.id"))
    if not files or not slurm.available():
        return {}
    return slurm.states([read_text(file, 128).strip() for file in files])
