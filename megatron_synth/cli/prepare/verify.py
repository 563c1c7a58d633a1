"""`megatron-synth prepare verify`: are the files still what was written?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from megatron_synth.cli.options.types import count, on_disk
from megatron_synth.config.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from megatron_synth.core.files import write_json
from megatron_synth.core.log import counted, show
from megatron_synth.data.preparing.prepare import RECORD, prepared_names
from megatron_synth.data.preparing.workers import core_count
from megatron_synth.data.shards.checksums import verify
from megatron_synth.data.shards.manifest import FILE_NAME

SHOWN_FAULTS = 20  # of one file


def source_folders(given: Iterable[str]) -> list[Path]:
    """The prepared sources that folders are or hold, each once under whatever names.

    Raises:
        UserError: there is none, or one that the output of `prepare` has had is missing.
    """
    found: dict[Path, Path] = {}
    for name in given:
        folder = Path(name)
        if (folder / FILE_NAME).is_file():
            found.setdefault(folder.resolve(), folder)
            continue
        inside = sorted(path.parent for path in folder.glob(f"*/{FILE_NAME}"))
        if not inside:
            raise UserError(f"{folder}: no prepared source and no folder of them (no {FILE_NAME}); give the output of prepare")
        missing = sorted(set(prepared_names(folder)) - {path.name for path in inside})
        if missing:
            raise UserError(
                f"{folder / missing[0] / FILE_NAME}: not there, though {folder / RECORD} names this source; copy it again, or "
                f"give the folders that are meant one by one"
            )
        for path in inside:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth prepare verify", description="Compare prepared sources with the checksums of their manifests."
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a prepared source, or a folder of them")
    parser.add_argument("--workers", type=count, default=core_count(), help="threads (default: all cores, %(default)s)")
    parser.add_argument("--sha256", action="store_true", help="check the SHA-256 of whole files, too (slower)")
    parser.add_argument("--json", type=on_disk, metavar="FILE", help="write the result")
    return parser


def main(argv: list[str]) -> int:
    """`megatron-synth prepare verify FOLDER... [--workers N] [--sha256] [--json FILE]`."""
    options = parser().parse_args(argv)
    folders = source_folders(options.folders)

    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:
        result = verify(folders, workers=options.workers, progress=bar.update, sha256=options.sha256)
    if options.json is not None:
        write_json(options.json, asdict(result))
    shown: dict[str, int] = {}
    for fault in result.faults:
        shown[fault.file] = shown.get(fault.file, 0) + 1
        if shown[fault.file] <= SHOWN_FAULTS:
            show(str(fault))
    for file, number in shown.items():
        if number > SHOWN_FAULTS:
            show(f"{file}: {number - SHOWN_FAULTS} more faults")
    if result.unblocked:
        show(f"{result.unblocked} of {result.shards} shards have a checksum of the whole file only (manifest of version 1)")
    verdict = f"{len(result.faults)} faults in {len(shown)} files" if result.faults else "all as written"
    show(
        f"{counted(result.sources, 'source')}, {counted(result.shards, 'shard')}, "
        f"{result.read_bytes / 1e9:.3f} GB in {result.seconds:.2f} s "
        f"({result.read_bytes / 1e9 / max(result.seconds, 1e-9):.2f} GB/s): {verdict}"
    )
    return EXIT_USER_ERROR if result.faults else EXIT_OK
