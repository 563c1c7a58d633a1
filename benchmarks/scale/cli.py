"""`python -m benchmarks scale`: large numbers by simulation."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path

from megatron_synth.cli.options.types import count
from megatron_synth.config.errors import EXIT_OK, UserError


def main(argv: list[str]) -> int:
    """Starts on a large corpus; with --nodes doctor and launch on many nodes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks scale",
        description="Start-up, memory and plan time on a corpus of trillions of tokens, as sparse files; or doctor and launch "
        "on hundreds of nodes; or what a slow disk costs.",
        epilog="Nodes: python -m tests.slurm.lab --nodes 512 --slurmd-timeout 300 --credential 120 -- "
        "python -m benchmarks scale --nodes 64,256,512",
    )
    parser.add_argument("--tokens", type=count, default=10**13, help="default 1e13; also a tenth and a hundredth of it")
    parser.add_argument("--shards", type=count, default=100_000, help="default 100000, and as many parts of them")
    parser.add_argument("--sources", type=count, default=64, help="default 64")
    parser.add_argument("--ranks", type=count, default=4096, help="data-parallel ranks; default 4096")
    parser.add_argument("--nodes", metavar="N,N,...", help="instead: doctor and launch on so many SLURM nodes")
    parser.add_argument(
        "--shared", type=Path, default=Path(), metavar="DIR", help="a folder that nodes share; default: this one"
    )
    parser.add_argument("--disks", action="store_true", help="instead: waiting for disks of given speeds; needs FUSE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    options = parser.parse_args(argv)
    counts = [] if options.nodes is None else options.nodes.split(",")
    if not all(one.isdecimal() and int(one) for one in counts):
        raise UserError(f"--nodes: expected numbers of nodes with commas, found '{options.nodes}'")
    if not 100 * options.sources <= options.shards <= 10 * options.tokens:
        raise UserError(f"--shards {options.shards}: expected at least 100 for each of {options.sources} sources")

    from benchmarks.scale import disks, nodes, start
    from megatron_synth.bench.tables import header, header_lines, markdown_table
    from megatron_synth.core.files import write_json
    from megatron_synth.core.log import say

    head = header("scale", argv) | {"command": shlex.join(["python", "-m", "benchmarks", "scale", *argv])}
    if options.disks:
        waits = disks.run()
        table, found = disks.rows(waits), [asdict(one) for one in waits]
    elif counts:
        measured = [nodes.measure(int(one), options.shared) for one in counts]
        table, found = nodes.rows(measured), [asdict(one) for one in measured]
    else:
        results = [
            start.run(
                tokens=options.tokens // part, shards=options.shards // part, sources=options.sources, ranks=options.ranks
            )
            for part in (100, 10, 1)
        ]
        table, found = start.rows(results), [asdict(one) for one in results]
    say("\n" + "\n".join([*header_lines(head), "", *markdown_table(table)]))
    if options.json is not None:
        write_json(options.json, {**head, "results": found})
    return EXIT_OK
