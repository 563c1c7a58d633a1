"""Arguments that several verbs have."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_synth.storage.remote import is_remote

_DIGITS = 19
"""More than a whole number of 64 bits surely holds."""
_NGRAM = 10**6
_DAY_S = 86_400


def count(text: str) -> int:
    """A whole number of 1 or more, for argparse."""
    return _whole(text, 1)


def count_or_zero(text: str) -> int:
    """A whole number of 0 or more, for argparse."""
    return _whole(text, 0)


def tokens(text: str) -> int:
    """Tokens of an n-gram, for argparse: more than fit in a window of any model are none."""
    found = _whole(text, 1)
    if found > _NGRAM:
        raise argparse.ArgumentTypeError(f"expected at most {_NGRAM} tokens, found '{text}'")
    return found


def seconds(text: str) -> float:
    """Seconds above 0 and up to a day, for argparse."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found <= _DAY_S:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, at most {_DAY_S}, found '{text}'")
    return found


def on_disk(text: str) -> Path:
    """A path that is only read or written on a disk, for argparse: with a scheme it would be a folder named `s3:`."""
    if is_remote(text):
        raise argparse.ArgumentTypeError(f"expected a path on a disk, not one in object storage, found '{text}'")
    return Path(text)


def _whole(text: str, least: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < _DIGITS) or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of {least} or more, found '{text}'")
    return int(text)


def file_and_overrides(arguments: list[str], default: str) -> tuple[str, list[str]]:
    """`[CONFIG] a.b=c ...` as the file, `default` where none is named, and the overrides."""
    if arguments and "=" not in arguments[0]:
        return arguments[0], arguments[1:]
    return default, arguments


def parse_verb(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse `VERB ...` where overrides may stand before and after options, which parsers with verbs cannot do."""
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    if not argv or argv[0] not in verbs.choices:
        parser.parse_args(argv)  # prints the verbs, and exits
    found: argparse.Namespace = verbs.choices[argv[0]].parse_intermixed_args(argv[1:])
    found.verb = argv[0]
    return found
