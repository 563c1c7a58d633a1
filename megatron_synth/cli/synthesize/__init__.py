"""`megatron-synth synthesize plan|run|status|report FILE [a.b=c ...]`."""

from __future__ import annotations

import argparse
import signal
from types import FrameType

from megatron_synth.cli.argparse_types import count, parse_verb
from megatron_synth.config.errors import EXIT_OK, EXIT_STOPPED, UserError
from megatron_synth.core.log import show


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
    verbs.add_parser("run", help="ask what has no answer yet, filter, and write the corpus; again to go on")
    verbs.add_parser("status", help="what has been made, and rejected by which reason")
    verbs.add_parser("report", help="the account, the cost, and samples beside their parents")
    for verb in verbs.choices.values():
        verb.add_argument("file", metavar="FILE", help="the synthesis file; see configs/synthesis")
        verb.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace those of the file")
    return parser


def main(argv: list[str]) -> int:
    """Run a verb of `synthesize` and return the exit code: 75 when no server answers, or on a request to stop."""
    arguments = parse_verb(parser(), argv)
    return _VERBS[argv[0]](arguments)


def _plan(arguments: argparse.Namespace) -> int:
    from megatron_synth.synthesis.plan import count as count_requests
    from megatron_synth.synthesis.plan import plan_text
    from megatron_synth.synthesis.setup import Setup
    from megatron_synth.synthesis.synthesis_file import load_synthesis

    if arguments.price is not None and not 0 <= arguments.price < float("inf"):
        raise UserError(f"--price: expected a number from 0, got {arguments.price}")
    setup = Setup.of(load_synthesis(arguments.file, arguments.overrides), export=False)
    setup.warn()
    show(plan_text(setup, count_requests(setup), arguments.gpus, arguments.price))
    return EXIT_OK


def _run(arguments: argparse.Namespace) -> int:
    from megatron_synth.synthesis.run import run
    from megatron_synth.synthesis.status import account_text
    from megatron_synth.synthesis.synthesis_file import load_synthesis

    config = load_synthesis(arguments.file, arguments.overrides)
    stop = _StopRequest()
    outcome = run(config, lambda: stop.requested)
    again = "what was answered is kept: the same command goes on"
    if outcome.gone is not None:
        show(f"stopped: {outcome.gone}; {again}", error=True)
        return EXIT_STOPPED
    if outcome.account is None:
        show(f"stopped on request; {again}", error=True)
        return EXIT_STOPPED
    show(account_text(outcome.account))
    if outcome.record is None:
        show(f"{outcome.account.unanswered:,} requests have no answer, more than max_unanswered; {again}", error=True)
        return EXIT_STOPPED
    show(f"{config.output}: {outcome.record.documents:,} documents; {outcome.record.license}")
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
