"""`python -m tests.faults.node_kills --train 20 --study 20`: whole nodes of a SLURM cluster lost, in runs and in studies.

A cluster of four nodes is started on this machine (`tests/slurm/lab.py`; it needs root and SLURM). A run on two of them, and a
study as an array over two, lose a node at moments drawn at random: its daemon and all that it started, with SIGKILL. Half of
the time the node is back before SLURM has missed it, as after a quick reboot. The job must go back into the queue and resume
by itself. It must end with the losses and the ledger of an untouched run, and with the results of an untouched study, to the
bit. Once the kills of a part are used up, what is left goes to its end. `--state FOLDER` keeps counts, so that the same
command goes on.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from megatron_synth.core.lock import holder
from megatron_synth.train.record.run_lock import LOCK
from tests.faults.tally import Tally
from tests.slurm.conftest import call, log_of, submit
from tests.slurm.lab import Lab, lab, missing
from tests.support import assert_same_losses, read_ledger, read_metrics, write_config, write_corpus, write_source
from tests.unit.study.test_study_run import opened
from tests.unit.study.test_study_run import write as write_study

_NODES = 4
_PART = 4
_STEPS = 300
_LIMIT_S = 900.0
_SETTINGS = (f"train.steps={_STEPS}", "checkpoint.interval=10", "log.interval=5", "train.lost_rank_timeout_s=10")
Round = Callable[[int, random.Random], Counter[str]]
"""Loses so many nodes, as drawn; what happened."""


def _hosts(cluster: Lab, job: str) -> list[str]:
    """Nodes that a job, or the tasks of an array, run on; the first of each has its script."""
    rows = cluster.run("squeue", "-h", "-t", "running", "-j", job, "-o", "%N", check=False).split()
    return [name for row in rows for name in cluster.run("scontrol", "show", "hostnames", row).split()]


def _active(cluster: Lab, job: str) -> bool:
    states = cluster.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").split()
    return any(state not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") for state in states)  # NODE_FAIL is passed through


def _lose(cluster: Lab, job: str, draw: random.Random, within_s: float) -> str | None:
    """Lose a node of a job some time from when it runs; how, or None: the job ended before."""
    cluster.wait("the job runs", lambda: bool(_hosts(cluster, job)) or not _active(cluster, job), _LIMIT_S)
    deadline = time.monotonic() + draw.uniform(0, within_s)
    while time.monotonic() < deadline and _active(cluster, job):
        time.sleep(0.2)
    hosts = _hosts(cluster, job)
    if not hosts:  # at its end, or back in the queue
        return _lose(cluster, job, draw, 0) if _active(cluster, job) else None
    place, quick = draw.randrange(len(hosts)), draw.random() < 0.5
    cluster.kill_node(hosts[place])
    is_down = "down"
    if not quick:
        cluster.wait(f"{hosts[place]} is missed", lambda: is_down in cluster.run("sinfo", "-h", "-n", hosts[place], "-o", "%T"))
    (cluster.folder / "start" / hosts[place]).touch()
    cluster.wait(f"{hosts[place]} is back", lambda: is_down not in cluster.run("sinfo", "-h", "-n", hosts[place], "-o", "%T"))
    print(
        f"{time.strftime('%X')} {hosts[place]}, number {place} of {hosts} of job {job}, back {'at once' if quick else 'late'}",
        flush=True,
    )
    return f"nodes lost, {'back at once' if quick else 'missed by SLURM'}"


def lose_nodes_of_runs(cluster: Lab, folder: Path) -> Round:
    """Nodes of a run of two nodes."""
    config = write_config(folder / "run.yaml", write_corpus(folder / "corpus"))
    whole, run = folder / "whole", folder / "lost"

    def begin(target: Path) -> str:
        return submit(cluster, config, target, *_SETTINGS, "--max-restarts", "1000").job

    def finished(job: str) -> None:
        assert cluster.state(job) == "COMPLETED", f"{cluster.state(job)}\n{log_of(run)[-4000:]}"
        assert "Traceback" not in log_of(run), log_of(run)[-4000:]
        assert_same_losses(read_metrics(run), read_metrics(whole), 0)
        assert read_ledger(run) == read_ledger(whole) and holder(run / LOCK) is None
        told = call(cluster, "status", str(run), "--json")
        assert told.code == 0 and '"state": "done"' in told.out, told
        shutil.rmtree(run)

    job = begin(whole)
    cluster.wait("the first run begins", lambda: bool(_hosts(cluster, job)))
    began = time.monotonic()
    cluster.wait("the untouched run", lambda: not _active(cluster, job), _LIMIT_S)
    took = time.monotonic() - began
    assert cluster.state(job) == "COMPLETED", log_of(whole)

    def lose(count: int, draw: random.Random) -> Counter[str]:
        happened, ends, job = Counter[str](), 0, begin(run)
        while happened.total() < count:
            how = _lose(cluster, job, draw, took)
            if how is not None:
                happened[how] += 1
                continue
            finished(job)
            ends += 1
            job = begin(run)
        cluster.wait("the end", lambda: not _active(cluster, job), _LIMIT_S)
        finished(job)
        return happened + Counter({"ends, losses and ledger to the bit": ends + 1})

    return lose


def lose_nodes_of_studies(cluster: Lab, folder: Path) -> Round:
    """Nodes of a study's array, two tasks at a time."""
    corpus = folder / "corpus"
    for seed, name in enumerate(("web", "qa")):
        write_source(corpus / name, seed, 20_000)
    write_source(corpus / "val", 9, 400)
    whole, file = write_study(corpus, folder / "whole"), write_study(corpus, folder / "lost")

    def begin(target: Path) -> str:
        asked = ("study", "submit", str(target), "--slurm", "--nodes", "2", "--gpus-per-node", "0")
        told = call(cluster, *asked)
        assert told.code == 0 and "submitted job" in told.out, told
        return told.out.split("submitted job ")[1].split(":")[0]

    def finished() -> bool:
        (ours, runs), (theirs, _) = opened(file), opened(whole)
        if {ours.state(run) for run in runs} != {"done"}:
            return False
        for run in runs:
            assert_same_losses(read_metrics(ours.run(run)), read_metrics(theirs.run(run)), 0)
        for log in (*ours.slurm.glob("*/task-*.log"), *(folder / "lost" / "logs").glob("*.log")):
            assert "Traceback" not in log.read_text(errors="replace"), log.read_text(errors="replace")[-4000:]
        shutil.rmtree(folder / "lost")
        return True

    job = begin(whole)
    cluster.wait("the first tasks", lambda: bool(_hosts(cluster, job)))
    began = time.monotonic()
    cluster.wait("the untouched study", lambda: not _active(cluster, job), _LIMIT_S)
    took = time.monotonic() - began

    def lose(count: int, draw: random.Random) -> Counter[str]:
        happened, ends, job = Counter[str](), 0, begin(file)
        while happened.total() < count:
            how = _lose(cluster, job, draw, took)
            if how is not None:
                happened[how] += 1
                continue
            ends += finished()
            job = begin(file)
        cluster.wait("the end", lambda: not _active(cluster, job), _LIMIT_S)
        assert finished(), call(cluster, "study", "status", str(file)).out
        return happened + Counter({"ends, all losses to the bit": ends + 1})

    return lose


def main(argv: list[str]) -> int:
    """Run the campaign; an AssertionError tells what did not survive."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.node_kills", description=__doc__)
    parts = {"train": lose_nodes_of_runs, "study": lose_nodes_of_studies}
    for name in parts:
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path, help="folder that keeps what is done, to go on")
    options = parser.parse_args(argv)
    reason = missing()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    for name, prepared in parts.items():
        tally = Tally(options.state and options.state / f"nodes-{name}.jsonl", options.seed)
        count: int = getattr(options, name)
        if next(tally.missing(count, _PART), None) is None:
            continue
        folder, began = Path(tempfile.mkdtemp(prefix=f"nodes-{name}-")), time.monotonic()
        with lab(_NODES, slurmd_timeout=5) as cluster:
            work = prepared(cluster, folder)
            tally.run(count, _PART, lambda seed, number, work=work: work(number, random.Random(seed)))  # type: ignore[misc]
        print(f"{name}, in {(time.monotonic() - began) / 60:.0f} min: {tally.text()}", flush=True)
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
