"""What a checkpoint costs training: how long a save keeps it waiting, with and without waiting for the files.

Conventions, stated again in the table:

- waited for: from the end of a step until the checkpoint is whole on the disk (flushed, renamed), training standing still.
- meanwhile: from the end of a step until the next one may begin; files are written while steps go on. The time until the
  checkpoint is whole is reported beside it, and how much longer steps take in it than those without a save.
- Saves of the two kinds take turns in one process, so that both meet the same disk. The first save of all is reported apart: it
  asks the system for the host memory that the later ones use again.
- All ranks save; times are rank 0's.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_synth.bench.train.engine import Engine, random_batches, resident_bytes
from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import Config
from megatron_synth.core.log import gib, human
from megatron_synth.parallel.groups import process_group
from megatron_synth.parallel.plan import Layout


@dataclass(frozen=True)
class Costs:
    """Seconds, of each save in turn."""

    parameters: int
    bytes: int
    """Of one checkpoint."""
    resident: int
    """Most bytes of the host's memory that rank 0 held."""
    first_blocked_s: float
    waited_s: list[float]
    blocked_s: list[float]
    whole_s: list[float]
    """Until the checkpoint that was written meanwhile is whole."""
    step_s: list[float]
    """Steps without a save."""
    step_meanwhile_s: list[float]


def measure(config: Config, layout: Layout, folder: Path, saves: int) -> Costs:
    """Save `saves` times in each way, below `folder`.

    Raises:
        UserError: there is no room.
    """
    with process_group(layout, config.train.seed) as ranks:
        from megatron_synth.train.checkpoint.sharding import collect
        from megatron_synth.train.checkpoint.writer import CheckpointWriter, SaveRequest

        engine = Engine(config, layout, ranks)
        batches = random_batches(config, layout, ranks, 2)
        engine.step(batches[0])
        parameters = sum(parameter.numel() for chunk in engine.chunks for parameter in chunk.parameters())
        needed = 3 * 16 * parameters
        if ranks.rank == 0 and shutil.disk_usage(folder).free < needed:
            raise UserError(
                f"{folder}: {human(shutil.disk_usage(folder).free)} bytes free, {human(needed)} needed; see --folder"
            )
        made = [tempfile.mkdtemp(prefix="bench-checkpoint-", dir=folder) if ranks.rank == 0 else None]
        torch.distributed.broadcast_object_list(made, src=0)
        assert made[0] is not None
        root = Path(made[0])
        writer = CheckpointWriter(root, "bench", ranks.device)
        whole: list[float] = []
        number = 0
        costs = Costs(parameters, 0, 0, 0.0, [], [], [], [], [])

        def begin() -> float:
            nonlocal number
            number += 1
            torch.distributed.barrier()
            _wait(ranks.device)
            start = time.perf_counter()
            request = SaveRequest(
                number,
                {"step": number},
                committed=lambda path: whole.append(time.perf_counter() - start),
                failed=lambda text: None,  # `outcome` raises it
                keep_last=1,
            )
            writer.begin(lambda: collect(engine.chunks, engine.optimizer), request)
            return start

        def step() -> float:
            start = time.perf_counter()
            engine.step(batches[0])
            _wait(ranks.device)
            return time.perf_counter() - start

        try:
            start = begin()
            first = time.perf_counter() - start
            writer.outcome()
            for _ in range(saves):
                costs.step_s.extend(step() for _ in range(3))
                start = begin()
                writer.outcome()
                costs.waited_s.append(time.perf_counter() - start)
                start = begin()
                costs.blocked_s.append(time.perf_counter() - start)
                while _any(writer.busy, ranks.device):
                    costs.step_meanwhile_s.append(step())
                writer.outcome()
                if whole:  # on rank 0
                    costs.whole_s.append(whole[-1])
            size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
            torch.distributed.barrier()
        finally:
            if ranks.rank == 0:
                shutil.rmtree(root, ignore_errors=True)
    return Costs(**{**vars(costs), "bytes": size, "resident": resident_bytes(), "first_blocked_s": first})


def _any(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds on some rank; equal on all, which step together."""
    flags = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows(costs: Costs) -> list[list[str]]:
    """The table."""

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    waited, blocked = statistics.median(costs.waited_s), statistics.median(costs.blocked_s)
    meanwhile = "none"
    if costs.step_meanwhile_s:
        slower = statistics.median(costs.step_meanwhile_s) / statistics.median(costs.step_s)
        meanwhile = f"{len(costs.step_meanwhile_s)}, x{slower:.2f} as long"
    return [
        ["save", "training waits, s", "of waited for", "checkpoint whole, s", "GiB/s", "steps meanwhile"],
        ["waited for", spread(costs.waited_s), "100 %", spread(costs.waited_s), f"{costs.bytes / 2**30 / waited:.2f}", ""],
        [
            "meanwhile",
            spread(costs.blocked_s),
            f"{100 * blocked / waited:.1f} %",
            spread(costs.whole_s),
            f"{costs.bytes / 2**30 / statistics.median(costs.whole_s):.2f}",
            meanwhile,
        ],
        [
            "meanwhile, the first",
            f"{costs.first_blocked_s:.3f}",
            f"{100 * costs.first_blocked_s / waited:.1f} %",
            "",
            "",
            "",
        ],
    ]


def lines(config: Config, layout: Layout, costs: Costs) -> list[str]:
    """What the table is about."""
    return [
        f"- model: {config.model.name}, {human(costs.parameters)} parameters per rank, {config.precision.dtype}; "
        f"a checkpoint has {gib(costs.bytes)} GiB; most memory resident on the host in a process: {gib(costs.resident)} GiB",
        f"- layout: {layout.describe()}",
        f"- {len(costs.waited_s)} saves of each kind in turn, in one process: median (min to max). Waited for: until the files "
        "are on the disk; meanwhile: until the next step may begin. Steps meanwhile: how many, and their median against "
        f"that of {len(costs.step_s)} steps without a save ({statistics.median(costs.step_s):.2f} s)",
    ]
