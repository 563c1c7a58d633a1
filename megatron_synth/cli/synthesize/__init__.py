"""`megatron-synth synthesize plan|run|status|report FILE [a.b=c ...]`."""

from __future__ import annotations

import argparse
import signal
from types import FrameType
from typing import TYPE_CHECKING

from megatron_synth.cli.options import slurm
from megatron_synth.cli.options.types import count, count_or_zero, parse_verb
from megatron_synth.config.errors import EXIT_OK, EXIT_STOPPED, UserError
from megatron_synth.core.log import show

if TYPE_CHECKING:
    from megatron_synth.synthesis.synthesis_file import SynthesisConfig


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth synthesize",
        description="Make synthetic text from natural documents: rephrased, as questions and answers, as textbooks.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    plan = verbs.add_parser("plan", help="documents, chunks, tokens, time and cost, before anything runs")
    plan.add_argument("--gpus", type=count, default=1, metavar="N", help="devices that generate (default: 1)")
    plan.add_argument("--price", type=float, metavar="P", help="of a device and hour, to tell the cost")
    run = verbs.add_parser("run", help="ask what has no answer yet, filter, and write the corpus; again to go on")
    part = run.add_mutually_exclusive_group()
    part.add_argument("--share", metavar="K/N", help="only answer the requests of share K, from 0, of N; for schedulers")
    part.add_argument("--judge", action="store_true", help="ask nothing: make the corpus of the answers that are there")
    part.add_argument("--slurm", action="store_true", help="as an array of SLURM, with an engine on each node")
    _slurm_options(run)
    verbs.add_parser("status", help="what has been made, and rejected by which reason")
    verbs.add_parser("report", help="the account, the cost, and samples beside their parents")
    for verb in verbs.choices.values():
        verb.add_argument("file", metavar="FILE", help="the synthesis file; see configs/synthesis")
        verb.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace those of the file")
    return parser


def _slurm_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --slurm")
    group.add_argument("--nodes", type=count, metavar="N", help="nodes, each of which answers a share")
    group.add_argument("--gpus-per-node", type=count_or_zero, metavar="G", help="default: the cluster's, or 0: CPUs only")
    slurm.add_options(group)


def main(argv: list[str]) -> int:
    """Run a verb of `synthesize` and return the exit code: 75 when no server answers, or on a request to stop."""
    arguments = parse_verb(parser(), argv)
    return _VERBS[argv[0]](arguments)


def _plan(arguments: argparse.Namespace) -> int:
    from megatron_synth.synthesis.plan import count as count_requests
    from megatron_synth.synthesis.plan import plan_text
    from megatron_synth.synthesis.recombined import extraction, is_missing
    from megatron_synth.synthesis.setup import Setup
    from megatron_synth.synthesis.synthesis_file import load_synthesis

    if arguments.price is not None and not 0 <= arguments.price < float("inf"):
        raise UserError(f"--price: expected a number from 0, got {arguments.price}")
    config = load_synthesis(arguments.file, arguments.overrides)
    if is_missing(config):
        assert config.walks is not None
        texts = config.walks.count * config.per_parent
        show(f"{config.output}: the concepts come first, and then {texts:,} requests about them; `plan` counts these later")
        config = extraction(config)
    setup = Setup.of(config, export=False)
    setup.warn()
    setup.check_known_context()
    show(plan_text(setup, count_requests(setup), arguments.gpus, arguments.price))
    return EXIT_OK


def _run(arguments: argparse.Namespace) -> int:
    from megatron_synth.synthesis.run import run
    from megatron_synth.synthesis.shares import Share
    from megatron_synth.synthesis.status import account_text
    from megatron_synth.synthesis.synthesis_file import load_synthesis

    config = load_synthesis(arguments.file, arguments.overrides)
    if arguments.slurm:
        return _submit(config, arguments)
    slurm.refuse_without_slurm(arguments, "nodes", "gpus_per_node")
    share = None if arguments.share is None else Share.parse(arguments.share)
    stop = _StopRequest()
    outcome = run(config, lambda: stop.requested, share=share, ask=not arguments.judge)
    again = "what was answered is kept: the same command goes on"
    if outcome.gone is not None:
        show(f"stopped: {outcome.gone}; {again}", error=True)
        return EXIT_STOPPED
    if outcome.missing == 0:
        show(f"{config.output}: share {arguments.share} is answered; `synthesize run` makes the corpus when all are")
        return EXIT_OK
    if outcome.missing:
        show(f"{outcome.missing:,} requests of share {arguments.share} have no answer; {again}", error=True)
        return EXIT_STOPPED
    if outcome.account is None:
        show(f"stopped on request; {again}", error=True)
        return EXIT_STOPPED
    show(account_text(outcome.account))
    if outcome.record is None and arguments.judge:
        raise UserError(
            f"{config.output}: {outcome.account.unanswered:,} requests have no answer, more than max_unanswered; give "
            "`synthesize run` without --judge, which asks for them"
        )
    if outcome.record is None:
        show(f"{outcome.account.unanswered:,} requests have no answer, more than max_unanswered; {again}", error=True)
        return EXIT_STOPPED
    show(f"{config.output}: {outcome.record.documents:,} documents; {outcome.record.license}")
    return EXIT_OK


def _submit(config: SynthesisConfig, arguments: argparse.Namespace) -> int:
    from megatron_synth.synthesis.jobs import JobOptions, submit_synthesis

    if arguments.nodes is None:
        raise UserError("--nodes: say on how many the array runs")
    cluster = slurm.cluster_of(arguments)
    gpus = arguments.gpus_per_node if arguments.gpus_per_node is not None else cluster.gpus_per_node or 0
    submit_synthesis(config, JobOptions(arguments.nodes, gpus, cluster, arguments.dry_run))
    return EXIT_OK


def _status(arguments: argparse.Namespace) -> int:
    from megatron_synth.synthesis.status import status_text
    from megatron_synth.synthesis.synthesis_file import load_synthesis

    show(status_text(load_synthesis(arguments.file, arguments.overrides)))
    return EXIT_OK


def _report(arguments: argparse.Namespace) -> int:
    from megatron_synth.synthesis.report import write_report
    from megatron_synth.synthesis.synthesis_file import load_synthesis

    show(str(write_report(load_synthesis(arguments.file, arguments.overrides))))
    return EXIT_OK


class _StopRequest:
    """Listens for a scheduler's signals and Ctrl-C; a second one is Python's own."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)


_VERBS = {"plan": _plan, "run": _run, "status": _status, "report": _report}
