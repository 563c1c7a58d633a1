"""`megatron-synth doctor [--nodes N]`: look at the machines before a long run does."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_synth.cli.options.types import count, count_or_zero, on_disk
from megatron_synth.cluster import sbatch, slurm
from megatron_synth.cluster.diagnosis import Finding, diagnose
from megatron_synth.cluster.probe import read_answers
from megatron_synth.config.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from megatron_synth.core.log import say

EXIT_FOUND = 1
SHOWN_NODES = 32
"""Of more nodes those alone are shown with which something is wrong."""
SLOWEST_PAIRS = 4
_MODULE = ("-m", "megatron_synth.cluster.probe")


def main(argv: list[str]) -> int:
    """Measure, print a table and what is wrong. Returns 0 when nothing is, 1 otherwise."""
    options = parser().parse_args(argv)
    cluster = sbatch.changed(
        sbatch.load_cluster(options.cluster), partition=options.partition, account=options.account, qos=options.qos
    )
    if not options.shared.is_dir():
        raise UserError(f"--shared: {options.shared} is not a folder")
    if options.nodes is not None and "SLURM_JOB_ID" not in os.environ:
        return _inside_an_allocation(options, cluster, argv)
    shared = Path(tempfile.mkdtemp(prefix=".doctor.", dir=options.shared)).resolve()
    shared.chmod(0o755)
    try:
        return _examine(options, cluster, shared)
    finally:
        shutil.rmtree(shared, ignore_errors=True)


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth doctor",
        description="Versions, devices and their rates, disks, clocks and the network: of this machine, or of SLURM nodes. "
        "Names what is wrong and where. Inside a SLURM allocation its nodes are examined, otherwise some are asked for.",
    )
    parser.add_argument("--nodes", type=count, metavar="N", help="SLURM nodes; default: this machine alone")
    parser.add_argument(
        "--gpus-per-node", type=count_or_zero, metavar="G", help="default: the cluster's, else those of this machine"
    )
    parser.add_argument(
        "--ranks-per-node", type=count, metavar="R", help="ranks in the network test; default: one per GPU, or 1"
    )
    parser.add_argument("--cluster", metavar="NAME", help="settings: configs/cluster/NAME.yaml, or a file.yaml")
    for option in ("partition", "account", "qos"):
        parser.add_argument(f"--{option}", help=f"the cluster's `{option}`")
    parser.add_argument("--shared", type=on_disk, default=Path(), metavar="DIR", help="a shared folder; default: this one")
    parser.add_argument("--disk-mib", type=count, default=256, help="size of the files that are written; default 256")
    parser.add_argument("--timeout", type=count, default=180, metavar="S", help="for each of the two parts; default 180")
    parser.add_argument("--json", action="store_true", help="all that was measured, for programs")
    return parser


def _inside_an_allocation(options: argparse.Namespace, cluster: Any, argv: Sequence[str]) -> int:
    command = ["salloc", f"--nodes={options.nodes}", "--ntasks-per-node=1", "--job-name=doctor", "--time=15", "--quiet"]
    asked = {"partition": cluster.partition, "account": cluster.account, "qos": cluster.qos, "mem": cluster.mem}
    command += [f"--{name}={value}" for name, value in asked.items() if value is not None]
    gpus = options.gpus_per_node if options.gpus_per_node is not None else cluster.gpus_per_node
    if gpus:
        command.append(f"--gpus-per-node={cluster.gpu_type + ':' if cluster.gpu_type else ''}{gpus}")
    if cluster.exclusive:
        command.append("--exclusive")
    command += [*cluster.sbatch, sys.executable, "-m", "megatron_synth", "doctor", *argv]
    if not slurm.available() or shutil.which("salloc") is None:
        raise UserError("--nodes: salloc not found; this needs a machine from which SLURM jobs are submitted")
    return subprocess.call(command)


def _examine(options: argparse.Namespace, cluster: Any, shared: Path) -> int:
    token = secrets.token_hex(8)
    (shared / "token").write_text(token)
    arguments = ["node", "--shared", str(shared), "--token", token, "--disk-mib", str(options.disk_mib)]
    if options.nodes is None:
        names = [os.environ.get("SLURMD_NODENAME") or socket.gethostname()]
        nodes, noise = _local([arguments], options.timeout)
    else:
        names = slurm.client(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]).split()
        if options.nodes > len(names):
            raise UserError(f"--nodes {options.nodes}: this allocation has {len(names)}")
        names = names[: options.nodes]
        nodes, noise = _srun(cluster, names, 1, arguments, options)
    good = [name for name in names if any(node["node"] == name for node in nodes)]
    devices = max((len(node["devices"]) for node in nodes if node["driver"] is not None), default=0)
    per_node = options.ranks_per_node or options.gpus_per_node or devices or (1 if options.nodes else 2)
    ranks: list[dict[str, Any]] = []
    if good:
        address = "127.0.0.1" if options.nodes is None else _address(good[0])
        together = ["ranks", "--master-addr", address, "--master-port", str(_port()), "--ranks-per-node", str(per_node)]
        together += ["--timeout", str(max(options.timeout // 3, 10))]
        if options.nodes is None:
            ranks, more = _local([together] * per_node, options.timeout)
        else:
            ranks, more = _srun(cluster, good, per_node, together, options)
        noise += more
    findings = diagnose(names, nodes, ranks[0] if ranks else None)
    if options.json:
        found = [vars(finding) for finding in findings]
        say(json.dumps({"nodes": nodes, "together": ranks[0] if ranks else None, "findings": found}))
    else:
        if findings:
            say("\n".join(noise[-40:]))
        _print(nodes, ranks[0] if ranks else None, findings)
    if not nodes:
        return EXIT_USER_ERROR
    return EXIT_FOUND if findings else EXIT_OK


def _local(commands: Sequence[Sequence[str]], timeout: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Run a probe once per command, all at once, as ranks of this machine."""
    running = []
    for rank, arguments in enumerate(commands):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(len(commands)), "LOCAL_RANK": str(rank)}
        command = [sys.executable, *_MODULE, *arguments]
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True))
    return _collect(running, timeout)


def _srun(
    cluster: Any, names: Sequence[str], per_node: int, arguments: Sequence[str], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run a probe on nodes, in their order; what those print that answer in time."""
    shared = Path(arguments[arguments.index("--shared") + 1]) if "--shared" in arguments else None
    srun, runner = sbatch.container_command(cluster, Path.cwd(), [shared] if shared else [], bool(options.gpus_per_node))
    python = cluster.python or ("python" if cluster.container else sys.executable)
    # the numbers of a rank are known on its node only
    script = 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec "$@"'
    command = ["srun", f"--nodelist={','.join(names)}", f"--nodes={len(names)}", f"--ntasks={len(names) * per_node}"]
    command += [f"--ntasks-per-node={per_node}", "--distribution=block", "--overlap", "--label", "--kill-on-bad-exit=0"]
    command.append("--overcommit")  # an allocation may have fewer cores than ranks
    command += [*cluster.srun, *srun, *runner, "bash", "-c", script, "probe", python, *_MODULE, *arguments]
    environment = {**os.environ, **cluster.env}
    pipe = subprocess.PIPE
    return _collect(
        [subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)], options.timeout
    )


def _collect(running: Sequence[subprocess.Popen[str]], timeout: int) -> tuple[list[dict[str, Any]], list[str]]:
    """What probes have found, and all other lines that they printed. Those that are not done in time are ended."""
    lines, noise = [], []
    for process in running:
        try:
            text, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # srun ends its tasks
            text, _ = process.communicate()
            noise.append(f"not done within {timeout} s")
        lines += text.splitlines()
    found, others = read_answers(lines)
    return found, noise + others


def _address(node: str) -> str:
    """Where SLURM itself reaches a node."""
    text = slurm.client(["scontrol", "show", "node", "-o", node])
    return next(word.partition("=")[2] for word in text.split() if word.startswith("NodeAddr="))


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _shown(nodes: Sequence[dict[str, Any]], findings: Sequence[Finding]) -> tuple[list[dict[str, Any]], int]:
    """The nodes to tell of, by name, and how many more there are: of many nodes those alone with which something is wrong."""
    ordered = sorted(nodes, key=lambda node: str(node["node"]))
    if len(ordered) <= SHOWN_NODES:
        return ordered, 0
    bad = {finding.node for finding in findings}
    shown = [node for node in ordered if node["node"] in bad] or ordered[:1]
    return shown, len(ordered) - len(shown)


def _print(nodes: Sequence[dict[str, Any]], together: dict[str, Any] | None, findings: Sequence[Finding]) -> None:
    from megatron_synth.core.log import table

    def rate(value: float | None, form: str = ".0f") -> str:
        return "-" if value is None else format(value, form)

    clocks = dict(zip(together["nodes"], together["clocks"], strict=True)) if together else {}
    rows: list[tuple[str, ...]] = [
        ("node", "devices", "GEMM TFLOP/s", "of peak", "copy GB/s", "shared MB/s", "/tmp MB/s", "clock s")
    ]
    shown, left = _shown(nodes, findings)
    for node in shown:
        slowest = min(node["devices"], key=lambda device: float(device["gemm_tflops"]))
        share = slowest["peak_share"]
        rows.append(
            (
                str(node["node"]),
                f"{len(node['devices'])} x {slowest['name']}",
                rate(slowest["gemm_tflops"], ".3g"),
                "n/a" if share is None else f"{100 * share:.0f}%",
                rate(slowest["copy_gb_s"]),
                rate(node["disk_mb_s"]) if node["shared"] else "not seen",
                rate(node["scratch_mb_s"]),
                rate(clocks.get(node["node"]), "+.3f"),
            )
        )
    say(table(rows))
    if left:
        say(f"  and {left} nodes of which nothing is wrong; --json tells of all")
    if nodes:
        versions = ", ".join(f"{name} {version}" for name, version in nodes[0]["versions"].items())
        say(f"  {versions}" + (f", driver {nodes[0]['driver']}" if nodes[0]["driver"] else ""))
    if together and together["ranks"] > 1:
        words = f"  all-reduce over {together['ranks']} ranks ({together['backend']}): {together['all_reduce_gb_s']:.3g} GB/s"
        slow = sorted(together["pairs"], key=lambda pair: float(pair[2]))
        kept = together["pairs"] if len(slow) <= SHOWN_NODES else slow[:SLOWEST_PAIRS]
        pairs = [f"{together['nodes'][int(a)]}-{together['nodes'][int(b)]} {r:.3g}" for a, b, r in kept]
        which = "pairs of nodes" if len(kept) == len(slow) else f"slowest of {len(slow)} pairs of nodes"
        say(words + (f"; {which}: {', '.join(pairs)}" if pairs else ""))
    say("\n".join(f"bad: {finding}" for finding in findings) if findings else "all good")
