"""What generators say beside the text that was asked for: refusals, preambles, closing remarks, talk about the text.

The phrases are English. What a parent says itself is its matter, and no remark of the generator's.
"""

from __future__ import annotations

import re

_FLAGS = re.IGNORECASE
_START = 300  # characters in which a refusal begins
_QUOTES = str.maketrans({"\u2019": "'", "\u2018": "'"})

_TASK = (
    r"(?:assist|help|do that|do this|fulfil|complete|continue|comply|provide|produce|generate|create|write|rewrite|rephrase|"
    r"paraphrase|summari[sz]e|answer|access|browse|process|translate|give (?:you|medical|legal|financial|advice)|engage)"
)
_UNABLE = (
    r"(?:can't|cannot|can not|could not|couldn't|won't|will not|am not able to|'m not able to|am unable to|'m unable to|"
    r"was unable to|am not allowed to|don't feel comfortable|do not feel comfortable|'m not comfortable|am not comfortable|"
    r"don't have (?:access|the ability|enough|opinions|personal)|do not have (?:access|the ability|enough|opinions|personal))"
)
_REFUSALS = (
    re.compile(rf"\b(?:sorry|apologi[sz]e|afraid|unfortunately)\b[^.!?\n]{{0,80}}?\b(?:i|it|we)?\s*{_UNABLE}", _FLAGS),
    re.compile(rf"^\W*(?:but |however, )?i ?{_UNABLE}[^.!?\n]{{0,40}}?\b{_TASK}", _FLAGS),
    re.compile(r"^\W*i(?:'m| am| do|) ?(?:not|n't|don't) (?:feel )?comfortable\b", _FLAGS),
    re.compile(r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b", _FLAGS),
    re.compile(r"\bi am (?:just )?an? (?:ai|(?:large )?language model)\b", _FLAGS),
)

_TEXT = (
    r"(?:text|version|paragraph|passage|article|document|content|rewrite|rephrasing|paraphrase|summary|section|piece|"
    r"conversation|dialogue|dialog|questions?|answers?|pairs?|explanation|chapter|excerpt)"
)
_AGREED = r"(?:(?:sure|certainly|of course|absolutely|okay|ok|great|yes|understood|no problem)\b[^\n:.!,]{0,20}[.!,:]+\s*)"
_MADE = r"(?:re-?phrased|re-?written|re-?worded|paraphrased|improved|edited|revised|polished|summari[sz]ed|simplified)"
_PREAMBLES = (
    # Sure! Here is a rephrased version of the text:
    re.compile(
        rf"{_AGREED}?(?:here(?:'s| is| are)|below (?:is|are)|this is|the following (?:is|are))\b[^\n]{{0,100}}?"
        rf"\b(?:{_TEXT}|{_MADE})\b[^\n]{{0,80}}?[:.]\W*(?:\n+|$)",
        _FLAGS,
    ),
    # Sure!   Here you go:
    re.compile(rf"{_AGREED}?(?:here (?:you go|it is|you are)|{_AGREED})\s*[:.!]?\s*\n+", _FLAGS),
    # The following text was reworded to say the same.
    re.compile(rf"(?:the following|this) {_TEXT} (?:was|is|has been) {_MADE}\b[^\n]*\n+", _FLAGS),
    # **Rephrased text:**
    re.compile(rf"\W{{0,4}}(?:the |my )?{_MADE} {_TEXT}\W{{0,3}}:\W{{0,4}}", _FLAGS),
    re.compile(r"\W{0,4}(?:rewrite|paraphrase|rephrasing)\W{0,3}:\W{0,4}", _FLAGS),
)
_CLOSING = re.compile(
    r"\n[ \t]*(?:i hope (?:this|that|you|it)|(?:please )?let me know|(?:please )?feel free to|is there anything else|"
    r"if you (?:need|have|would like|want) (?:any|more|further|me)|would you like me)\b[^\n]*$",
    _FLAGS,
)

_NOUN = r"(?:text|passage|article|paragraph|excerpt|document|section|author|writer)"
_KIND = r"(?:(?:above|given|provided|following|previous|next|preceding|last|first|same|whole|original|news|short|main)\s+)"
_VERB = (
    r"(?:describ|discuss|explain|mention|stat|say|said|tell|talk|deal|focus|provid|present|report|conclud|end|begin|clos|"
    r"compar|quot|giv|show|list|highlight|emphasi[sz]|explor|cover|outlin|introduc|go|suggest|argu|not|us|is about|is mainly|"
    r"is a |is told)"
    r"(?:e?s|es|ed|ing)?\b"
)
_TALK = (
    re.compile(rf"\b(?:the|this|that|these|your)\s+{_KIND}*(?P<noun>{_NOUN})s?\s+(?:\w+ly\s+|also\s+|then\s+)?{_VERB}", _FLAGS),
    re.compile(rf"\b(?:in|according to|of|from|about|on)\s+(?:the|this|your)\s+{_KIND}*(?P<noun>{_NOUN})\b(?!\s+of\b)", _FLAGS),
    re.compile(
        rf"\b(?:is|are|was|does|do|did)\s+(?:the|this)\s+{_KIND}*(?P<noun>{_NOUN})\s+(?:\w+ly\s+)?(?:about|\w+)", _FLAGS
    ),
    re.compile(rf"\bthe following (?P<noun>{_NOUN})s?\b", _FLAGS),
    re.compile(r"\bin this (?P<noun>section|chapter|article|passage|text|document),? (?:we|you|i)\b", _FLAGS),
    re.compile(
        r"\bas (?:described|mentioned|discussed|explained|we have seen|seen) (?:(?P<noun>above|below|earlier|before))", _FLAGS
    ),
)

_QUESTION = re.compile(r"[?\uff1f\u061f][*_\"')\]]*")
_SENTENCES = re.compile(r"\n+|(?<=[.!\u3002])\s*")


def without_preamble(text: str) -> str:
    """The text without surrounding space, words to the user before it, and remarks after it."""
    text = text.strip()
    for pattern in _PREAMBLES:
        match = pattern.match(text.translate(_QUOTES))
        if match:
            text = text[match.end() :].lstrip()
            break
    while match := _CLOSING.search(text.translate(_QUOTES)):
        text = text[: match.start()].rstrip()
    return text


def is_refusal(text: str, parent: str) -> bool:
    """Whether the generator declines, or speaks of itself as a model."""
    start, parent = text.translate(_QUOTES).lstrip()[:_START], parent.translate(_QUOTES)
    return any(pattern.search(start) and not pattern.search(parent) for pattern in _REFUSALS)


def talks_about_text(text: str, parent: str) -> bool:
    """Whether a text speaks of a text, a passage, a section or an author of which the parent does not speak."""
    known = parent.casefold()
    return any(
        match["noun"].casefold() not in known for pattern in _TALK for match in pattern.finditer(text.translate(_QUOTES))
    )


def answered_questions(text: str) -> int:
    """How many questions have words behind them that are not the next question."""
    _, *behind = _QUESTION.split(text)
    answered = 0
    for number, part in enumerate(behind):
        sentences = sum(any(map(str.isalnum, one)) for one in _SENTENCES.split(part))
        answered += sentences >= (2 if number + 1 < len(behind) else 1)
    return answered
