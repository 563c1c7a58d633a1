"""`synthesize run --slurm`: an array whose tasks answer a share each, with an engine on every node, and a job that judges.

A task runs `synthesize run --share K/N` on its node: the engine of the file, or a server that it starts there on the loopback,
and the client beside it. Tasks share nothing but the folder of answers, so one that loses its node, or comes to its time limit,
goes back into the queue alone and asks what is left. When all have ended, a job without GPUs makes the corpus.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_synth.cluster import shares, slurm
from megatron_synth.cluster.sbatch import JobSpec, changed, interpreter
from megatron_synth.cluster.shares import JOBS, Jobs
from megatron_synth.config.cluster import ClusterConfig
from megatron_synth.config.errors import UserError
from megatron_synth.core.lock import refuse_alive
from megatron_synth.core.log import say
from megatron_synth.core.share import MAX_SHARES
from megatron_synth.synthesis.filters.base import Filters
from megatron_synth.synthesis.recombined import extraction, is_missing
from megatron_synth.synthesis.run import LOCK
from megatron_synth.synthesis.setup import Setup
from megatron_synth.synthesis.synthesis_file import SynthesisConfig

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
    if is_missing(config):
        config = extraction(config)
        say(f"the concepts of the parents come first, in {config.output}; give the same command again when they are there")
    _check_nodes(config, options)
    setup = Setup.of(config, export=not options.dry_run)
    setup.warn()
    setup.check_key()
    Filters(config.filters)
    folder = shares.new_folder(config.folder / JOBS)
    jobs = _jobs(config, options, folder)
    if options.dry_run:
        shares.show(jobs)
        return None
    refuse_alive(config.folder / LOCK)  # two on one output would ask the same
    shares.refuse_active(config.folder / JOBS, config.output)
    array, last, code = shares.enqueue(jobs, config, folder)
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


def _jobs(config: SynthesisConfig, options: JobOptions, folder: Path) -> Jobs:
    run = (interpreter(options.cluster), "-m", "megatron_synth", "synthesize", "run", str(folder / "config.yaml"))
    output, gpus = config.folder.resolve(), options.gpus_per_node
    common = JobSpec(
        name=f"synthesize-{output.name}",
        folder=folder,
        chdir=Path.cwd(),
        cluster=options.cluster,
        mounts=(output, folder),
    )
    jobs = shares.pair(common, run, options.nodes, JUDGE, "--judge")
    # a server takes the GPUs, or all cores, of its node
    whole_node = changed(options.cluster, exclusive=True)
    return jobs._replace(tasks=replace(jobs.tasks, ranks_per_node=max(gpus, 1), gpus_per_node=gpus, cluster=whole_node))


def job_states(config: SynthesisConfig) -> dict[str, slurm.JobState]:
    """What SLURM knows of the jobs that were submitted for an output, those of arrays by task."""
    return shares.job_states(config.folder / JOBS)
