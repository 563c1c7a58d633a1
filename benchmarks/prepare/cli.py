"""`python -m benchmarks prepare`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from benchmarks.prepare import memory, shares
from benchmarks.prepare.measure import compare, render, to_json
from megatron_synth.bench import tables
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.core.files import write_json
from megatron_synth.data.preparing.workers import core_count


def main(argv: list[str]) -> int:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks prepare",
        description="Tokens per second and worker of `prepare`, beside Megatron-LM's preprocessing loop and datatrove; or, "
        "with --memory, how much memory it takes.",
    )
    parser.add_argument("--megabytes", type=int, default=12, help="text to tokenize; beyond 12 it repeats; default %(default)s")
    parser.add_argument("--workers", type=int, default=core_count(), help="processes of each; default all cores, %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; default %(default)s")
    parser.add_argument("--datatrove", type=Path, metavar="PYTHON", help="interpreter of an environment with datatrove")
    parser.add_argument(
        "--memory",
        metavar="MB[,MB]",
        help="instead: memory of prepare, verify and duplicates on so much made-up text",
    )
    parser.add_argument(
        "--shares",
        metavar="N[,N]",
        help="instead: processor time and memory of arrays of so many tasks, on --megabytes of text",
    )
    parser.add_argument("--at-once", action="store_true", help="with --shares: one machine and the arrays at one time")
    parser.add_argument("--plain", action="store_true", help="with --shares: without shuffle and packing")
    parser.add_argument(
        "--folder", type=Path, help="with --memory and --shares: where text and output go for the time; default $TMPDIR"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    options = parser.parse_args(argv)
    for name in ("megabytes", "workers", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.datatrove is not None and not options.datatrove.is_file():
        raise UserError(f"--datatrove: {options.datatrove} is no file; give the python of an environment with datatrove")
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(f"--json: {options.json.parent} is not a folder")
    if options.folder is not None and not options.folder.is_dir():
        raise UserError(f"--folder: {options.folder} is not a folder")
    sizes = None if options.memory is None else _megabytes(options.memory)
    head = {**tables.header("", []), "command": shlex.join(["python", "-m", "benchmarks", "prepare", *argv])}
    if sizes is not None:
        measured = memory.measure(sizes, range(1, options.workers + 1), options.folder, lambda line: print(line, flush=True))
        print("\n" + memory.render(head, measured))
        if options.json is not None:
            write_json(options.json, memory.to_json(head, measured))
        return EXIT_OK
    if options.shares is not None:
        tasks = _whole(options.shares, "--shares: expected numbers of tasks such as 1,4,16")
        prepared = shares.measure(
            options.megabytes * 10**6,
            tasks,
            options.folder,
            not options.plain,
            lambda line: print(line, flush=True),
            options.at_once,
        )
        print("\n" + shares.render(head, prepared))
        if options.json is not None:
            write_json(options.json, shares.to_json(head, prepared))
        return EXIT_OK
    result = compare(
        options.megabytes,
        options.workers,
        options.rounds,
        datatrove=options.datatrove,
        say=lambda line: print(line, flush=True),
    )
    print("\n" + render(head, result))
    if options.json is not None:
        write_json(options.json, to_json(head, result))
    return EXIT_OK


def _megabytes(text: str) -> list[int]:
    return [number * 10**6 for number in _whole(text, "--memory: expected megabytes such as 500 or 500,5000")]


def _whole(text: str, expected: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{expected}, got {text}")
    return list(map(int, parts))
