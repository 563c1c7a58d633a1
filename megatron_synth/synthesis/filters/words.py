"""Words of a text, and what two texts have in common by them."""

from __future__ import annotations

import re
from collections.abc import Sequence

# letters of scripts without spaces between words are words of their own
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_ALONE}]|(?:(?![{_ALONE}])[^\W_])+(?:['\u2019](?:(?![{_ALONE}])[^\W_])+)*")
_STEM = 5
_LEAST = 4
# English words of at least four letters that say nothing of a text's matter
_FUNCTION_WORDS = frozenset(
    """about above after again against also although always among another anything around away back became because become
    becomes been before being below between both came come comes could does doing done down during each either else even ever
    every everyone everything first from gave give given gives goes going have having here into itself just keep kept know
    known last least less like made make makes making many might more most much must need needs never next none nothing once
    only other others over people rather said same says seen several shall should show shows since some someone something
    still such take taken takes than that their them themselves then there these they thing things this those though through
    thus together told took towards under unless until upon used uses using very want well went were what when where whereas
    whether which while whom whose will with within without would your answer question user assistant""".split()
)


def words_of(text: str) -> list[str]:
    """The words of a text in order, case folded; letters of scripts without spaces, such as Chinese, one by one."""
    return _WORD.findall(text.casefold())


def content_stems(words: Sequence[str]) -> frozenset[str]:
    """What the words are about: the first five letters of those that are no function words, numbers or very short.

    The first letters stand for a stem in any language with endings; a stemmer would need to know which one it is.
    """
    return frozenset(
        word if _WORD.fullmatch(word) and len(word) == 1 else word[:_STEM]
        for word in words
        if word not in _FUNCTION_WORDS and not word.isnumeric() and (len(word) >= _LEAST or ord(word[0]) > 0xDFF)
    )


def copied_share(words: Sequence[str], parent: Sequence[str], size: int) -> float:
    """Share of `words` that lie in n-grams of `size` words that `parent` has, too; 0 of texts shorter than that."""
    if len(words) < size or len(parent) < size:
        return 0.0
    known = {tuple(parent[at : at + size]) for at in range(len(parent) - size + 1)}
    copied, end = 0, 0
    for at in range(len(words) - size + 1):
        if tuple(words[at : at + size]) in known:
            copied += at + size - max(at, end)
            end = at + size
    return copied / len(words)
