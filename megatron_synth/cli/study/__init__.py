"""`megatron-synth study`: from one file to runs, fits and answers."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_synth.cli.interrupts import interruptible
from megatron_synth.cli.options.types import count, count_or_zero, on_disk, parse_verb, seconds
from megatron_synth.cli.prepare import add_options as add_prepare_options
from megatron_synth.cli.prepare import run as prepare
from megatron_synth.cli.prepare import status_text as preparation_text
from megatron_synth.cli.study.forecast import add_options as add_forecast_options
from megatron_synth.cli.study.forecast import run as forecast
from megatron_synth.cli.study.propose import add_options as add_propose_options
from megatron_synth.cli.study.propose import run as propose
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.config.load import load_file, resolve, to_yaml
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.core.files import write_atomic
from megatron_synth.core.log import say
from megatron_synth.data.preparing.prepare import RECORD
from megatron_synth.study.execute.folder import Folder, Job
from megatron_synth.study.fit.table.row_filter import number
from megatron_synth.study.plan.costs import Sources, check_sources, open_sources, require_prepared
from megatron_synth.study.plan.runs import Run, expand, jobs_of
from megatron_synth.study.plan.study_file import Study, load_study


class Opened(NamedTuple):
    """A study, expanded."""

    study: Study
    runs: list[Run]
    folder: Folder


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth study",
        description="Arms x sizes x budgets x seeds under one protocol: planned, trained, fitted, answered.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    plan = verbs.add_parser("plan", help="what would be run, what it takes and costs, what is done already")
    plan.add_argument("--runs", action="store_true", help="one line per run instead of one per cell")
    submit = verbs.add_parser("submit", help="train what is not finished; call it again to go on, or to retry what failed")
    where = submit.add_mutually_exclusive_group(required=True)
    where.add_argument("--local", action="store_true", help="on this machine, one process per run")
    where.add_argument("--slurm", action="store_true", help="as job arrays")
    submit.add_argument("--jobs", type=count, help="runs at a time. Default: one per GPU, or one on a CPU; SLURM: per node")
    submit.add_argument("--max-tokens", metavar="TOKENS", help="only the runs of budgets up to this, as before a forecast")
    submit.add_argument("--only", metavar="FILE", type=Path, help="only the runs and corpora whose names or ids stand in FILE")
    _slurm_options(submit)
    status = verbs.add_parser("status", help="done, running, failed, to do, and the time left")
    status.add_argument("--watch", nargs="?", type=seconds, const=5.0, metavar="SECONDS", help="again every so many seconds")
    status.add_argument("--runs", action="store_true", help="also name the runs that are to do")
    report = verbs.add_parser("report", help="tables, fits, figures and one HTML page, from what is finished")
    report.add_argument("--out", type=on_disk, help="folder to write. Default: report/ in the study's folder")
    report.add_argument("--from", dest="table", metavar="RUNS.csv", type=Path, help="take the runs from such a table instead")
    report.add_argument(
        "--count-generation",
        action="store_true",
        help="count what text took to generate: report.count_generation=true",
    )
    add_prepare_options(verbs.add_parser("prepare", help="prepare the text that the study names: here, or by SLURM or Ray"))
    add_propose_options(verbs.add_parser("propose", help="the mixtures to run next, written as arms into a study file"))
    add_forecast_options(verbs.add_parser("forecast", help="the loss of runs to come, written down, and scored later"))
    for verb in verbs.choices.values():
        verb.add_argument("file", metavar="FILE", help="the study file")
        verb.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="settings that replace those of the file")
    return parser


def main(argv: list[str]) -> int:
    """Run a verb of `study` and return the exit code: 1 when runs failed or are missing."""
    arguments = parse_verb(parser(), argv)
    if argv[0] == "propose":
        return propose(arguments, argv)
    return int(_VERBS[argv[0]](arguments))


def _slurm_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --slurm")
    group.add_argument("--nodes", type=count, default=1, help="nodes that the array uses at a time")
    group.add_argument("--gpus-per-node", type=count_or_zero, default=0, help="GPUs of a node; 0: CPUs only")
    group.add_argument("--cluster", help="file of configs/cluster/ with partition, account and limits")
    group.add_argument("--dry-run", action="store_true", help="write the scripts, submit nothing")


def _open(arguments: argparse.Namespace) -> Opened:
    study = load_study(arguments.file, arguments.overrides)
    return Opened(study, expand(study), Folder(study.folder))


def _checked(opened: Opened) -> Sources:
    """The sources, all prepared and large enough for every run."""
    study, runs, _ = opened
    sources = open_sources(study, runs)
    require_prepared(study, sources)
    check_sources(study, runs, sources)
    return sources


def _plan(arguments: argparse.Namespace) -> int:
    from megatron_synth.study.execute.corpora_text import corpora_text
    from megatron_synth.study.execute.status_text import plan_text
    from megatron_synth.study.fit.worth import worth_table

    study, runs, folder = _open(arguments)
    sources = open_sources(study, runs)
    uses = check_sources(study, runs, sources)
    say(plan_text(study, runs, sources, uses, folder, each=arguments.runs))
    made = corpora_text(study, runs, folder, sources.required_vocab_size)
    if made:
        say(f"\n{made}")
    seen = [(arm, name, use.epochs or 0.0) for (arm, *_), use_of in uses.items() for name, use in use_of.items()]
    repeated = worth_table(seen)
    if repeated:
        say(f"\n{repeated}")
    if importlib.util.find_spec("scipy") is None:
        say("\nWhat it will be able to show: with scipy only, which megatron-synth[study] brings")
        return EXIT_OK
    from megatron_synth.study.fit.power import power_text

    budgets: dict[str, list[float]] = {}
    for run in runs:
        budgets.setdefault(run.size, []).append(float(run.tokens))
    say("\n" + power_text({size: sorted(set(tokens)) for size, tokens in budgets.items()}, len(study.seeds)))
    return EXIT_OK


def _prepare(arguments: argparse.Namespace) -> int:
    config = _data_file(load_study(arguments.file, arguments.overrides), arguments.file)
    if config is None:
        raise UserError(f"{arguments.file}: prepare: not set; name the data file that makes the sources")
    return prepare(config, arguments)


def _data_file(study: Study, file: str) -> PrepareConfig | None:
    """What the study's sources are prepared from; None where it names nothing."""
    if study.prepare is None:
        return None
    beside = Path(file).parent if Path(file).is_file() else None
    return load_file(PrepareConfig, str(resolve(study.prepare, beside)))


def _preparation(study: Study, file: str) -> str:
    """How far the preparation of the study's text is; empty where it is done, or none of the study's."""
    try:
        config = _data_file(study, file)
    except UserError as error:  # it has been moved since
        return f"prepare: {error}"
    output = None if config is None else Path(config.output)
    return "" if output is None or (output / RECORD).is_file() else preparation_text(output)


def _submit(arguments: argparse.Namespace) -> int:
    with interruptible("runs that are finished are kept, others go on from their checkpoints; the same command goes on"):
        return _submit_all(arguments)


def _submit_all(arguments: argparse.Namespace) -> int:
    opened = _open(arguments)
    study, runs, folder = opened
    sources = _checked(opened)
    jobs = jobs_of(_up_to(runs, arguments.max_tokens))
    chosen = _only(jobs, arguments.only) if arguments.only else jobs
    folder.prepare()
    write_atomic(folder.study, to_yaml(study))
    if arguments.slurm:
        from megatron_synth.study.execute.slurm import ArrayOptions, submit_array

        where = {name: getattr(arguments, name) for name in ("nodes", "gpus_per_node", "jobs", "cluster", "dry_run")}
        return submit_array(study, chosen, folder, ArrayOptions(**where))
    from megatron_synth.study.execute.local import Execution, Slots

    slots = Slots.of_machine(arguments.jobs)
    return Execution(study, folder, chosen, slots, sources.required_vocab_size).go()


def _up_to(runs: list[Run], text: str | None) -> list[Run]:
    if text is None:
        return runs
    limit = number(text)
    chosen = [run for run in runs if limit is not None and run.tokens <= limit]
    if not chosen:
        smallest = min((run.tokens for run in runs), default=0)
        raise UserError(f"--max-tokens {text}: no run is that small; the smallest budget is {smallest:,} tokens")
    return chosen


def _only(jobs: Sequence[Job], file: Path) -> list[Job]:
    try:
        wanted = file.read_text(encoding="utf-8").split()
    except OSError as error:
        raise UserError(f"--only {file}: {error.strerror}") from None
    by_name = {name: job for job in jobs for name in (job.name, job.id)}
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise UserError(f"--only {file}: no run of the study is called {', '.join(unknown[:3])}")
    return [by_name[name] for name in dict.fromkeys(wanted)]


def _status(arguments: argparse.Namespace) -> int:
    from megatron_synth.study.execute.corpora_text import corpora_text
    from megatron_synth.study.execute.status_text import status_text

    study, runs, folder = _open(arguments)
    while True:
        parts = [
            _preparation(study, arguments.file),
            status_text(study, runs, folder, each=arguments.runs),
            corpora_text(study, runs, folder),
        ]
        text = "\n\n".join(part for part in parts if part)
        if arguments.watch is None:
            say(text)
            return EXIT_OK
        # the screen is cleared with the text at hand, so that nothing flickers
        say(text, control="\033[H\033[2J" if sys.stdout.isatty() else "")
        if all(folder.state(job) in ("done", "failed") for job in jobs_of(runs)):
            return EXIT_OK
        time.sleep(arguments.watch)


def _report(arguments: argparse.Namespace) -> int:
    from megatron_synth.study.report.report import write_report

    if arguments.count_generation:
        arguments.overrides = [*arguments.overrides, "report.count_generation=true"]
    opened = _open(arguments)
    page = write_report(*opened, out=arguments.out, table=arguments.table)
    say(str(page))
    return EXIT_OK


_VERBS = {"plan": _plan, "prepare": _prepare, "submit": _submit, "status": _status, "report": _report, "forecast": forecast}
