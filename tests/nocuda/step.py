"""Optimizer steps of a benchmark's engine on the device that computes nothing: what the last one asked of the device.

    python -m tests.nocuda.step bench/h200.yaml precision.fp8=current --documents 512 --json out.json --record out.tsv

Run it in a process that has the device preloaded. The steps are those of `bench train`: random tokens, on the device before.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch

from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.estimate.memory import memory_per_rank
from megatron_synth.parallel.groups import process_group
from megatron_synth.parallel.plan import plan
from megatron_synth.train.batch import TensorBatch
from tests.nocuda.ordered import ordered
from tests.nocuda.record import PARTS, Counts, read, recording


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=4, help="the first fills caches and is left out")
    parser.add_argument("--documents", type=int, default=0, help="tokens of a document; 0: each row is one")
    parser.add_argument("--world", type=int, default=1, help="ranks of the whole run, this process being --rank")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--nccl", action="store_true", help="collectives by NCCL's calls in place of torch's fake ones")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument(
        "--trace", default="", metavar="TEXT", help="also tell where kernels are launched whose names hold TEXT"
    )
    parser.add_argument("--memory", action="store_true", help="what is allocated at the peak, by size and place")
    parser.add_argument("--profile", action="store_true", help="where the host spends a step's time")
    return parser


def in_documents(batch: TensorBatch, config: Config, length: int) -> TensorBatch:
    """The same tokens as documents of `length`."""
    from megatron_synth.model.documents import Documents

    rows, tokens = config.train.micro_batch_size, config.train.sequence_length
    starts = torch.arange(0, rows * tokens + 1, length, dtype=torch.int32, device="cuda")
    positions = (torch.arange(tokens, dtype=torch.int32, device="cuda") % length).expand(rows, tokens).contiguous()
    return replace(batch, documents=Documents(starts, length, positions))


def at_peak() -> list[str]:
    """What of the recorded allocations was there at the moment of the peak: megabytes, number, size of one, place."""
    alive: dict[int, tuple[int, str]] = {}
    total = most = 0
    found: list[tuple[int, str]] = []
    for event in torch.cuda.memory._snapshot()["device_traces"][0]:
        if event["action"] == "alloc":
            frames = [f for f in event["frames"] if "/torch/" not in f["filename"] and "/nocuda/" not in f["filename"]]
            place = " < ".join(f"{'/'.join(f['filename'].split('/')[-2:])}:{f['line']}" for f in frames[:3])
            alive[event["addr"]] = event["size"], place
            total += event["size"]
            if total > most:
                most, found = total, list(alive.values())
        elif event["action"] == "free_requested" and event["addr"] in alive:
            total -= alive.pop(event["addr"])[0]
    counted = sorted(Counter(found).items(), key=lambda one: -one[0][0] * one[1])
    return [f"{size * n / 1e6:10.1f} MB {n:5d} x {size:12,d}  {place}" for (size, place), n in counted[:40]]


def host_parts(step: Callable[[], None]) -> dict[str, float]:
    """Shares of the host's time in one step by whose code it runs; the backward pass in this thread, where it is seen."""
    profile = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):
        profile.runcall(step)
    spent = dict.fromkeys([*PARTS, "other"], 0.0)
    for (file, _, _), (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        spent[next((name for name, mark in PARTS.items() if mark in file), "other")] += own
    return {name: seconds / sum(spent.values()) for name, seconds in spent.items()}


def main() -> None:
    asked = options().parse_intermixed_args()
    config = load_file(Config, asked.config, asked.overrides)
    layout = plan(config, asked.world)
    if asked.world > 1:
        from tests.nocuda.one_of_many import pretend

        pretend(asked.rank, asked.world, nccl=asked.nccl)
    with process_group(layout, 1) as ranks, ExitStack() as held:
        from megatron_synth.bench.train.engine import Engine, random_batches
        from megatron_synth.model.fp8 import setup

        trial = setup._disagreement
        setup._disagreement = lambda *given: (trial(*given), None)[1]  # it runs; its numbers mean nothing here
        if "NOCUDA_ORDER" in os.environ:
            held.enter_context(ordered())
        engine = Engine(config, layout, ranks)
        built = torch.cuda.memory_allocated()
        (batches,) = random_batches(config, layout, ranks, 1)
        if asked.documents:
            batches = [in_documents(batch, config, asked.documents) for batch in batches]
        processor, wall = [], []
        for index in range(asked.steps):
            if index == asked.steps - 1:
                torch.cuda.reset_peak_memory_stats()
            began, used = time.perf_counter(), time.process_time()
            engine.step(batches)
            wall.append(time.perf_counter() - began)
            processor.append(time.process_time() - used)
        peak = torch.cuda.max_memory_allocated()  # of a step that is not recorded: records take no device memory anyway
        with recording(asked.record, asked.trace):
            engine.step(batches)
        if asked.memory:
            torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=10**6)
            held_before = torch.cuda.memory_allocated()
            engine.step(batches)
            print(f"{held_before / 1e6:10.1f} MB before the step", *at_peak(), sep="\n")
        if asked.profile:
            profile = cProfile.Profile()
            profile.runcall(engine.step, batches)
            pstats.Stats(profile).sort_stats("tottime").print_stats(45)
        modeled = memory_per_rank(config, layout.data, config.model.vocab_size)[ranks.pipeline_rank].total
        result = {
            "config": [asked.config, *asked.overrides, *(["documents"] if asked.documents else [])],
            "rank": f"{asked.rank} of {asked.world}",
            "micro_batches": layout.num_microbatches,
            **asdict(Counts.of(read(asked.record))),
            "host_s": statistics.median(processor[1:]),
            "host_parts": host_parts(lambda: engine.step(batches)),
            "wall_s": statistics.median(wall[1:]),
            "built_bytes": built,
            "peak_bytes": peak,
            "reserved_bytes": torch.cuda.memory_reserved(),
            "modeled_bytes": modeled,
        }
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
