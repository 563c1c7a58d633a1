"""The built-in corpus: for trying things out, with no network and the same text for everyone.

It is a natural source, a synthetic one about the same matter, and a domain in neither:

natural  module sources of Python's standard library, docstrings under their qualified names, and the topics of `help()`
qa       questions and answers about the same modules, made from docstrings and signatures by rule
unseen   sources and docstrings of `asyncio` and `email`, which the other two leave out

A document's key is the module that it is about, so that a held-out module is held out of source text, docstrings and
questions alike. The text is that of Python 3.11.7; the file beside it, `builtin/NOTICE`, says under which license.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from megatron_synth.config.errors import UserError

FILE = Path(__file__).with_name("builtin") / "corpus.jsonl.xz"
SHA256 = "c1d5b4c91e89e0198afd3116847bf4cf866830ed46a8c697aa4fa87b9dffe651"
"""Of the text, decompressed: a line of JSON for each document, [source, key, text]."""
NAMES = ("natural", "qa", "unseen")


def documents(builtin: str) -> Iterator[tuple[str, str]]:
    """(key, text) of each document of `natural`, `qa` or `unseen`, sorted by module, no text twice.

    Raises:
        UserError: the file is missing, or is not the one that belongs to this program.
    """
    for name, key, text in map(json.loads, _content().splitlines()):
        if name == builtin:
            yield key, text


def text_bytes(builtin: str) -> int:
    """UTF-8 bytes of a source."""
    return sum(len(text.encode()) for _, text in documents(builtin))


@cache
def _content() -> bytes:
    again = "install the program again"
    try:
        data = lzma.decompress(FILE.read_bytes())
    except OSError as error:
        raise UserError(f"{FILE}: {error.strerror}; it holds the built-in corpus, {again}") from None
    except lzma.LZMAError as error:
        raise UserError(f"{FILE}: cannot be decompressed, {error}; {again}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise UserError(f"{FILE}: not the built-in corpus, its text has the SHA-256 {found}, expected {SHA256}; {again}")
    return data
