"""`doctor` and a launch on hundreds of SLURM nodes that are one machine: all of it but what imports torch on a node.

SLURM, the batch script, srun and what reads their answers are real. In place of a node's Python stands a small program that
answers as `megatron_synth.cluster.probe` does, with made-up rates, one of them too low; of a launch each node only says that it
is up. What torch and a network would cost is not in the figures.

    python -m benchmarks.scale.nodes -m megatron_synth.cluster.probe node|ranks ...     # as srun starts it
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SLOW_NODE = 7
WAIT_S = 600
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Nodes:
    """Seconds of `doctor`, of reading and judging its answers alone, and of a launch until all nodes' processes run."""

    nodes: int
    doctor_s: float
    judged_s: float
    found: int
    """Things that were said to be wrong; one was planted."""
    lines: int
    """Lines that `doctor` printed."""
    submit_s: float
    first_up_s: float
    last_up_s: float


def node_answer(number: int, name: str, *, shared: bool) -> dict[str, object]:
    """What a node says of itself."""
    rate = 100.0 if number == SLOW_NODE else 700.0
    device = {"name": "NVIDIA H100", "gemm_tflops": rate, "peak_share": rate / 989, "copy_gb_s": 50.0}
    rates = {"disk_mb_s": 900.0, "scratch_mb_s": 2000.0}
    return {"node": name, "versions": {"torch": "2"}, "driver": "550", "devices": [device] * 8, **rates, "shared": shared}


def together_answer(nodes: int, ranks: int) -> dict[str, object]:
    """What rank 0 says of all."""
    pairs = [[node, (node + 1) % nodes, 40.0] for node in range(nodes)]
    names = [f"node{number}" for number in range(1, nodes + 1)]
    times = {"clocks": [0.0] * nodes, "round_trip_s": [1e-4] * nodes}
    return {"nodes": names, "backend": "nccl", "ranks": ranks, "all_reduce_gb_s": 300.0, "pairs": pairs, **times}


def answer(argv: Sequence[str]) -> None:
    """Stand in for the probe on a node."""
    what = argv[2]
    if what == "node":
        folder = Path(argv[argv.index("--shared") + 1])
        shared = (folder / "token").read_text() == argv[argv.index("--token") + 1]
        found = node_answer(int(os.environ["SLURM_NODEID"]), os.environ["SLURMD_NODENAME"], shared=shared)
        _print(found)
    elif os.environ["SLURM_PROCID"] == "0":
        ranks = int(os.environ["SLURM_NTASKS"])
        _print(together_answer(int(os.environ["SLURM_NNODES"]), ranks))


def _print(found: dict[str, object]) -> None:
    """As the probe does; its module is too much to load so many times."""
    text, name = json.dumps(found), os.urandom(8).hex()
    pieces = [text[at : at + 800] for at in range(0, len(text), 800)]
    print("\n".join(f"PROBE {name} {number} {len(pieces)} {piece}" for number, piece in enumerate(pieces)), flush=True)


def measure(nodes: int, shared: Path) -> Nodes:
    """Run both on so many nodes.

    Raises:
        UserError: SLURM does not start the job.
    """
    from megatron_synth.cluster.diagnosis import diagnose

    names = [f"node{number}" for number in range(1, nodes + 1)]
    began = time.perf_counter()
    answers = [json.loads(json.dumps(node_answer(number, name, shared=True))) for number, name in enumerate(names)]
    findings = diagnose(names, answers, json.loads(json.dumps(together_answer(nodes, nodes))))
    judged = time.perf_counter() - began
    folder = Path(tempfile.mkdtemp(prefix=".nodes.", dir=shared)).resolve()
    try:
        doctor_s, lines = _doctor(nodes, folder)
        return Nodes(nodes, doctor_s, judged, len(findings), lines, *_launch(nodes, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _doctor(nodes: int, folder: Path) -> tuple[float, int]:
    """Seconds of `doctor`, and lines that it printed."""
    from megatron_synth.config.errors import UserError

    stand_in = folder / "python"
    stand_in.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -S -m benchmarks.scale.nodes "$@"\n')
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    cluster = folder / "cluster.yaml"
    cluster.write_text(json.dumps({"python": str(stand_in)}))
    command = [sys.executable, "-m", "megatron_synth", "doctor", "--nodes", str(nodes), "--ranks-per-node", "1"]
    command += ["--cluster", str(cluster), "--shared", str(folder), "--timeout", str(WAIT_S)]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if f"node{SLOW_NODE + 1}: " not in done.stdout:
        raise UserError(
            f"doctor on {nodes} nodes did not find the slow one, exit code {done.returncode}:\n{done.stdout[-2000:]}"
        )
    return time.perf_counter() - began, len(done.stdout.splitlines())


def _launch(nodes: int, folder: Path) -> tuple[float, float, float]:
    """Seconds until sbatch has answered; from there until the first node's process runs; from there until the last one's."""
    from benchmarks.slurm_launch import run_job
    from megatron_synth.cluster import sbatch
    from megatron_synth.config.errors import UserError

    up = folder / "up"
    up.mkdir()
    command = ("bash", "-c", f"date +%s.%N > {up}/.$SLURM_NODEID; mv {up}/.$SLURM_NODEID {up}/$SLURM_NODEID")
    spec = sbatch.JobSpec("nodes", folder=folder / "job", chdir=folder, nodes=nodes, ranks_per_node=1, command=command)
    began, submitted, job = run_job(spec, WAIT_S)
    times = [float(file.read_text()) for file in up.glob("[0-9]*")]
    if len(times) != nodes:
        raise UserError(f"job {job}: {len(times)} of {nodes} nodes came up:\n{spec.log.read_text()[-2000:]}")
    return submitted - began, min(times) - submitted, max(times) - min(times)


def rows(results: Sequence[Nodes]) -> list[list[str]]:
    """The table, head first."""
    head = ["nodes", "doctor, s", "lines printed", "answers judged, s", "found", "sbatch, s", "first node up, s"]
    table = [[*head, "last node up, s"]]
    for one in results:
        cells = [f"{one.doctor_s:.1f}", str(one.lines), f"{one.judged_s:.3f}", str(one.found)]
        table.append([str(one.nodes), *cells, *(f"{value:.1f}" for value in (one.submit_s, one.first_up_s, one.last_up_s))])
    return table


if __name__ == "__main__":
    answer(sys.argv[1:])
