"""Published answers about kinds of synthetic text, which a report shows beside its own: reference.yaml in this folder."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Annotated

from pydantic import Field, TypeAdapter

from megatron_synth.config import yaml12
from megatron_synth.config.section import Section


class Reference(Section):
    """A published answer."""

    name: str
    """Of the study."""
    source: str
    """Where it can be read."""
    text: str
    """What kind of text it is about."""
    setting: str
    """At which sizes and budgets, and measured by what."""
    share: Annotated[float, Field(ge=0, le=1)]
    """The best share of synthetic tokens."""
    answer: str
    """In words."""
    collapse: str
    """Whether it saw collapse."""
    origin: str = Field(alias="from")
    """How the answer is known."""


@cache
def references() -> dict[str, tuple[Reference, ...]]:
    """The published answers by kind of text."""
    text = (files(__package__) / "reference.yaml").read_text(encoding="utf-8")
    return TypeAdapter(dict[str, tuple[Reference, ...]]).validate_python(yaml12.parse(text, "reference.yaml"))
