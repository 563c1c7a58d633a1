"""Whether a text is in a language: by py3langid where it is installed, else by function words of English."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from megatron_synth.config.errors import UserError
from megatron_synth.core.log import show
from megatron_synth.synthesis.filters.words import words_of

_PASSAGE = 200  # characters; in fewer a language is often mistaken
_LEAST_LETTERS = 20
_SURE = 0.6  # py3langid's probability, which it flattens for short texts
_LINES = re.compile(r"\n+")
_ENGLISH = frozenset(
    """a an and are as at be been but by can do does for from had has have he her his how i if in into is it its more most no
    not of on one only or other she so some than that the their them then there these they this to up was we were what when
    where which who why will with would you your""".split()
)
_ENGLISH_SHARE = 0.15  # in English a third of the words and more; in lists and in neighbors of English, a tenth


class LanguageCheck:
    """Tells how much of a text is in another language.

    Without py3langid English is told by its function words, and this is said on standard error once.

    Raises:
        UserError: py3langid is needed and missing, or does not know the language.
    """

    def __init__(self, language: str):
        self.language = language
        self.is_other = self._identified() or self._by_function_words()

    def share_of_others(self, text: str) -> float:
        """Share of the characters of `text` in passages that are surely in another language."""
        passages = _passages(text)
        total = sum(map(len, passages))
        return sum(len(one) for one in passages if self.is_other(one)) / total if total else 0.0

    def _identified(self) -> Callable[[str], bool] | None:
        identify = _identifier()
        if identify is None:
            return None
        languages, classify = identify
        if self.language not in languages:
            raise UserError(
                f"filters.language: {self.language!r} is not known to py3langid, which knows {', '.join(sorted(languages))}; "
                f"null takes any language"
            )

        def is_other(passage: str) -> bool:
            found, probability = classify(passage)
            return found != self.language and probability >= _SURE and _letters(passage) >= _LEAST_LETTERS

        return is_other

    def _by_function_words(self) -> Callable[[str], bool]:
        hint = "`pip install 'megatron-synth[synthesis]'`"
        if self.language != "en":
            raise UserError(
                f"filters.language: {self.language!r} can only be told with py3langid: {hint}, or set the language to null"
            )
        _warn(f"filters: py3langid is not installed, so English is told by its function words, which is coarse: {hint}")

        def is_other(passage: str) -> bool:
            words = words_of(passage)
            common = sum(word in _ENGLISH for word in words)
            return len(words) >= 8 and common < _ENGLISH_SHARE * len(words)

        return is_other


@cache
def _warn(text: str) -> None:
    show(text, error=True)


@cache
def _identifier() -> tuple[frozenset[str], Callable[[str], tuple[str, float]]] | None:
    """Languages, and a function from text to the likeliest one and its probability; None without py3langid."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        return None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return frozenset(identifier.labels), identifier.classify


def _letters(text: str) -> int:
    return sum(character.isalpha() for character in text)


def _passages(text: str) -> list[str]:
    """Lines, joined until they are long enough to tell a language; long ones are cut."""
    found: list[str] = []
    for line in _LINES.split(text):
        for start in range(0, max(len(line), 1), 4 * _PASSAGE):
            part = line[start : start + 4 * _PASSAGE]
            if found and min(len(found[-1]), len(part)) < _PASSAGE:
                found[-1] += "\n" + part
            else:
                found.append(part)
    return found
