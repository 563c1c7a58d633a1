"""`python -m benchmarks checkpoint`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_synth.cli.options.types import count, file_and_overrides
from megatron_synth.config.errors import EXIT_OK, UserError


def main(argv: list[str]) -> int:
    """How long a save keeps training waiting."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks checkpoint",
        description="How long a save keeps training waiting, when files are waited for and when they are written meanwhile.",
        epilog="On several processes: torchrun --nproc-per-node N -m benchmarks checkpoint ...",
    )
    parser.add_argument(
        "arguments", nargs="*", default=[], metavar="[CONFIG] a.b=c", help="default CONFIG: bench/checkpoint-100m.yaml"
    )
    parser.add_argument("--saves", type=count, default=3, help="of each kind; default 3")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure; default: the current one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    options = parser.parse_intermixed_args(argv)
    path, overrides = file_and_overrides(options.arguments, "bench/checkpoint-100m.yaml")

    from megatron_synth.config.load import load_file
    from megatron_synth.config.schema import Config
    from megatron_synth.parallel.plan import plan

    config = load_file(Config, path, overrides)
    for folder in (options.folder, *([options.json.parent] if options.json is not None else [])):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
    layout = plan(config, int(os.environ.get("WORLD_SIZE", 1)))

    from benchmarks import checkpoint as benchmark
    from megatron_synth.bench import tables
    from megatron_synth.core.files import write_json
    from megatron_synth.core.log import is_first_rank, say

    head = tables.header("bench", ["checkpoint", *argv])
    costs = benchmark.measure(config, layout, options.folder, options.saves)
    if is_first_rank():  # which alone knows when a checkpoint is whole
        about = [*tables.header_lines(head), *benchmark.lines(config, layout, costs)]
        say("\n" + "\n".join([*about, "", *tables.markdown_table(benchmark.rows(costs))]))
        if options.json is not None:
            write_json(options.json, {**head, "layout": layout.describe(), **vars(costs)})
    return EXIT_OK
