"""`python -m benchmarks loader`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_synth.cli.options.types import count
from megatron_synth.config.errors import EXIT_OK, UserError


def main(argv: list[str]) -> int:
    """The data loader beside others."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks loader",
        description="Speed, start-up, memory, exactness and resuming of the data loader, beside others that are installed.",
    )
    parser.add_argument("--tokens", type=count, default=64_000_000, help="of each of four sources; default 64000000")
    parser.add_argument("--only", metavar="TEXT", help="loaders whose name holds TEXT; `peers`: all but ours")
    parser.add_argument(
        "--peers", type=Path, action="append", default=[], metavar="PYTHON", help="look for loaders in this environment, too"
    )
    parser.add_argument("--starts", action="store_true", help="instead: starts of ours by number of shards and of sources")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    options = parser.parse_args(argv)
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(f"--json: {options.json.parent} is not a folder")
    if options.tokens < 1_000_000:
        raise UserError(f"--tokens {options.tokens}: at least 1000000, or caches hold what is to be read")

    for python in options.peers:
        if not python.is_file():
            raise UserError(f"--peers: {python} is no file; give the python of an environment with other loaders")

    from benchmarks.loader import measure as benchmark
    from benchmarks.loader import startup
    from megatron_synth.bench import tables as tables_module
    from megatron_synth.core.files import write_json
    from megatron_synth.core.log import say

    head = tables_module.header("bench", ["loader", *argv])
    lines = tables_module.header_lines(head)
    if options.starts:
        shards, mixtures = startup.run(), startup.mixtures()
        found: dict[str, object] = {"shards": shards, "mixtures": mixtures}
        tables = [startup.table_rows(shards), startup.mixture_rows(mixtures)]
    else:
        results = benchmark.run(options.tokens, options.only, options.peers)
        found = {"tokens": options.tokens, "loaders": results}
        lines = [*lines, *benchmark.package_lines(results, head["versions"])]
        tables = [benchmark.table_rows(results)]
    say("\n" + "\n".join([*lines, *(line for rows in tables for line in ["", *tables_module.markdown_table(rows)])]))
    if options.json is not None:
        write_json(options.json, {**head, **found})
    return EXIT_OK
