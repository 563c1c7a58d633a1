"""The command line: a verb names a function, which is imported only when it is called.

A function takes the arguments after its verb and returns the exit code: 0 done, 1 a check found differences, 2 wrong
configuration or input, 70 a rank hangs or is gone, 75 stopped on request.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from megatron_synth import __version__
from megatron_synth.config.errors import EXIT_OK, EXIT_USER_ERROR, RankError, UserError
from megatron_synth.core.exit_record import report
from megatron_synth.train.signals import EXIT_INTERRUPTED, listen

EXIT_FAILURE = 1  # Python's own, after a traceback

VERBS: dict[str, tuple[str, str]] = {
    "prepare": ("megatron_synth.cli.prepare:main", "turn text into token shards"),
    "plan": ("megatron_synth.cli.plan:main", "layouts of a model on GPUs: memory and predicted speed, on paper"),
    "train": ("megatron_synth.cli.train:main", "train a model, alone or under torchrun; resumes by itself"),
    "submit": ("megatron_synth.cli.submit:main", "train on SLURM nodes: check, write the job, put it into the queue"),
    "status": ("megatron_synth.cli.status:main", "where runs stand: step, loss, speed, time left, restarts"),
    "logs": ("megatron_synth.cli.status:logs", "what the job of a run has printed, by rank, live"),
    "doctor": ("megatron_synth.cli.doctor:main", "check this machine, or SLURM nodes, before a long run"),
    "eval": ("megatron_synth.cli.eval:main", "loss and bits per byte of a checkpoint on each domain"),
    "mix": ("megatron_synth.cli.mix:main", "plan | show N | audit RUN: look into the mixture of a run"),
    "checkpoint": ("megatron_synth.cli.checkpoint:main", "ls RUN | verify RUN | prune RUN: look after checkpoints"),
    "config": ("megatron_synth.cli.config:main", "show FILE | check FILE: resolve or check a configuration"),
    "convert": ("megatron_synth.cli.convert:main", "to-hf | from-hf: exchange weights with Hugging Face"),
    "study": ("megatron_synth.cli.study:main", "plan | prepare | submit | status | report: from one file to fitted laws"),
    "bench": ("megatron_synth.cli.bench:main", "measure training, kernels, loader, checkpoints ...: bench alone lists them"),
    "kernels": ("megatron_synth.cli.kernels:main", "which implementation of each operation this machine uses, and why"),
    "fit": ("megatron_synth.cli.fit:main", "fit a scaling law to a table of runs"),
    "report": ("megatron_synth.train.record.plot:main", "summarize a run directory in text and figures"),
}


def usage() -> str:
    """The text of --help."""
    width = max(map(len, VERBS))
    lines = [
        "usage: megatron-synth VERB [ARGUMENT ...]",
        "",
        "Pre-training of language models on exact mixtures of natural and synthetic text.",
        "",
        *(f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items()),
        "",
        "megatron-synth VERB --help tells more; --version prints the version.",
    ]
    return "\n".join(lines)


def load(verb: str) -> Callable[[list[str]], int]:
    """The function behind a verb.

    Raises:
        UserError: there is no such verb.
    """
    if verb not in VERBS:
        import difflib

        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"one of: {', '.join(VERBS)}"
        raise UserError(f"unknown verb '{verb}'; {hint}")
    module, _, function = VERBS[verb][0].partition(":")
    loaded: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
    return loaded


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return EXIT_OK if arguments else EXIT_USER_ERROR
    if arguments[0] == "--version":
        print(f"megatron-synth {__version__}")
        return EXIT_OK
    if arguments[0] == "train":
        listen()  # before its imports: a request to stop in the first seconds counts, too
    return guarded(lambda rest: load(arguments[0])(rest), arguments[1:])


def guarded(run: Callable[[list[str]], int], arguments: list[str]) -> int:
    """What `run` returns, with the user's errors as one line and the exit recorded."""
    try:
        code = run(arguments)
        report(code)
        return code
    except UserError as error:
        report(EXIT_USER_ERROR, error)
        # every rank ends; one of them says why
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader, such as `head`, has seen enough; keep the interpreter from flushing into the closed pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except SystemExit as error:  # argparse
        report(error.code if isinstance(error.code, int) else EXIT_FAILURE, error)
        raise
    except Exception as error:
        report(EXIT_FAILURE, error)
        raise
