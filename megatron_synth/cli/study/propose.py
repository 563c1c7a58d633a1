"""`megatron-synth study propose`: the mixtures to run next, as a study file."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_synth.cli.options.share_bounds import bounds_of
from megatron_synth.cli.options.types import count, count_or_zero, on_disk
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.config.load import resolve
from megatron_synth.core.log import say
from megatron_synth.study.execute.folder import Folder
from megatron_synth.study.fit.table.row_filter import number
from megatron_synth.study.plan.costs import check_sources, open_sources
from megatron_synth.study.plan.runs import Run, expand
from megatron_synth.study.plan.study_file import Study, load_study
from megatron_synth.study.report.collect import Row


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    from megatron_synth.study.search.sequential import DESIGNS

    add = parser.add_argument
    add("--count", type=count, default=16, help="arms to propose; default %(default)s")
    add(
        "--design",
        metavar="NAME",
        help=f"{' | '.join(DESIGNS)}; default: expected-improvement where runs are finished, else space-filling",
    )
    add("--from", dest="table", metavar="RUNS.csv", type=Path, help="take the runs from such a table instead")
    add("--target", default="loss", help="loss (the study's aggregate) | worst | DOMAIN | a=0.7,b=0.3; default %(default)s")
    add("--size", help="compare mixtures at this size; default: where most of them were run")
    add("--budget", metavar="TOKENS", help="and at this budget of the study")
    add("--tokens", metavar="TOKENS", help="budget at which sources must suffice; default: the study's largest")
    add(
        "--bounds",
        action="append",
        default=[],
        metavar="SOURCE=LOW:HIGH",
        help="lowest and highest share of a source; may be given again",
    )
    add("--seed", type=count_or_zero, default=0, help="of candidates; default %(default)s")
    add("--out", type=on_disk, metavar="NEW.yaml", help="study file to write; default FILE-proposed.yaml")


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Propose, write the study file, and say what is in it."""
    from megatron_synth.study.search.proposal import (
        measured_of,
        proposal_text,
        propose,
        space_of,
        write_study,
    )

    base = resolve(arguments.file)
    study = load_study(arguments.file, arguments.overrides)
    if arguments.overrides:
        raise UserError("study propose writes a file that builds on FILE, so overrides would be lost; put them into the file")
    runs = expand(study)
    sources = open_sources(study, runs)
    tokens = _tokens("--tokens", arguments.tokens)
    space = space_of(study, runs, sources, bounds_of(arguments.bounds), tokens)
    rows = _rows(study, runs, arguments.table)
    measured = None
    if rows:
        budget = _tokens("--budget", arguments.budget)
        whole = None if budget is None else int(budget)
        measured = measured_of(study, rows, arguments.target, size=arguments.size, tokens=whole)
    proposal = propose(study, space, arguments.count, design=arguments.design, measured=measured, seed=arguments.seed)
    out = arguments.out or base.with_name(f"{base.stem}-proposed.yaml")
    write_study(out, base, proposal, shlex.join(["megatron-synth", "study", *argv]))
    try:
        new = load_study(out)
        check_sources(new, expand(new), sources)
    except UserError:
        out.unlink()
        raise
    say(proposal_text(proposal, tokens or max(run.tokens for run in runs)))
    if len(proposal.arms) < arguments.count:
        say(f"{len(proposal.arms)} of {arguments.count}: the others are arms of the study already")
    if all(cells.arms is not None for cells in study.grid):
        say(f"the grid of {base} names its arms, so none of the new ones will be run: name them there")
    say(f"-> {out}")
    return EXIT_OK


def _rows(study: Study, runs: list[Run], path: Path | None) -> list[Row]:
    from megatron_synth.study.report.collect import collect, read_runs_csv

    if path is not None:
        return list(read_runs_csv(path))
    folder = Folder(study.folder)
    if not any(folder.result(run) is not None for run in runs):
        return []
    return list(collect(study, runs, folder).rows)


def _tokens(option: str, text: str | None) -> float | None:
    value = None if text is None else number(text)
    if text is not None and (value is None or value <= 0):
        raise UserError(f"{option} '{text}': expected a number of tokens, such as 20B")
    return value
