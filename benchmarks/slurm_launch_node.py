"""One node of `python -m benchmarks launch`: ranks that do nothing but find each other.

The process imports torch once and forks the node's ranks, so that many of them fit on a small machine. They meet as ranks of
torchrun do, in a TCPStore on the first node: all connect, all wait until the last one has.
"""

from __future__ import annotations

import time

UP = time.time()  # before the imports: the node's process is there

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from datetime import timedelta  # noqa: E402
from pathlib import Path  # noqa: E402


def main() -> int:
    """Fork the ranks and wait for them. 0 if all met."""
    import torch.distributed as dist

    imported = time.time()
    node, ranks = int(os.environ["SLURM_NODEID"]), int(os.environ["RANKS_PER_NODE"])
    world = ranks * int(os.environ["SLURM_JOB_NUM_NODES"])
    children = []
    for local in range(ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                meet(dist, node * ranks + local, world, imported)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def meet(dist: object, rank: int, world: int, imported: float) -> None:
    """Join the others; rank 0 writes everyone's times to the job's folder."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    began = time.time()
    store = dist.TCPStore(address, port, world, is_master=rank == 0, timeout=timedelta(seconds=120))  # type: ignore[attr-defined]
    if store.add("arrived", 1) == world:
        store.set("go", "1")
    store.get("go")
    met = time.time()
    store.set(f"times/{rank}", json.dumps({"up": UP, "imported": imported, "began": began, "met": met}))
    if rank == 0:
        times = [json.loads(store.get(f"times/{other}")) for other in range(world)]
        (Path(os.environ["JOB_DIR"]) / "times.json").write_text(json.dumps(times))
        store.set("read", "1")
        time.sleep(0.2)  # the others have seen it
    else:
        store.get("read")


if __name__ == "__main__":
    sys.exit(main())
