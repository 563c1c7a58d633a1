"""Text of documents that goes into prompts: what a tokenizer or a template would obey is broken up.

A tokenizer reads `<|im_end|>` in a prompt as the end of a turn, wherever it stands; a document that spells it could end its
place and speak as the user. The same holds for the marks that a template puts around its slot. Such strings get a space
after their first character: they read the same, and are no marks any more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

USUAL = (
    "<s>",
    "</s>",
    "<bos>",
    "<eos>",
    "<pad>",
    "<unk>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|endoftext|>",
)
"""Special tokens of common models. Those of models whose tokenizer is at hand are read from it; `<|...|>` is always one."""


class Escape:
    """Breaks up marks in text."""

    def __init__(self, marks: Iterable[str] = ()):
        known = sorted({mark for mark in (*USUAL, *marks) if len(mark) > 1}, key=lambda mark: (-len(mark), mark))
        # a DeepSeek-like tokenizer spells its bars in full width
        self._pattern = re.compile("|".join([*map(re.escape, known), r"<[|｜][^<>|｜\s]{1,64}[|｜]>"]), re.IGNORECASE)

    def __call__(self, text: str) -> str:
        """`text` in which no mark is spelled."""
        while True:
            escaped = self._pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
            if escaped == text:
                return text
            text = escaped  # what was left may spell a shorter one
