"""Documents become chunks: cut at paragraphs to a template's length, short ones joined or left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from megatron_synth.synthesis.documents.counting import TokenCounter
from megatron_synth.synthesis.documents.parents import Parent
from megatron_synth.synthesis.kinds.template import Template

SEPARATORS = ("\n\n", "\n", ". ", " ", "")
"""Where a text may be cut: at the first of these that is fine enough. The last cuts between characters."""
LONG_TOKEN = 64
"""Characters of a token at most, as far as it is asked whether a document is short: longer ones are not counted for that."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one request is about.

    parents: the documents that it is of: one, or several short ones. number: of the chunk in its document, from 0;
    of: how many chunks the document has. tokens: of the text. walk: of a walk over several documents its concepts in one
    string, and a passage of each document; number is then that of the walk.
    """

    parents: tuple[Parent, ...]
    text: str
    number: int
    of: int
    tokens: int
    walk: tuple[str, ...] = ()


@dataclass
class Skipped:
    """Documents that became no chunk."""

    short: int = 0


def chunks(
    documents: Iterable[Parent],
    template: Template,
    counter: TokenCounter,
    skipped: Skipped,
    wanted: Callable[[str], bool] = lambda parent: True,
) -> Iterator[Chunk]:
    """The chunks of documents, in their order. Memory holds a document, or the short ones that are being joined.

    wanted: whether chunks are made of a parent, by its id, and of short ones that are joined to it.
    """
    held: list[Parent] = []
    held_tokens = 0
    for parent in documents:
        long = len(parent.text) >= LONG_TOKEN * template.min_parent_tokens
        if long and not wanted(parent.id):
            continue
        (tokens,) = counter.count([parent.text])
        if long or tokens >= template.min_parent_tokens:
            if wanted(parent.id):
                yield from _of_document(parent, tokens, template, counter)
        elif template.short == "skip":
            skipped.short += 1
        else:
            held.append(parent)
            held_tokens += tokens
            if held_tokens >= template.min_parent_tokens:
                if wanted(held[0].id):
                    yield Chunk(tuple(held), "\n\n".join(one.text.strip() for one in held), 0, 1, held_tokens)
                held, held_tokens = [], 0
    skipped.short += len(held)


def _of_document(parent: Parent, tokens: int, template: Template, counter: TokenCounter) -> Iterator[Chunk]:
    if template.made_from == "keywords" or tokens <= template.parent_tokens:
        yield Chunk((parent,), parent.text.strip(), 0, 1, tokens)
        return
    parts = cut(parent.text, template.parent_tokens, counter)
    texts = [part.strip() for part in parts if part.strip()]
    counts = counter.count(texts)
    for number, (text, count) in enumerate(zip(texts, counts, strict=True)):
        yield Chunk((parent,), text, number, len(texts), count)


def cut(text: str, limit: int, counter: TokenCounter) -> list[str]:
    """Parts of at most `limit` tokens each, counted piece by piece, that joined are the text again.

    It is cut at empty lines; a paragraph that is too long at ends of lines, of sentences, between words, and at last between
    characters. Pieces are then put together while they fit, so that parts are as long as the limit lets them.
    """
    pieces: list[tuple[str, int]] = []
    _cut(text, limit, counter, 0, pieces)
    parts: list[str] = []
    held: list[str] = []
    filled = 0
    for piece, tokens in pieces:
        if held and filled + tokens > limit:
            parts.append("".join(held))
            held, filled = [], 0
        held.append(piece)
        filled += tokens
    if held:
        parts.append("".join(held))
    return parts


def _cut(text: str, limit: int, counter: TokenCounter, level: int, found: list[tuple[str, int]]) -> None:
    separator = SEPARATORS[level]
    if separator:
        pieces = [piece + separator for piece in text.split(separator)]
        pieces[-1] = pieces[-1].removesuffix(separator)
        pieces = [piece for piece in pieces if piece]
    else:  # a word without an end: characters, of which each may be several tokens
        step = max(limit // 4, 1)
        pieces = [text[at : at + step] for at in range(0, len(text), step)]
    for piece, tokens in zip(pieces, counter.count(pieces), strict=True):
        if tokens <= limit or level + 1 == len(SEPARATORS):
            found.append((piece, tokens))
        else:
            _cut(piece, limit, counter, level + 1, found)
