"""A configuration in which each setting stands below what it means: the docstring of its field."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_synth.config import yaml12

_WIDTH = 120
_INDENT = "  "


def explain(config: BaseModel) -> str:
    """`config` as YAML with comments, which `load_file` reads back as an equal configuration."""
    return "\n".join(_lines(config, config.model_dump(mode="json", by_alias=True), "")) + "\n"


def _lines(model: BaseModel, content: dict[str, Any], indent: str) -> Iterator[str]:
    for name, field in type(model).model_fields.items():
        key = field.serialization_alias or field.alias or name
        if indent == "" and content.get(key) is not None:
            yield ""
        yield from _comment(model, field, name, indent)
        yield from _entry(key, getattr(model, name), content[key], indent)


def _comment(model: BaseModel, field: FieldInfo, name: str, indent: str) -> Iterator[str]:
    value = getattr(model, name)
    text = field.description
    if text is None and isinstance(value, BaseModel):
        text = type(value).__doc__
    for line in textwrap.wrap(" ".join((text or "").split()), _WIDTH - len(indent)):
        yield f"{indent}# {line}"


def _entry(key: str, value: Any, content: Any, indent: str) -> Iterator[str]:
    if isinstance(value, BaseModel) and content:
        yield f"{indent}{_text(key)}:"
        yield from _lines(value, content, indent + _INDENT)
    elif isinstance(value, dict) and value and all(isinstance(inner, BaseModel) for inner in value.values()):
        yield f"{indent}{_text(key)}:"
        for name, inner in value.items():
            yield from _entry(name, inner, content[name], indent + _INDENT)
    else:
        yield from (indent + line for line in yaml12.dump({key: content}).splitlines())


def _text(key: str) -> str:
    """A key, in quotes where YAML needs them."""
    return yaml12.dump({key: None}).rpartition(":")[0]
