"""What it costs to get ranks running on SLURM nodes, without GPUs: from `sbatch` to ranks that have met."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_synth.cluster import sbatch, slurm
from megatron_synth.config.errors import EXIT_OK, UserError

_TIMEOUT_S = 300


@dataclass(frozen=True)
class Launch:
    """Seconds of one launch, in the order in which they pass."""

    nodes: int
    ranks: int
    sbatch: float
    """Until sbatch has answered, of which `--test-only` is a part."""
    first_up: float
    """From there until the first node's process runs: scheduling, the batch script, its record of the start, srun."""
    last_up: float
    """From there until the last node's process runs."""
    imported: float
    """From there until the last of them has imported torch."""
    met: float
    """From there until every rank has met all others in the store."""

    @property
    def total(self) -> float:
        """Until training could begin."""
        return self.sbatch + self.first_up + self.last_up + self.imported + self.met


def run_job(spec: sbatch.JobSpec, timeout_s: float) -> tuple[float, float, str]:
    """Submit a job and wait until it has ended. When it was begun to submit, when sbatch had answered, and the job's number.

    Raises:
        UserError: it did not end within `timeout_s`.
    """
    began = time.time()
    job = sbatch.submit(spec)
    submitted = time.time()
    while any(state.active for state in slurm.states([job]).values()):
        if time.time() - began > timeout_s:
            slurm.cancel(job)
            raise UserError(f"job {job} on {spec.nodes} nodes was not done within {timeout_s:g} s; see {spec.log}")
        time.sleep(0.2)
    return began, submitted, job


def measure(nodes: int, ranks_per_node: int, folder: Path, cluster: str | None) -> Launch:
    """Launch ranks that only meet. UserError if the job does not get that far."""
    spec = sbatch.JobSpec(
        "launch",
        folder=folder,
        chdir=folder.parent,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        cluster=sbatch.load_cluster(cluster),
        command=(sys.executable, str(Path(__file__).with_name("slurm_launch_node.py"))),
    )
    began, submitted, job = run_job(spec, _TIMEOUT_S)
    if not (folder / "times.json").is_file():
        raise UserError(f"job {job} on {nodes} nodes failed:\n{spec.log.read_text() if spec.log.is_file() else '(no log)'}")
    times = json.loads((folder / "times.json").read_text())
    first, last = (choose(entry["up"] for entry in times) for choose in (min, max))
    imported = max(max(entry["imported"] for entry in times), last)
    met = max(entry["met"] for entry in times)
    return Launch(
        nodes,
        nodes * ranks_per_node,
        sbatch=submitted - began,
        first_up=first - submitted,
        last_up=last - first,
        imported=imported - last,
        met=met - imported,
    )


def rows(launches: Sequence[Launch]) -> list[list[str]]:
    """Cells of the table, its head first."""
    head = [
        "nodes",
        "ranks",
        "sbatch, s",
        "first node up, s",
        "last node up, s",
        "torch imported, s",
        "ranks met, s",
        "total, s",
    ]
    cells = [
        [str(one.nodes), str(one.ranks)]
        + [f"{value:.2f}" for value in (one.sbatch, one.first_up, one.last_up, one.imported, one.met, one.total)]
        for one in launches
    ]
    return [head, *cells]


def main(argv: list[str]) -> int:
    """`python -m benchmarks launch`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks launch",
        description="Time from sbatch to ranks that have met, on SLURM nodes and without GPUs.",
        epilog="On a machine without SLURM: python -m tests.slurm.lab --nodes 16 -- python -m benchmarks launch",
    )
    parser.add_argument("--nodes", default="1,2,4,8,16", metavar="N,N,...", help="default 1,2,4,8,16")
    parser.add_argument("--ranks-per-node", type=int, default=8, metavar="R", help="default 8")
    parser.add_argument("--cluster", metavar="NAME", help="settings: configs/cluster/NAME.yaml, or a file.yaml")
    parser.add_argument("--shared", type=Path, default=Path(), metavar="DIR", help="a shared folder; default: this one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    options = parser.parse_args(argv)
    counts = options.nodes.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise UserError(f"--nodes: expected numbers of nodes with commas, found '{options.nodes}'")

    from megatron_synth.bench.tables import header, header_lines, markdown_table
    from megatron_synth.core.files import write_json
    from megatron_synth.core.log import say

    head = header("bench", ["launch", *argv])
    folder = Path(tempfile.mkdtemp(prefix=".launch.", dir=options.shared)).resolve()
    try:
        found = [measure(int(count), options.ranks_per_node, folder / count, options.cluster) for count in counts]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say("\n".join([*header_lines(head), "", *markdown_table(rows(found))]))
    if options.json is not None:
        write_json(options.json, {**head, "launches": [vars(one) | {"total": one.total} for one in found]})
    return EXIT_OK
