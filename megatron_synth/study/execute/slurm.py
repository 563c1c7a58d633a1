"""A study as SLURM job arrays: one task is a pack of runs, which a node trains side by side.

Where the study makes corpora, there is an array for each stage: the runs whose models write, the corpora, the runs that read
them. Each begins when all tasks of the one before have ended, however they ended; what lacks something then is left to the next
submit.

A task runs `study submit --local` on its node for the runs in its file. One that ends with failed runs, or with a lost node,
is requeued by the rules of every job (`cluster/verdict.py`), and so tries them again, on another node if need be; what is
finished is skipped. What still fails then is tried again by the next submit.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from megatron_synth.cluster import slurm
from megatron_synth.cluster.sbatch import JobSpec, changed, load_cluster, render_array
from megatron_synth.cluster.sbatch import submit_array as submit_to_queue
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.core.files import write_atomic
from megatron_synth.core.log import say
from megatron_synth.study.execute.folder import Folder, Job
from megatron_synth.study.plan.corpora import Corpus, stage_of
from megatron_synth.study.plan.runs import Run
from megatron_synth.study.plan.study_file import Study

JOB_FILE = "job.id"


@dataclass(frozen=True)
class ArrayOptions:
    """Where the jobs of a study run.

    nodes: that the array uses at a time.
    gpus_per_node: 0 for CPUs.
    jobs: runs at a time on a node of CPUs; None for one.
    cluster: file of configs/cluster/, or None.
    dry_run: write the scripts, submit nothing.
    """

    nodes: int
    gpus_per_node: int
    jobs: int | None
    cluster: str | None
    dry_run: bool


def submit_array(study: Study, jobs: Sequence[Job], folder: Folder, options: ArrayOptions) -> int:
    """Submit what is neither finished nor queued; says the ids of the jobs and how to watch them.

    Raises:
        UserError: a run needs more ranks than a node has, or SLURM refuses the job.
    """
    queued = queued_jobs(folder)
    names = {name for of_array in queued.values() for name in of_array}
    waiting = [job for job in jobs if folder.state(job) not in ("done", "running") and job.name not in names]
    what = "runs and corpora" if any(isinstance(job, Corpus) for job in jobs) else "runs"
    say(f"{len(waiting)} of {len(jobs)} {what} to submit; the others are finished, running or queued")
    if not waiting:
        return EXIT_OK
    places = options.gpus_per_node or options.jobs or 1
    too_large = [job for job in waiting if isinstance(job, Run) and job.ranks > places]
    if too_large:
        raise UserError(
            f"size {too_large[0].size} needs {too_large[0].ranks} ranks, a node has {places} (--gpus-per-node, or --jobs on "
            "CPUs): a study's run stays on one node; train larger ones with `megatron-synth submit`"
        )
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    before = sorted(queued)
    for number, members in enumerate(_stages(waiting, folder)):
        job_folder = (folder.slurm / (stamp if not number else f"{stamp}-{number}")).resolve()
        waits = number or stage_of(members[0]) or _waits_for_trunk(members[0], folder)
        job = _submit_stage(study, members, folder, options, job_folder, before if waits else ())
        if job is not None:
            before.append(job)
    if not options.dry_run:
        say("watch it with: megatron-synth study status FILE --watch; submit again to retry what failed")
    return EXIT_OK


def _stages(jobs: Sequence[Job], folder: Folder) -> list[list[Job]]:
    """Jobs that need nothing of each other, in stages: runs, their branches, corpora that models write, what reads these."""
    stages: dict[tuple[int, bool, bool], list[Job]] = {}
    for job in jobs:
        # a corpus of the models of stage k is read by the runs of stage k + 1
        stages.setdefault((stage_of(job), isinstance(job, Corpus), _waits_for_trunk(job, folder)), []).append(job)
    return [stages[key] for key in sorted(stages)]


def _waits_for_trunk(job: Job, folder: Folder) -> bool:
    """Whether a job branches from a step that its trunk has yet to come to."""
    return isinstance(job, Run) and not folder.may_begin(job)


def _submit_stage(
    study: Study, members: Sequence[Job], folder: Folder, options: ArrayOptions, job_folder: Path, before: Sequence[str]
) -> str | None:
    """Submit one array, which begins when those in `before` have ended; its id, None where nothing is submitted."""
    places = options.gpus_per_node or options.jobs or 1
    packs = packed(members, places, options.nodes)
    (job_folder / "packs").mkdir(parents=True)
    commands = []
    for number, pack in enumerate(packs):
        names = job_folder / "packs" / f"{number}.txt"
        write_atomic(names, "".join(f"{job.name}\n" for job in pack))
        commands.append(_command(folder, names, places))
    # a pack is made to fill its node: two on one node would halve the speed of both
    cluster = changed(load_cluster(options.cluster), exclusive=True)
    spec = JobSpec(
        name=f"study-{study.name}",
        folder=job_folder,
        chdir=Path.cwd(),
        ranks_per_node=places,
        gpus_per_node=options.gpus_per_node,
        cluster=cluster,
    )
    if options.dry_run:
        # the folder then holds no job: submitting for good makes one of its own
        write_atomic(job_folder / "commands.txt", "".join(f"{command}\n" for command in commands))
        write_atomic(job_folder / "array.sbatch", render_array(spec, len(commands), options.nodes, before))
        say(f"{len(packs)} tasks written to {job_folder}; nothing was submitted")
        return None
    job = submit_to_queue(spec, commands, options.nodes, before)
    what = "corpora" if isinstance(members[0], Corpus) else "runs"
    after = f" after job {', '.join(before)}" if before else ""
    tasks = f"{len(packs)} tasks, {options.nodes} at a time"
    say(f"submitted job {job}{after}: {len(members)} {what} in {tasks}; logs in {job_folder}")
    return job


def _command(folder: Folder, names: Path, places: int) -> str:
    """What a task runs. It reads the resolved study, so that later edits of the user's file do not reach it."""
    words = [sys.executable, "-m", "megatron_synth", "study", "submit", str(folder.study.resolve()), "--local"]
    words += ["--only", str(names), "--jobs", str(places)]
    return shlex.join(words)


def packed(runs: Sequence[Job], places: int, nodes: int) -> list[list[Job]]:
    """Runs, or corpora, in packs of about equal length: each pack keeps the `places` of a node busy, and every node gets some.

    The longest run goes first into the pack that has least, the classic rule for equal makespans (Graham 1969). There
    are as many packs as nodes, or more where packs would be larger than 16 rounds of a node's places: a task that is
    lost then costs less.
    """
    count = max(min(nodes, len(runs)), -(-len(runs) // (places * _ROUNDS)))
    packs: list[list[Job]] = [[] for _ in range(count)]
    load = [0.0] * count
    for run in sorted(runs, key=lambda run: -_length(run)):
        lightest = load.index(min(load))
        packs[lightest].append(run)
        load[lightest] += _length(run)
    return [pack for pack in packs if pack]


def _length(job: Job) -> float:
    """What packs are evened out by. How long a corpus takes is not known, so that all count alike."""
    return 1.0 if isinstance(job, Corpus) else job.own_flops(1)


_ROUNDS = 16


def queued_runs(folder: Folder) -> set[str]:
    """Names of the runs and corpora in tasks that wait or run."""
    return {name for names in queued_jobs(folder).values() for name in names}


def queued_jobs(folder: Folder) -> dict[str, set[str]]:
    """The same by the id of the array."""
    jobs = {}
    for file in folder.slurm.glob(f"*/{JOB_FILE}"):
        jobs[file.read_text(encoding="utf-8").strip()] = file.parent
    names: dict[str, set[str]] = {}
    for task, state in slurm.states(jobs).items() if jobs else ():
        job, _, number = task.partition("_")
        if state.active and job in jobs and number.isdecimal():
            pack = (jobs[job] / "packs" / f"{number}.txt").read_text(encoding="utf-8").split()
            names.setdefault(job, set()).update(pack)
    return names
