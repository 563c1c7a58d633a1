"""The command line: a verb names a function, which is imported only when it is called.

A function takes the arguments after its verb and returns the exit code: 0 done, 1 a check found differences, 2 wrong
configuration or input, 70 a rank hangs or is gone, 75 stopped on request, 141 nobody reads the output any more.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import TextIO

from megatron_synth import __version__
from megatron_synth.config.errors import EXIT_OK, EXIT_UNREAD, EXIT_USER_ERROR, PeerError, RankError, UserError
from megatron_synth.core.compiler_cache import keep_to_own_folder
from megatron_synth.core.exit_record import report
from megatron_synth.core.log import show
from megatron_synth.core.processes import end_with_parent
from megatron_synth.train.signals import EXIT_INTERRUPTED, listen

EXIT_FAILURE = 1  # Python's own, after a traceback

EXTRAS = dict.fromkeys(("matplotlib", "scipy", "markupsafe", "threadpoolctl"), "study") | dict.fromkeys(
    ("httptools", "jinja2", "msgspec", "py3langid", "transformers", "uvloop"), "synthesis"
)
"""Libraries that not everybody needs -> the extra of this package that brings them."""
VERBS = {
    "prepare": "turn text into token shards",
    "synthesize": "plan | run | status | report: make synthetic text from natural documents",
    "plan": "layouts of a model on GPUs: memory and predicted speed, on paper",
    "train": "train a model, alone or under torchrun; resumes by itself",
    "submit": "train on SLURM nodes: check, write the job, put it into the queue",
    "status": "where runs stand: step, loss, speed, time left, restarts",
    "logs": "what the job of a run has printed, by rank, live",
    "doctor": "check this machine, or SLURM nodes, before a long run",
    "eval": "loss and bits per byte of a checkpoint on each domain, or downstream tasks",
    "generate": "let a run, or a model of Hugging Face, continue prompts",
    "mix": "plan | show N | audit RUN: look into the mixture of a run",
    "checkpoint": "ls | verify | prune | merge RUN: look after checkpoints",
    "config": "show FILE | check FILE: resolve or check a configuration",
    "convert": "to-hf | from-hf: exchange weights with Hugging Face",
    "study": "plan | prepare | submit | status | report | propose | forecast: from one file to fitted laws",
    "bench": "measure training, kernels, loader, checkpoints ...: bench alone lists them",
    "kernels": "which implementation of each operation this machine uses, and why",
    "fit": "fit a scaling law to a table of runs",
    "report": "summarize a run directory in text and figures",
    "completion": "bash | zsh | fish: the script that completes verbs, options and settings in a shell",
}
"""Verb -> what it does. `cli/VERB.py` has its `parser()` and its `main(argv)`."""


COMPILING = ("train", "eval", "bench", "kernels", "study", "synthesize")
"""Verbs in which torch may compile."""


def usage() -> str:
    """The text of --help."""
    width = max(map(len, VERBS))
    lines = [
        "usage: megatron-synth VERB [ARGUMENT ...]",
        "",
        "Pre-training of language models on exact mixtures of natural and synthetic text.",
        "",
        *(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()),
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
    loaded: Callable[[list[str]], int] = importlib.import_module(f"megatron_synth.cli.{verb}").main
    return loaded


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if "_ARGCOMPLETE" in os.environ:
        importlib.import_module("megatron_synth.cli.completion").complete()
    if arguments[:1] == ["train"]:
        listen()  # before its imports: a request to stop in the first seconds counts, too
    if "TORCHELASTIC_RUN_ID" in os.environ:  # ranks whose launcher was killed would meet those of the next start
        end_with_parent(signal.SIGKILL)
    return guarded(_dispatch, arguments)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        show(usage())
        return EXIT_OK if arguments else EXIT_USER_ERROR
    if arguments[0] == "--version":
        show(f"megatron-synth {__version__}")
        return EXIT_OK
    check_environment()
    if arguments[0] in COMPILING:
        keep_to_own_folder()
    return load(arguments[0])(arguments[1:])


def check_environment() -> None:
    """Refuse numbers of a launcher that are none: whoever asks for them later would fail, or stay silent.

    Raises:
        RankError: names the variable.
    """
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdecimal()) or (name == "WORLD_SIZE" and int(value) == 0 and name in os.environ):
            expected = "a whole number, as launchers such as torchrun set it"
            raise RankError(f"{name}={value!a} in the environment: expected {expected}; unset {name} to run without one")


def guarded(run: Callable[[list[str]], int], arguments: list[str]) -> int:
    """What `run` returns, with errors of users and of the system as one line and the exit recorded."""
    try:
        code = _flushed(run, arguments)
        report(code)
        return code
    except UserError as error:
        report(error.exit_code, error)
        # every rank ends; one of them says why
        told = isinstance(error, PeerError)
        if isinstance(error, RankError) or (os.environ.get("RANK", "0") == "0" and not told):
            show(f"error: {error}", error=True)
        return error.exit_code
    except KeyboardInterrupt as error:
        return 128 + getattr(error, "number", EXIT_INTERRUPTED - 128)  # as shells do
    except SystemExit as error:  # argparse
        report(error.code if isinstance(error.code, int) else EXIT_FAILURE, error)
        raise
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            report(EXIT_UNREAD, error)
            return EXIT_UNREAD  # quietly: the reader, such as `head`, has seen enough; but what was begun is not done
        if not _is_mishap(error):
            report(EXIT_FAILURE, error)
            raise
        report(EXIT_USER_ERROR, error)
        show(f"error: {_mishap(error)}", error=True)
        return EXIT_USER_ERROR
    except ModuleNotFoundError as error:
        report(EXIT_USER_ERROR, error)
        extra = EXTRAS.get(str(error.name).partition(".")[0])
        if extra is None:
            raise
        name = f"megatron-synth[{extra}]"
        show(f"error: {error.name} is not installed, and this needs it: pip install '{name}'", error=True)
        return EXIT_USER_ERROR
    except Exception as error:
        report(EXIT_FAILURE, error)
        raise
    finally:
        _let_go()


def _flushed(run: Callable[[list[str]], int], arguments: list[str]) -> int:
    """What `run` returns; what Python has buffered fails here, where it can be told, and not at its exit."""
    try:
        return run(arguments)
    finally:
        if sys.stdout is not None and not isinstance(sys.exc_info()[1], OSError):
            sys.stdout.flush()


def _is_mishap(error: OSError) -> bool:
    """Whether a user can fix it: a disk, a path, a permission. Faults of peers and networks may pass at another start."""
    passing = (ConnectionError, TimeoutError, ChildProcessError, BlockingIOError)
    return error.errno is not None and not isinstance(error, passing)


def _mishap(error: OSError) -> str:
    """One line that names the file."""
    files = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    if not files and _cannot_be_written(sys.stdout):
        files = ["standard output"]
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ else ""
    return f"{rank}{' -> '.join(files) or type(error).__name__}: {error.strerror or error}"


def _cannot_be_written(stream: TextIO | None) -> bool:
    """Whether what waits in a stream's buffer still fails to be written."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        return True
    return False


def _nobody_reads() -> bool:
    """Whether standard output, or standard error, is a pipe whose reader has gone."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)  # errors are reported unasked
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _let_go() -> None:
    """Keep the interpreter from writing at its exit what could not be written."""
    if _cannot_be_written(sys.stdout):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
