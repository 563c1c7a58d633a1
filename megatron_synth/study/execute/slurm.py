"""A study as SLURM job arrays: one task is a pack of runs, which a node trains side by side.

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
from megatron_synth.study.execute.folder import Folder
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


def submit_array(study: Study, runs: Sequence[Run], folder: Folder, options: ArrayOptions) -> int:
    """Submit what is neither finished nor queued; says the job's id and how to watch it.

    Raises:
        UserError: a run needs more ranks than a node has, or SLURM refuses the job.
    """
    queued = queued_runs(folder)
    waiting = [run for run in runs if folder.state(run) not in ("done", "running") and run.name not in queued]
    say(f"{len(waiting)} of {len(runs)} runs to submit; the others are finished, running or queued")
    if not waiting:
        return EXIT_OK
    places = options.gpus_per_node or options.jobs or 1
    too_large = [run for run in waiting if run.ranks > places]
    if too_large:
        raise UserError(
            f"size {too_large[0].size} needs {too_large[0].ranks} ranks, a node has {places} (--gpus-per-node, or --jobs on "
            "CPUs): a study's run stays on one node; train larger ones with `megatron-synth submit`"
        )
    # a branch begins when its trunk's job has ended, whether that comes from this call or from one before
    branches = [run for run in waiting if not folder.may_begin(run)]
    first = [run for run in waiting if run not in branches]
    trunks = {run.trunk for run in branches}
    before = {queued[run.name] for run in runs if run.id in trunks and run.name in queued}
    if first:
        job = _submit(study, first, folder, options, places, ())
        before |= {job} if job and trunks & {run.id for run in first} else set()
    if branches:
        _submit(study, branches, folder, options, places, sorted(before))
    if not options.dry_run:
        say("watch it with: megatron-synth study status FILE --watch; submit again to retry what failed")
    return EXIT_OK


def _submit(
    study: Study, waiting: Sequence[Run], folder: Folder, options: ArrayOptions, places: int, after: Sequence[str]
) -> str | None:
    """Submit runs as one array, which begins when the jobs `after` have ended; its id, or None of a dry run."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    job_folder = (folder.slurm / stamp).resolve()
    packs = packed(waiting, places, options.nodes)
    (job_folder / "packs").mkdir(parents=True)
    commands = []
    for number, pack in enumerate(packs):
        names = job_folder / "packs" / f"{number}.txt"
        write_atomic(names, "".join(f"{run.name}\n" for run in pack))
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
        write_atomic(job_folder / "array.sbatch", render_array(spec, len(commands), options.nodes, after))
        say(f"{len(packs)} tasks written to {job_folder}; nothing was submitted")
        return None
    job = submit_to_queue(spec, commands, options.nodes, after)
    then = f" after job {', '.join(after)}" if after else ""
    say(
        f"submitted job {job}{then}: {len(waiting)} runs in {len(packs)} tasks, {options.nodes} at a time; logs in {job_folder}"
    )
    return job


def _command(folder: Folder, names: Path, places: int) -> str:
    """What a task runs. It reads the resolved study, so that later edits of the user's file do not reach it."""
    words = [sys.executable, "-m", "megatron_synth", "study", "submit", str(folder.study.resolve()), "--local"]
    words += ["--only", str(names), "--jobs", str(places)]
    return shlex.join(words)


def packed(runs: Sequence[Run], places: int, nodes: int) -> list[list[Run]]:
    """Runs in packs of about equal length: each pack keeps the `places` of a node busy, and every node gets some.

    The longest run goes first into the pack that has least, the classic rule for equal makespans (Graham 1969). There
    are as many packs as nodes, or more where packs would be larger than 16 rounds of a node's places: a task that is
    lost then costs less.
    """
    count = max(min(nodes, len(runs)), -(-len(runs) // (places * _ROUNDS)))
    packs: list[list[Run]] = [[] for _ in range(count)]
    load = [0.0] * count
    for run in sorted(runs, key=lambda run: -run.own_flops(1)):
        lightest = load.index(min(load))
        packs[lightest].append(run)
        load[lightest] += run.own_flops(1)
    return [pack for pack in packs if pack]


_ROUNDS = 16


def queued_runs(folder: Folder) -> dict[str, str]:
    """The runs in tasks that wait or run, by name, and the job of each."""
    jobs = {}
    for file in folder.slurm.glob(f"*/{JOB_FILE}"):
        jobs[file.read_text(encoding="utf-8").strip()] = file.parent
    names: dict[str, str] = {}
    for task, state in slurm.states(jobs).items() if jobs else ():
        job, _, number = task.partition("_")
        if state.active and job in jobs and number.isdecimal():
            pack = (jobs[job] / "packs" / f"{number}.txt").read_text(encoding="utf-8").split()
            names |= dict.fromkeys(pack, job)
    return names
