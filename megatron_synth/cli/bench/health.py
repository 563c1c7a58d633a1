"""`megatron-synth bench health`: what `log.health_interval` costs."""

from __future__ import annotations

import argparse
import os
import statistics
from dataclasses import asdict

from megatron_synth.cli.options.types import count, file_and_overrides, on_disk
from megatron_synth.config.errors import EXIT_OK, UserError

DEFAULT_CONFIG = "bench/tiny-7m.yaml"


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth bench health",
        description="What a step costs whose health is recorded, beside one that is not; random tokens.",
        epilog="On several processes: torchrun --nproc-per-node N -m megatron_synth bench health ...",
    )
    parser.add_argument("arguments", nargs="*", default=[], metavar="[CONFIG] a.b=c", help=f"default CONFIG: {DEFAULT_CONFIG}")
    parser.add_argument("--pairs", type=count, default=6, help="blocks of plain and of measured steps, in turn; default 6")
    parser.add_argument("--steps", type=count, default=4, help="timed optimizer steps in a block; default 4")
    parser.add_argument("--warmup", type=count, default=2, help="steps of each kind before the first block; default 2")
    parser.add_argument("--json", type=on_disk, metavar="FILE", help="write all that was measured")
    return parser


def main(argv: list[str]) -> int:
    """Measure, and print the table and the least interval whose cost is under 1 %."""
    options = parser().parse_intermixed_args(argv)
    path, overrides = file_and_overrides(options.arguments, DEFAULT_CONFIG)
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(f"--json: {options.json.parent} is not a folder")
    from megatron_synth.bench import tables
    from megatron_synth.bench.train import health
    from megatron_synth.config.load import load_file
    from megatron_synth.config.schema import Config
    from megatron_synth.core.files import write_json
    from megatron_synth.core.log import is_first_rank, say
    from megatron_synth.parallel.plan import plan

    config = load_file(Config, path, overrides)
    layout = plan(config, int(os.environ.get("WORLD_SIZE", 1)))
    head = tables.header("bench", ["health", *argv])
    cost = health.measure(config, layout, pairs=options.pairs, steps=options.steps, warmup=options.warmup)
    extra = cost.extra
    what = "processor time" if cost.plain[0].cpu_s else "time"
    lines = [
        *tables.header_lines(head),
        f"- model: {config.model.name}, {config.precision.dtype}, sequence_length {config.train.sequence_length}, "
        f"global_batch_size {config.train.global_batch_size}, micro_batch_size {config.train.micro_batch_size}; "
        f"{layout.describe()}",
        f"- timing: {options.pairs} blocks of {options.steps} steps of each kind, in turn in one process",
        "",
        *tables.markdown_table(health.table_rows(cost)),
        "",
        f"A measured step takes {100 * statistics.median(extra):.1f} % more {what} than a plain one (median of the pairs, "
        f"{100 * min(extra):.1f} % to {100 * max(extra):.1f} %): 1 % of it with log.health_interval={cost.interval}.",
    ]
    if cost.own is not None:
        lines.append(f"A profile of {options.steps} measured steps has {100 * cost.own:.2f} % in what watches.")
    say("\n".join(lines))
    if options.json is not None and is_first_rank():
        write_json(options.json, {**head, "extra": extra, "interval": cost.interval, **asdict(cost)})
    return EXIT_OK
