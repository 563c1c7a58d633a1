"""Untrusted chat templates, run in Jinja's sandbox with what those of transformers have, and with a limit of steps."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from megatron_synth.data.counted_jinja import STEPS, CountedEnvironment

STEPS_OF_A_MESSAGE = 1000
"""Beyond STEPS."""
TODAY = datetime(2024, 7, 26)
"""What templates that ask for the day get: the same text becomes the same tokens on any day."""
_LONGEST_FORMAT = 200
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that the reasoning of a message has in data sets."""


class ChatTemplate:
    """A template, compiled. Of one thread at a time."""

    def __init__(self, text: str):
        """text: in Jinja.

        Raises:
            jinja2.TemplateError: it is no template.
        """
        self._environment = CountedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self._environment.add_filter("tojson", _tojson)
        self._environment.globals.update(raise_exception=_refuse, strftime_now=_strftime)
        self._template = self._environment.from_string(text)

    def render(self, messages: Sequence[Mapping[str, Any]], *, answer: bool, tokens: Mapping[str, str]) -> str:
        """What it makes of messages.

        Args:
            messages: each with `role` and what else it has, of plain values.
            answer: with the header of an answer.
            tokens: special tokens by the names that templates have for them.

        Raises:
            counted_jinja.TooManySteps: says how many it may take.
            jinja2.TemplateError: it refuses the messages, or reached for what the sandbox keeps from it.
            Exception: what Python raises for values that a template does not expect.
        """
        own = [_with_reasoning(_plain(message)) for message in messages]
        self._environment.begin(STEPS + STEPS_OF_A_MESSAGE * len(own) + _characters(own))
        return self._template.render(messages=own, tools=None, documents=None, add_generation_prompt=answer, **tokens)


_compiled = threading.local()


def template_of(text: str) -> ChatTemplate:
    """The template, compiled once in each thread. Raises jinja2.TemplateError."""
    held: tuple[str, ChatTemplate] | None = getattr(_compiled, "held", None)
    if held is None or held[0] != text:
        held = _compiled.held = text, ChatTemplate(text)
    return held[1]


class _Generation(Extension):
    """`{% generation %}` around an answer, by which transformers finds it: here its content alone."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _characters(value: Any) -> int:
    """Characters of all texts in a message, or in several."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, (list, tuple)) else 0


def _strftime(format: str) -> str:
    if len(format) > _LONGEST_FORMAT:  # the C library's may take hundreds of characters for one
        raise ValueError(f"strftime_now: a format of more than {_LONGEST_FORMAT} characters")
    return TODAY.strftime(format)


def _refuse(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    # Jinja's own escapes what is HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _plain(value: Any) -> Any:
    """A value made of those of JSON alone: others have methods that the sandbox does not know."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose reasoning has the names that templates ask for, as in transformers."""
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}
