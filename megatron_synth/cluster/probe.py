"""What a node can do, measured on it. Started by `megatron-synth doctor`: once per node, then once per rank.

    python -m megatron_synth.cluster.probe node --shared FOLDER --token T ...
    python -m megatron_synth.cluster.probe ranks --master-addr A --master-port P ...    # RANK, WORLD_SIZE, LOCAL_RANK are set

Each prints its answer, JSON, in lines that begin with `PROBE ` (`answer_lines`): standard output reaches the caller also from a
node that lacks the shared folder.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_synth.estimate.hardware import peak_flops
from megatron_synth.parallel.placement import node_name

MARK = "PROBE "
_CLOCK_ROUNDS = 5
_BLOCK = 1 << 20
_PIECE = 800


def main(argv: list[str] | None = None) -> int:
    """Run one probe and print its line."""
    parser = argparse.ArgumentParser(prog="probe")
    parser.add_argument("what", choices=("node", "ranks"))
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--token", default="")
    parser.add_argument("--disk-mib", type=int, default=256)
    parser.add_argument("--master-addr")
    parser.add_argument("--master-port", type=int)
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=60)
    options = parser.parse_args(argv)
    if options.what == "node":
        found: dict[str, Any] | None = probe_node(options.shared, options.token, options.disk_mib)
    else:
        found = probe_ranks(options.master_addr, options.master_port, options.ranks_per_node, options.timeout)
    if found is not None:
        print("\n".join(answer_lines(found)), flush=True)
    return 0


def answer_lines(found: Mapping[str, Any]) -> list[str]:
    """An answer as lines that srun passes on whole: with `--label` it breaks those of more than about a kilobyte."""
    text, name = json.dumps(found), secrets.token_hex(8)
    count = -(-len(text) // _PIECE)
    return [f"{MARK}{name} {number} {count} {text[number * _PIECE : (number + 1) * _PIECE]}" for number in range(count)]


def read_answers(lines: Iterable[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The answers that lines hold, each behind whatever srun puts before it; and all other lines, those of answers that are
    not whole among them.
    """
    pieces: dict[str, dict[int, str]] = {}
    sizes, noise = {}, []
    for line in lines:
        _, mark, rest = line.partition(MARK)
        name, number, count, text = [*rest.split(" ", 3), "", "", ""][:4]
        if mark and number.isdecimal() and count.isdecimal():
            pieces.setdefault(name, {})[int(number)] = text
            sizes[name] = int(count)
        elif line.strip():
            noise.append(line)
    found = []
    for name, parts in pieces.items():
        text = "".join(parts[number] for number in sorted(parts))
        try:
            found.append(json.loads(text))
        except ValueError:
            noise.append(f"an answer of which {len(parts)} of {sizes[name]} lines came")
    return found, noise


# ---- one node by itself


def probe_node(shared: Path, token: str, disk_mib: int) -> dict[str, Any]:
    """Versions, devices, their rates, the disk and the shared folder of this node.

    Keys: node, versions, driver, devices (name, gemm_tflops, peak_share, copy_gb_s), disk_mb_s and scratch_mb_s in MB/s
    (None: cannot be written), shared (the caller's token was read, and an answer left).
    """
    import torch

    from megatron_synth.train.record.run_dir import device_name, versions

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = []
    for index in range(max(count, 1)):
        device = torch.device("cuda", index) if count else torch.device("cpu")
        name = torch.cuda.get_device_name(index) if count else device_name()
        rate, peak = gemm_rate(device), peak_flops(name) if count else None
        devices.append(
            {
                "name": name,
                "gemm_tflops": rate / 1e12,
                "peak_share": None if peak is None else rate / peak,
                "copy_gb_s": copy_rate(device) / 1e9 if count else None,
            }
        )
    return {
        "node": node_name(),
        "versions": versions() | ({"cuda": str(torch.version.cuda)} if count else {}),
        "driver": _driver(),
        "devices": devices,
        "disk_mb_s": write_rate(shared, disk_mib),
        "scratch_mb_s": write_rate(Path(tempfile.gettempdir()), disk_mib),
        "shared": _answer(shared, token),
    }


def gemm_rate(device: Any) -> float:
    """FLOP/s of a matrix product: BF16 8192 x 8192 x 8192 on a GPU, FP32 768 x 768 x 768 on a CPU; the best of several."""
    import torch

    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (768, torch.float32)
    a, b = (torch.ones(size, size, dtype=dtype, device=device) / size for _ in range(2))
    repeats = 10 if device.type == "cuda" else 2

    def product() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    return 2 * size**3 * repeats / _best(product, device, turns=8)


def copy_rate(device: Any) -> float:
    """Bytes per second from pinned host memory to a GPU."""
    import torch

    host = torch.empty(256 * _BLOCK, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=device)
    return host.numel() / _best(lambda: target.copy_(host, non_blocking=True), device, turns=5)


def _best(work: Callable[[], object], device: Any, turns: int) -> float:
    import torch

    times = []
    for _ in range(turns + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])  # the first one warms up


def write_rate(folder: Path, mib: int) -> float | None:
    """MB/s of writing a file of `mib` MiB and waiting until it is on disk; None if `folder` cannot be written."""
    block = os.urandom(_BLOCK)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor.") as file:
            began = time.perf_counter()
            for _ in range(mib):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return mib * _BLOCK / 1e6 / (time.perf_counter() - began)
    except OSError:
        return None


def _answer(shared: Path, token: str) -> bool:
    try:
        seen = (shared / "token").read_text() == token
        (shared / f"seen-{node_name()}").write_text(token)
    except OSError:
        return False
    return seen


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = sorted(set(result.stdout.split()))
    return ", ".join(lines) if result.returncode == 0 and lines else f"nvidia-smi fails: {result.stderr.strip()[:200]}"


# ---- nodes together


def probe_ranks(address: str, port: int, ranks_per_node: int, timeout_s: float) -> dict[str, Any] | None:
    """All-reduce rates over all ranks and between neighboring nodes, and clocks. The result is rank 0's; None elsewhere.

    Keys: nodes (names in order), backend, all_reduce_gb_s (bus bandwidth over all ranks), pairs ([i, j, GB/s] for
    neighbors in a ring of nodes), clocks (seconds ahead of the first node, by node), round_trip_s (by node).
    Bus bandwidth is 2 (n - 1) / n x bytes / time, the bytes that a ring moves per rank, so that it does not depend on n.
    """
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    wait = timedelta(seconds=timeout_s)
    store = dist.TCPStore(address, port, world, is_master=rank == 0, timeout=wait)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    nodes = world // ranks_per_node
    store.set(f"name/{rank}", node_name())
    clocks = _clocks(store, rank, ranks_per_node, nodes)
    everything = _all_reduce(None, world, device)
    pairs = []
    ring = [] if nodes < 2 else [(0, 1)] if nodes == 2 else [(node, (node + 1) % nodes) for node in range(nodes)]
    groups = [
        dist.new_group([n * ranks_per_node + local for n in sorted(pair) for local in range(ranks_per_node)]) for pair in ring
    ]
    # neighbors in two or three rounds in which no node is in two pairs: pairs do not disturb each other
    for turn in (range(0, len(ring) - len(ring) % 2, 2), range(1, len(ring), 2), range(len(ring) - len(ring) % 2, len(ring))):
        for place in turn:
            if rank // ranks_per_node in ring[place]:
                rate = _all_reduce(groups[place], 2 * ranks_per_node, device)
                if rank == ring[place][0] * ranks_per_node:
                    store.set(f"pair/{place}", str(rate))
        dist.barrier()
    if rank != 0:
        store.get("done")  # rank 0 keeps the store
        return None
    pairs = [[*pair, float(store.get(f"pair/{place}"))] for place, pair in enumerate(ring)]
    found = {
        "nodes": [store.get(f"name/{node * ranks_per_node}").decode() for node in range(nodes)],
        "backend": backend,
        "ranks": world,
        "all_reduce_gb_s": everything,
        "pairs": pairs,
        "clocks": [offset for offset, _ in clocks],
        "round_trip_s": [trip for _, trip in clocks],
    }
    store.set("done", "1")
    time.sleep(0.2)  # the others have read it
    return found


def _all_reduce(group: Any, ranks: int, device: Any) -> float:
    """Bus bandwidth in GB/s."""
    import torch
    import torch.distributed as dist

    if ranks == 1:
        return 0.0
    size = (256 if device.type == "cuda" else 8) * _BLOCK
    data = torch.zeros(size // 4, dtype=torch.float32, device=device)
    seconds = _best(lambda: dist.all_reduce(data, group=group), device, turns=5)
    return 2 * (ranks - 1) / ranks * size / seconds / 1e9


def _clocks(store: Any, rank: int, ranks_per_node: int, nodes: int) -> list[tuple[float, float]]:
    """On rank 0: seconds that each node's clock is ahead of its own, and the round trip that this was measured over."""
    if rank % ranks_per_node:
        return []
    node = rank // ranks_per_node
    if node:
        best = (0.0, float("inf"))
        for turn in range(_CLOCK_ROUNDS):
            began = time.time()
            store.set(f"ping/{node}/{turn}", "1")
            there = float(store.get(f"pong/{node}/{turn}"))
            ended = time.time()
            best = min(best, ((began + ended) / 2 - there, ended - began), key=lambda pair: pair[1])
        store.set(f"clock/{node}", json.dumps(best))
        return []
    found = [(0.0, 0.0)]
    for other in range(1, nodes):
        for turn in range(_CLOCK_ROUNDS):
            store.get(f"ping/{other}/{turn}")
            store.set(f"pong/{other}/{turn}", repr(time.time()))
        offset, trip = json.loads(store.get(f"clock/{other}"))
        found.append((offset, trip))
    return found


if __name__ == "__main__":
    sys.exit(main())
