"""`prepare duplicates --slurm`: an array whose tasks gather a share each, and a job that compares what all have gathered."""

from __future__ import annotations

from pathlib import Path

from megatron_synth.cluster import shares
from megatron_synth.cluster.sbatch import JobSpec, interpreter
from megatron_synth.cluster.shares import JOBS, Jobs
from megatron_synth.config.cluster import ClusterConfig
from megatron_synth.config.errors import UserError
from megatron_synth.config.section import Section
from megatron_synth.core.log import say
from megatron_synth.core.share import MAX_SHARES

COMPARISON = "comparison"
REPORT = "report.json"


class Comparison(Section):
    """What is compared, and where shares put what they gather."""

    folders: tuple[str, ...]
    """Prepared sources."""
    work: str
    """A folder that all nodes see."""
    shingle: int
    threshold: float
    ngram: int
    part_mib: int
    json_file: str
    """Where the report goes."""


def submit_comparison(asked: Comparison, tasks: int, cluster: ClusterConfig, *, dry_run: bool) -> str | None:
    """Put the array and the job that compares into the queue; says their numbers. The array's; None: nothing was submitted.

    Raises:
        UserError: a job works in the folder already, or SLURM refuses. Nothing is left then.
    """
    if tasks > MAX_SHARES:
        raise UserError(f"--tasks: at most {MAX_SHARES:,}, found {tasks:,}")
    work = Path(asked.work)
    beside = work.with_name(f"{work.name}.{JOBS}")
    folder = shares.new_folder(beside)
    jobs = _jobs(asked, tasks, cluster, folder)
    if dry_run:
        shares.show(jobs)
        return None
    shares.refuse_active(beside, work)
    array, last, code = shares.enqueue(jobs, asked, folder)
    say(f"job {array} is in the queue: {tasks} shares in {work}, code {code}; job {last} then writes {asked.json_file}")
    say(f"  {folder}")
    say(f"  scancel {array} {last}    ends them; shares that are done are kept")
    return array


def _jobs(asked: Comparison, tasks: int, cluster: ClusterConfig, folder: Path) -> Jobs:
    run = [interpreter(cluster), "-m", "megatron_synth", "prepare", "duplicates", *asked.folders, "--work", asked.work]
    run += ["--shingle", str(asked.shingle), "--threshold", repr(asked.threshold), "--ngram", str(asked.ngram)]
    run += ["--part-mib", str(asked.part_mib)]
    common = JobSpec(
        name=f"duplicates-{Path(asked.work).name}",
        folder=folder,
        chdir=Path.cwd(),
        cluster=cluster,
        mounts=(Path(asked.work).parent, folder, *(Path(one) for one in asked.folders), Path(asked.json_file).parent),
    )
    return shares.pair(common, run, tasks, COMPARISON, "--json", asked.json_file)
