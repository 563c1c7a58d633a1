"""`megatron-synth prepare FILE [a.b=c ...]`, `prepare verify` and `prepare duplicates`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_synth.cli.argparse_types import count
from megatron_synth.cli.interrupts import interruptible
from megatron_synth.config.errors import EXIT_OK
from megatron_synth.config.load import load_file
from megatron_synth.config.prepare import VALID_SUFFIX, PrepareConfig
from megatron_synth.core.log import show
from megatron_synth.data.preparing.output import is_clean, partial_name
from megatron_synth.data.preparing.pipeline import Prepared
from megatron_synth.data.preparing.prepare import SKIPPED, prepare
from megatron_synth.data.preparing.workers import core_count


def format_table(prepared: Sequence[Prepared]) -> str:
    """What was made, one line per source. Sources of one reading show its time; tokens/s counts both."""
    rows = [("source", "split", "documents", "tokens", "bytes", "bytes/token", "shards", "seconds", "tokens/s")]
    for one in prepared:
        counts, name = one.manifest.counts, one.manifest.name
        family = {name, name + VALID_SUFFIX, name.removesuffix(VALID_SUFFIX)}
        tokens = sum(other.manifest.counts.tokens for other in prepared if other.manifest.name in family)
        rows.append(
            (
                name,
                one.manifest.split,
                f"{counts.documents:,}",
                f"{counts.tokens:,}",
                f"{counts.text_bytes:,}",
                f"{counts.text_bytes / counts.tokens:.3f}",
                str(len(one.manifest.shards)),
                f"{one.seconds:.1f}",
                f"{tokens / max(one.seconds, 1e-9):,.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at < 2 else cell.rjust(width) for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _check_verb(verb: str) -> Callable[[list[str]], int]:
    if verb == "verify":
        from megatron_synth.cli.prepare.verify import main as check_files

        return check_files
    from megatron_synth.cli.prepare.duplicates import main as count_duplicates

    return count_duplicates


def _kept(output: Path) -> str:
    """What an interrupted preparation leaves."""
    if is_clean(output):
        return "nothing was written; the same command starts again"
    return f"what is done is kept in {partial_name(output)}; the same command goes on from there"


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth prepare",
        description="Turn text into token shards.",
        epilog="Of prepared folders: `prepare verify FOLDER...` compares checksums, `prepare duplicates FOLDER...` "
        "counts texts that several share.",
    )
    parser.add_argument("file", help="what to prepare (YAML); see configs/data/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings to replace, such as output=data/mine"
    )
    parser.add_argument(
        "--workers", type=count, default=core_count(), help="processes that tokenize (default: all cores, %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace a finished output")
    return parser


def main(argv: list[str]) -> int:
    """`megatron-synth prepare FILE [a.b=c ...] [--workers N] [--force]`, `prepare verify` and `prepare duplicates`."""
    if argv and argv[0] in ("verify", "duplicates"):
        return _check_verb(argv[0])(argv[1:])
    arguments = parser().parse_intermixed_args(argv)

    config = load_file(PrepareConfig, arguments.file, arguments.overrides)
    start = time.perf_counter()
    with interruptible(lambda: _kept(Path(config.output))):
        prepared = prepare(config, workers=arguments.workers, force=arguments.force)
    if prepared is None:
        show(f"{config.output}: up to date")
        return EXIT_OK
    show(format_table(prepared))
    for one in prepared:
        if one.skipped:
            listed = f"{config.output}/{one.manifest.name}/{SKIPPED}"
            show(f"{one.manifest.name}: {len(one.skipped):,} records were no text and are left out; {listed} lists them")
        packing, counts = one.manifest.packing, one.manifest.counts
        if packing is not None:
            show(
                f"{one.manifest.name}: {packing.cut_documents:,} of {counts.documents:,} documents are longer than "
                f"{packing.sequence_length} tokens and cut ({packing.cut_without:,} would be cut end to end); padding "
                f"{packing.padding_tokens / counts.tokens:.3%} of the tokens"
            )
    show(f"{config.output}: prepared in {time.perf_counter() - start:.1f} s")
    return EXIT_OK
