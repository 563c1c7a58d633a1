"""Arguments that several verbs have."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """A whole number of 1 or more, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, found '{text}'")
    return int(text)


def file_and_overrides(arguments: list[str], default: str) -> tuple[str, list[str]]:
    """`[CONFIG] a.b=c ...` as the file, `default` where none is named, and the overrides."""
    if arguments and "=" not in arguments[0]:
        return arguments[0], arguments[1:]
    return default, arguments
