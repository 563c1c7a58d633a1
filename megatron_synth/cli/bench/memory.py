"""`megatron-synth bench memory`: the memory estimate beside what a rank's tensors take."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_synth.cli.options.types import on_disk
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.core.files import write_json
from megatron_synth.core.log import is_first_rank, say


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth bench memory",
        description="Memory per rank as estimated and as allocated. Without a configuration: a table of sizes and layouts.",
        epilog="On several processes: torchrun --nproc-per-node N -m megatron_synth bench memory CONFIG ...",
    )
    parser.add_argument("config", nargs="?", help="default: bench/tiny-7m.yaml in several sizes and layouts")
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c")
    parser.add_argument("--json", type=on_disk, metavar="FILE", help="write every rank's figures")
    return parser


def main(argv: list[str]) -> int:
    """One configuration on this launch's ranks, or a table of many."""
    options = parser().parse_intermixed_args(argv)
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(f"--json: {options.json.parent} is not a folder")
    if options.config is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("the table starts its ranks itself: run it once, without torchrun, or name a configuration")

    from megatron_synth.bench import tables
    from megatron_synth.bench.train import memory

    head = tables.header("bench", ["memory", *argv])
    if options.config is not None:
        results = memory.predicted_and_measured(options.config, options.overrides)
    else:
        results = []
        for ranks, settings in memory.CASES:
            alone = ranks == 1
            results += memory.predicted_and_measured(memory.CONFIG, settings) if alone else _launched(ranks, settings)
    if is_first_rank():
        say("\n".join([*tables.header_lines(head), "", *tables.markdown_table(memory.table_rows(results))]))
        if options.json is not None:
            write_json(options.json, {**head, "ranks": results})
    return EXIT_OK


def _launched(ranks: int, settings: tuple[str, ...]) -> list[dict[str, Any]]:
    """The same command on ranks of its own: processes that torchrun started join each other once."""
    from megatron_synth.bench.train.memory import CONFIG

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ranks.json"
        launcher = ["-m", "megatron_synth.cluster.agent", "--local", "--nproc-per-node", str(ranks)]
        verb = ["-m", "megatron_synth", "bench", "memory", CONFIG, *settings, "--json", str(file)]
        done = subprocess.run([sys.executable, *launcher, *verb], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(settings)} on {ranks} ranks failed:\n{done.stderr[-2000:]}")
        return list(json.loads(file.read_text())["ranks"])
