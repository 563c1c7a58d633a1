"""Numbers of a text, written as digits or as English words, so that `1,200`, `1200` and `twelve hundred` are one."""

from __future__ import annotations

import re

_UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen""".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SCALES = {"hundred": 100, "thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000, "trillion": 10**12}
_VALUES: dict[str, float] = {
    **{word: value for value, word in enumerate(_UNITS)},
    **{word: 10 * value for value, word in enumerate(_TENS, 2)},
}
# words that a number may stand for in several ways: a share, its percentage, and a part of an hour or a year
_OTHERS: dict[str, tuple[float, ...]] = {
    "half": (0.5, 2, 50, 30, 6, 500),
    "halved": (0.5, 2, 50),
    "halves": (0.5, 2, 50),
    "third": (3, 33, 33.3),
    "thirds": (3, 66, 67, 66.7),
    "quarter": (0.25, 4, 25, 15, 3, 250),
    "quarters": (0.75, 4, 75, 45),
    "tenth": (10, 0.1),
    "dozen": (12,),
    "decade": (10,),
    "decades": (10,),
    "century": (100,),
    "fortnight": (14, 2),
    "double": (2, 100),
    "doubled": (2, 100),
    "twice": (2,),
    "triple": (3,),
    "year": (1, 12, 365),
    "week": (1, 7),
    "day": (1, 24),
    "hour": (1, 60),
    "minute": (1, 60),
}
_WORDS = "|".join(sorted((*_VALUES, *_SCALES, *_OTHERS), key=len, reverse=True))
_NUMBER = re.compile(
    rf"(?P<digits>\d+(?:[.,\u00a0\u202f' ]\d{{3}})*(?:[.,]\d+)?)(?:[\s-]+(?P<scale>{'|'.join(_SCALES)}))?"
    rf"|\b(?P<words>(?:{_WORDS})(?:(?:\s+and\s+a\s+|\s+and\s+|[\s-]+)(?:{_WORDS}))*)\b",
    re.IGNORECASE,
)
# numbers of a list, of a step, of a question: they belong to the form
_ENUMERATION = re.compile(
    r"^[ \t>#*\-(]*(?:(?:question|answer|step|tip|part|chapter|section|q|a)\.?\s*#?)?\d{1,2}\s*[.):]\s",
    re.IGNORECASE | re.MULTILINE,
)


def numbers_in(text: str) -> list[frozenset[float]]:
    """Each number of a text as all values that it may be read as; numbers of list items are left out.

    `1.200` is 1.2 and 1200, `2.3 million` is 2.3 and 2300000, `twenty-five` is 20, 5 and 25.
    """
    matches = _NUMBER.finditer(_ENUMERATION.sub(" ", text))
    found = (_of_digits(one["digits"], one["scale"]) if one["digits"] else _of_words(one["words"])[0] for one in matches)
    return [frozenset(readings) for readings in found if readings]


def supported_by(text: str) -> frozenset[float]:
    """All values that another text may state on the ground of this one.

    Words such as `half` or `day` count here: 50 percent, 30 minutes, 24 hours.
    """
    found: set[float] = set()
    for match in _NUMBER.finditer(text):
        found.update(*([_of_digits(match["digits"], match["scale"])] if match["digits"] else _of_words(match["words"])))
    return frozenset(found)


def _of_digits(digits: str, scale: str | None) -> set[float]:
    plain = re.sub(r"[.,\u00a0\u202f' ](?=\d{3}(?!\d))", "", digits)  # groups of three
    readings = {value for one in (digits, plain) if (value := _value(one)) is not None}
    if scale:
        readings |= {round(value * _SCALES[scale.lower()], 6) for value in readings}
    return readings


def _value(digits: str) -> float | None:
    try:
        return float(digits.replace(",", "."))
    except ValueError:  # groups that are no decimal
        return None


def _of_words(words: str) -> tuple[set[float], set[float]]:
    """What `twenty-five`, `four hundred and two` or `three and a half` says, each part too; and what it may stand for."""
    readings: set[float] = set()
    others: set[float] = set()
    total = current = 0.0
    for part in re.split(r"[\s-]+", words.lower()):
        if part in _VALUES:
            current += _VALUES[part]
            readings |= {_VALUES[part], total + current}
        elif part in _SCALES:
            current = max(current, 1) * _SCALES[part]
            readings.add(total + current)
            if part != "hundred":
                total, current = total + current, 0.0
        elif part in _OTHERS:
            others.update(_OTHERS[part])
            if readings and part in ("half", "quarter", "quarters"):
                others.add(total + current + _OTHERS[part][0])
            if readings and part in ("dozen", "decade", "decades"):
                others.add((total + current) * _OTHERS[part][0])
    return readings, others
