"""`prepare --slurm`: an array whose tasks tokenize a share of the splits each, and a job that assembles the shards after them.

A task that loses its node, or comes to its time limit, goes back into the queue alone and goes on from its journal. When all
have ended, however that was, the last job does what is lacking and puts the output in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_synth.cluster import shares, slurm
from megatron_synth.cluster.sbatch import JobSpec, changed, interpreter
from megatron_synth.cluster.shares import JOBS, Jobs
from megatron_synth.config.cluster import ClusterConfig
from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.core.log import say
from megatron_synth.core.share import MAX_SHARES

ASSEMBLY = "assembly"


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
    folder = shares.new_folder(_jobs_of(output))
    jobs = _jobs(config, options, folder)
    if options.dry_run:
        shares.show(jobs)
        return None
    shares.refuse_active(_jobs_of(output), output)
    array, assembly, code = shares.enqueue(jobs, config, folder)
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
    return shares.job_states(_jobs_of(output))


def _jobs(config: PrepareConfig, options: JobOptions, folder: Path) -> Jobs:
    run = [interpreter(options.cluster), "-m", "megatron_synth", "prepare", str(folder / "config.yaml")]
    run += [] if options.workers is None else ["--workers", str(options.workers)]
    output = Path(config.output).resolve()
    common = JobSpec(
        name=f"prepare-{output.name}",
        folder=folder,
        chdir=Path.cwd(),
        ranks_per_node=options.workers or 1,
        # without a number of workers a task takes all cores of its node
        cluster=changed(options.cluster, exclusive=options.workers is None or options.cluster.exclusive),
        mounts=(output.parent, folder),
    )
    return shares.pair(common, run, options.tasks, ASSEMBLY)
