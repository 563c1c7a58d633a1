"""Checks what documents say of settings and options: samples of YAML, keys such as `data.cache`, options of verbs.

`docs/references.py` runs it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

SAMPLE = re.compile(r"^ *```yaml\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:`|^ *\$? *|&& )(?:megatron-synth|python -m megatron_synth) ([a-z](?:\\\n|[^`\n])*)", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z0-9-]*)")
KEY = re.compile(r"(?:[`'\"(]|^| )([a-z_]+(?:\.\w+)+)(?=[`:= ])", re.MULTILINE)
_PARTIAL = 2
"""A sample may leave out what it is not about: keys that must be there, down to this level."""
_FILES = ("json", "jsonl", "yaml", "md", "py", "csv", "log", "png", "txt", "bin", "idx", "so", "html")


@cache
def models() -> tuple[type[BaseModel], ...]:
    """The configurations that users write."""
    from megatron_synth.config.cluster import ClusterConfig
    from megatron_synth.config.prepare import PrepareConfig
    from megatron_synth.config.schema import Config
    from megatron_synth.study.plan.study_file import Study
    from megatron_synth.synthesis.synthesis_file import SynthesisConfig

    return (Config, PrepareConfig, SynthesisConfig, Study, ClusterConfig)


def faults_of_sample(text: str) -> list[str]:
    """What is wrong in a sample, held against the configuration that it fits best."""
    from megatron_synth.config import yaml12

    content = yaml12.parse(text, "a sample")
    if not isinstance(content, dict):
        return ["a sample of YAML that is no configuration"]
    content.pop("base", None)
    known = {model: len(content.keys() & model.model_fields.keys()) for model in models()}
    return min((_faults(model, content) for model in models() if known[model] == max(known.values())), key=len)


def _faults(model: type[BaseModel], content: Mapping[str, Any]) -> list[str]:
    try:
        model.model_validate(content)
    except ValidationError as error:
        return [
            f"{'.'.join(map(str, one['loc']))}: {one['msg']}"
            for one in error.errors()
            if one["type"] != "missing" or len(one["loc"]) > _PARTIAL
        ]
    return []


@cache
def keys(model: type[BaseModel]) -> tuple[tuple[str, ...], ...]:
    """Keys of a configuration as paths."""
    from megatron_synth.config.validation import keys_of

    return tuple(keys_of(model))


def has_key(model: type[BaseModel], parts: tuple[str, ...]) -> bool:
    """Whether a configuration has a key, or one below it. Names that users choose, such as those of sources, may be any."""
    from megatron_synth.config.validation import matches

    return any(matches(path[: len(parts)], parts) for path in keys(model) if len(path) >= len(parts))


@cache
def options(verb: str) -> frozenset[str]:
    """Options of a verb and of what it is made of."""
    from megatron_synth.cli.completion import GROUPS, actions

    names = [verb, *(f"{verb}.{name}" for name in GROUPS.get(verb, ()))]
    parsers = [importlib.import_module(f"megatron_synth.cli.{name}").parser() for name in names if name != "bench"]
    return frozenset(option for parser in parsers for action in actions(parser) for option in action.option_strings)


def wrong(text: str) -> Iterator[tuple[int, str]]:
    """Line and description of each setting or option in `text` that does not exist."""

    def line(match: re.Match[str]) -> int:
        return text.count("\n", 0, match.start(1)) + 1

    for match in SAMPLE.finditer(text):
        for fault in faults_of_sample(match[1]):
            yield line(match), fault
    for match in COMMAND.finditer(text):
        verb = match[1].split()[0]
        for option in OPTION.findall(match[1].partition(" #")[0]):
            if option not in options(verb):
                yield line(match), f"{verb} has no option {option}"
    for match in KEY.finditer(text):
        parts = tuple(match[1].split("."))
        known = [model for model in models() if parts[0] in model.model_fields]
        if known and parts[-1] not in _FILES and not parts[-1].isupper() and not any(has_key(model, parts) for model in known):
            yield line(match), f"no setting {match[1]}"
