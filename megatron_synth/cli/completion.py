"""`megatron-synth completion bash|zsh|fish`, and what a shell asks when a user presses the tabulator."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Iterator

import argcomplete

from megatron_synth.cli.main import VERBS
from megatron_synth.config.errors import EXIT_OK
from megatron_synth.core.log import show

SHELLS = ("bash", "zsh", "fish")
GROUPS = {"bench": ("train", "kernels", "health", "memory", "gpu", "report"), "prepare": ("verify", "duplicates")}
"""Verbs whose second word names a module of its own: cli/bench/train.py, cli/prepare/verify.py."""


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth completion",
        description="Print the script that completes verbs, options and settings.",
        epilog='bash, zsh: eval "$(megatron-synth completion bash)"; fish: megatron-synth completion fish | source',
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def main(argv: list[str]) -> int:
    """Print the script of a shell and return the exit code."""
    options = parser().parse_args(argv)
    show(argcomplete.shellcode(["megatron-synth"], shell=options.shell))
    return EXIT_OK


def complete() -> None:
    """Answer the shell and end the process."""
    words = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split()[1:]
    argcomplete.autocomplete(whole_parser(words))


def whole_parser(words: list[str]) -> argparse.ArgumentParser:
    """A parser of all verbs. Only the verb that `words` begin with knows its options: each takes an import."""
    whole = argparse.ArgumentParser(prog="megatron-synth")
    verbs = whole.add_subparsers()
    for verb, text in VERBS.items():
        verbs.add_parser(verb, help=text)
    if words and words[0] in VERBS:
        verb = words[0]
        found = _of_module(verb)
        if verb == "bench" or (verb == "prepare" and words[1:2] and words[1] in GROUPS[verb]):
            found = argparse.ArgumentParser(prog=f"megatron-synth {verb}")
            inner = found.add_subparsers()
            for name in GROUPS[verb]:
                inner.add_parser(name)
            if words[1:2] and words[1] in GROUPS[verb]:
                inner.choices[words[1]] = _of_module(f"{verb}.{words[1]}")
        verbs.choices[verb] = found
    return whole


def _of_module(name: str) -> argparse.ArgumentParser:
    if name == "bench":
        return argparse.ArgumentParser()
    made: argparse.ArgumentParser = importlib.import_module(f"megatron_synth.cli.{name}").parser()
    for action in actions(made):
        if action.dest == "overrides":
            action.completer = _settings  # type: ignore[attr-defined]
    return made


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All options and arguments of a parser and of its verbs."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from actions(inner)


def _settings(prefix: str, **_: object) -> list[str]:
    """Keys of a training configuration, as `section.key=`."""
    from megatron_synth.config.schema import Config

    return [
        f"{section}.{key}="
        for section, field in Config.model_fields.items()
        for key in getattr(field.annotation, "model_fields", {})
    ]
