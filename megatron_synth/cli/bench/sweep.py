"""`megatron-synth bench train --sweep` and `--model A,B`: from arguments to points, and the table of what came out."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from megatron_synth.bench.train import sweep
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.config.load import load_file, load_yaml
from megatron_synth.config.schema import Config
from megatron_synth.core.files import write_json
from megatron_synth.core.log import say
from megatron_synth.estimate.memory import Device
from megatron_synth.estimate.search import FRAGMENTATION, RESERVED

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)


def model_settings(name: str) -> list[str]:
    """A named model size as overrides of a configuration's model."""
    model = load_yaml(f"model/{name}.yaml").get("model", {})
    return ["model.num_query_groups=null", *(f"model.{key}={value}" for key, value in model.items())]


def run(path: str, overrides: list[str], models: list[str], options: argparse.Namespace, argv: Sequence[str]) -> int:
    """All points of all models; exit code 0 when at least one was measured."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("a sweep starts its ranks itself: run it once, without torchrun, with --ranks")
    if options.vs not in (None, "none"):
        raise UserError("--vs: baselines run beside one configuration, not in a sweep; leave it out")
    gpus, capacity = memory_of_a_rank()
    ranks = options.ranks or max(1, gpus)
    if gpus == 0:
        capacity //= ranks  # they share the host's
    device: Device = "gpu" if gpus else "cpu"
    settings = [overrides, *([*model_settings(name), *overrides] for name in models)][1 if models else 0 :]
    outcomes: list[sweep.Outcome] = []
    for one in settings:
        axes = _axes(path, one, ranks, options) if options.sweep or options.vary else {}
        candidates, refused = sweep.points(path, one, ranks, axes, device)
        if not axes and refused:
            raise UserError(f"{refused[0].status.removeprefix('not tried: ')}")
        found = sweep.sweep(
            path,
            one,
            candidates[: options.limit],
            options=_passed_on(options),
            capacity=capacity,
            timeout_s=options.timeout,
        )
        named = [setting for setting in one if setting.startswith("model.name=")] if len(models) > 1 else []
        for outcome in found:
            outcome.label = " ".join([*named, *outcome.point.settings])
        outcomes += found
    winner = sweep.best(outcomes)

    from megatron_synth.bench import tables

    head = tables.header("bench", ["train", *argv])
    rows = sweep.table_rows(outcomes)
    say("\n" + "\n".join([*tables.header_lines(head), f"- {ranks} rank(s) per point", "", *tables.markdown_table(rows)]))
    if len(outcomes) > 1 and len(models) < 2:
        say(f"\nbest: {' '.join(winner.point.settings)}")
    if options.json is not None:
        write_json(options.json, {**head, "points": sweep.to_json(outcomes), "best": list(winner.point.settings)})
    return EXIT_OK


def _axes(path: str, settings: Sequence[str], ranks: int, options: argparse.Namespace) -> dict[str, list[str]]:
    """What to walk: what was asked for, else micro-batch sizes, recomputation and layouts."""
    if options.vary:
        axes = {}
        for given in options.vary:
            key, equals, values = given.partition("=")
            if not equals or not values:
                raise UserError(f"--vary: expected KEY=V1,V2, found '{given}'")
            axes[key] = values.split(",")
        return axes
    config = load_file(Config, path, settings)
    divisors = [str(size) for size in range(1, ranks + 1) if ranks % size == 0]
    axes = {
        "train.micro_batch_size": [str(n) for n in MICRO_BATCH_SIZES if config.train.global_batch_size % n == 0],
        "train.recompute": ["none", "selective", "full"],
    }
    if ranks > 1:
        axes = {
            "parallel.tensor_model_parallel_size": divisors,
            "parallel.pipeline_model_parallel_size": divisors,
            **axes,
        }
    return axes


def _passed_on(options: argparse.Namespace) -> list[str]:
    passed = ["--pairs", str(options.pairs), "--steps", str(options.steps), "--warmup", str(options.warmup)]
    return [*passed, "--data", options.data, *(["--profile"] if options.profile else [])]


def memory_of_a_rank() -> tuple[int, int]:
    """Number of GPUs, and bytes that a rank's tensors may take: of a GPU, or of the host's free memory."""
    # in a process of its own: asking makes a context, which would take memory from the points
    code = "import torch; n = torch.cuda.device_count(); print(n, torch.cuda.get_device_properties(0).total_memory if n else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    gpus, total = map(int, done.stdout.split())
    if gpus:
        return gpus, int((total - RESERVED) / (1 + FRAGMENTATION))
    import psutil

    return 0, int(psutil.virtual_memory().available)
