"""`megatron-synth prepare duplicates`: what prepared sources share, as a table and as JSON."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_synth.cli.options import slurm
from megatron_synth.cli.options.types import count, on_disk, tokens
from megatron_synth.cli.prepare.tables import aligned
from megatron_synth.cli.prepare.verify import source_folders
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.core.files import write_json
from megatron_synth.core.log import show
from megatron_synth.core.share import Share
from megatron_synth.data.overlap.minhash import Duplicates, Settings, find_duplicates
from megatron_synth.data.overlap.shares import do_share, finish


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth prepare duplicates",
        description="Count equal and nearly equal documents of prepared sources, and validation text seen in training.",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a prepared source, or a folder of them")
    parser.add_argument("--shingle", type=tokens, default=8, help="tokens of the n-grams of near duplicates (%(default)s)")
    parser.add_argument("--threshold", type=float, default=0.8, help="least Jaccard similarity of these (%(default)s)")
    parser.add_argument("--ngram", type=tokens, default=13, help="tokens of an n-gram that counts as seen (%(default)s)")
    parser.add_argument("--json", type=on_disk, metavar="FILE", help="write the result")
    parser.add_argument(
        "--part-mib",
        type=count,
        default=32,
        metavar="MIB",
        help="records that are sorted at a time; bounds memory (%(default)s)",
    )
    group = parser.add_argument_group("over several processes or nodes")
    group.add_argument("--work", type=on_disk, metavar="DIR", help="a shared folder for what shares have gathered")
    group.add_argument(
        "--share", metavar="K/N", help="only gather share K, from 0, of N; without it the same command compares all shares"
    )
    group.add_argument("--slurm", action="store_true", help="the shares as an array of SLURM, and then the comparison")
    group.add_argument("--tasks", type=count, metavar="N", help="with --slurm: shares, each on a node")
    slurm.add_options(parser.add_argument_group("with --slurm"))
    return parser


def _submit(options: argparse.Namespace, folders: Sequence[Path]) -> int:
    from megatron_synth.cluster.duplicates import REPORT, Comparison, submit_comparison
    from megatron_synth.data.overlap.sources import Sources

    if options.tasks is None:
        raise UserError("--tasks: say how many shares the array has")
    if options.share is not None:
        raise UserError("--share: not with --slurm, whose tasks do all shares")
    Sources(folders)  # says now what is wrong with them
    asked = Comparison(
        folders=tuple(str(folder.resolve()) for folder in folders),
        work=str(options.work.resolve()),
        shingle=options.shingle,
        threshold=options.threshold,
        ngram=options.ngram,
        part_mib=options.part_mib,
        json_file=str((options.json or options.work / REPORT).resolve()),
    )
    submit_comparison(asked, options.tasks, slurm.cluster_of(options), dry_run=options.dry_run)
    return EXIT_OK


def main(argv: list[str]) -> int:
    """`megatron-synth prepare duplicates FOLDER... [--work DIR [--share K/N]] [--json FILE]`."""
    options = parser().parse_args(argv)
    if not 0 < options.threshold <= 1:
        raise UserError(f"--threshold: expected a number above 0 and at most 1, got {options.threshold}")
    start = time.perf_counter()
    if not options.slurm:
        slurm.refuse_without_slurm(options, "tasks")
    if options.work is None and (options.slurm or options.share is not None):
        name = "--slurm" if options.slurm else "--share"
        raise UserError(f"{name}: where do shares put what they gather? give --work, a folder that all of them see")
    folders = source_folders(options.folders)
    if options.slurm:
        return _submit(options, folders)
    settings = Settings(options.shingle, options.threshold, options.ngram, options.part_mib * 2**20)
    if options.share is not None:
        made = do_share(folders, settings, Share.parse(options.share), options.work)
        state = f"gathered in {time.perf_counter() - start:.1f} s" if made else "was there"
        show(f"{options.work}: share {options.share} {state}; the command without --share compares all")
        return EXIT_OK
    if options.work is not None:
        found = finish(folders, settings, options.work)
    else:
        found = find_duplicates(folders, **asdict(settings))
    show(render(found))
    show(f"\n{sum(found.sources.values()):,} documents in {time.perf_counter() - start:.1f} s")
    if options.json is not None:
        write_json(options.json, asdict(found))
    return EXIT_OK


def render(found: Duplicates) -> str:
    """The report as text."""
    shared: list[tuple[str, ...]] = [("documents of", "also in", "documents", "exact", "near")]
    for one in found.shared:
        if one.exact or one.near or one.source == one.other:
            other = "itself, again" if one.source == one.other else one.other
            cells = (_share(count, one.documents) for count in (one.exact, one.near))
            shared.append((one.source, other, f"{one.documents:,}", *cells))
    lines = [
        *aligned(shared),
        "",
        f"near: Jaccard similarity of {found.shingle}-grams of tokens of at least {found.threshold}, estimated, equal "
        f"documents included; pairs of sources that share nothing are left out",
        f"{found.redundant:,} documents to remove so that none occurs twice",
    ]
    if found.contamination:
        rows: list[tuple[str, ...]] = [
            ("validation", "training", "documents", "any n-gram seen", "half of them", "n-grams seen")
        ]
        for two in found.contamination:
            counts = (_share(count, two.documents) for count in (two.any, two.half))
            rows.append((two.validation, two.training, f"{two.documents:,}", *counts, _share(two.ngrams_seen, two.ngrams)))
        lines += ["", *aligned(rows), "", f"n-grams of {found.ngram} tokens; documents shorter than that are left out"]
    return "\n".join(lines)


def _share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.2f} %)" if total else "0"
