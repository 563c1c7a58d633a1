"""YAML with the scalars of YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#103-core-schema).

PyYAML follows YAML 1.1, where `3e-4` is a string, `on` and `no` are booleans, `010` is eight and `12:30` is 750, all
without a word. Duplicate keys, of which PyYAML keeps the last, are errors here, with line numbers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import Any

import yaml

from megatron_synth.config.errors import ConfigError, Problem

_SCALARS: tuple[tuple[str, str, str], ...] = (
    # (tag, pattern, first characters): order matters, an integer also matches the pattern of a float
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


MAX_BYTES = 2**20
"""Of a configuration file."""
MAX_DEPTH = 64
MAX_NODES = 100_000
"""Values of a file, with what its aliases repeat."""
MAX_DIGITS = 100
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")
"""Of Unicode's default ignorable code points (UAX 44) those that other categories have, and Braille's blank."""


class Loader(yaml.SafeLoader):
    """Safe loader with YAML 1.2 scalars; collects what is wrong with keys in `problems` instead of stopping."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: list[Problem] = []
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node, unless it lies too deep."""
        if self._depth >= MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def get_single_node(self) -> Any:
        """The document, unless its aliases repeat too much or contain themselves."""
        node = super().get_single_node()
        if node is not None:
            _count(node, {}, set())
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A dict whose keys are all text and all different."""
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self.problems.append(Problem("", f"line {line}: the key {shown} is not text; put it in quotes"))
            elif key_node.value in lines:
                first = lines[key_node.value]
                message = f"line {line}: duplicate key '{key_node.value}', first on line {first}; keep one of them"
                self.problems.append(Problem("", message))
            else:
                lines[key_node.value] = line
        return {
            self.construct_object(key_node, deep=deep): self.construct_object(value_node, deep=deep)
            for key_node, value_node in node.value
            if isinstance(key_node, yaml.ScalarNode)
        }


class Dumper(yaml.SafeDumper):
    """Safe dumper that quotes every string which YAML 1.1 or YAML 1.2 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write repeated values out: anchors are noise in a configuration."""
        return True


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    if len(text) > MAX_DIGITS:
        raise ValueError(f"line {node.start_mark.line + 1}: a number of {len(text)} digits")
    if text.startswith("0o"):
        return int(text[2:], 8)
    return int(text[2:], 16) if text.startswith("0x") else int(text, 10)


def _construct_float(loader: Loader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).lower()
    # YAML writes .inf, -.inf and .nan where Python writes inf, -inf and nan
    return float(text.replace(".", "") if text.endswith((".inf", ".nan")) else text)


def _represent_text(dumper: Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds line breaks in single quotes so that some do not come back; in double quotes it escapes them
    style = '"' if any(character in text for character in "\n\r\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _construct_mapping(loader: Loader, node: yaml.MappingNode) -> Any:
    # in two steps, as PyYAML does, so that an alias may point to a mapping that is still being built
    mapping: dict[Any, Any] = {}
    yield mapping
    mapping.update(loader.construct_mapping(node))


for _tag, _pattern, _first in _SCALARS:
    _regex = re.compile(rf"^(?:{_pattern})$")
    _characters = [*_first, ""] if _tag.endswith("null") else list(_first)
    Loader.add_implicit_resolver(_tag, _regex, _characters)
    Dumper.add_implicit_resolver(_tag, _regex, _characters)
Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
Dumper.add_representer(str, _represent_text)


def parse(text: str, source: str) -> Any:
    """The value of one YAML document.

    Raises:
        ConfigError: the text is not YAML, or has duplicate keys or keys that are not text; `source` names it.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(source, [Problem("", f"{len(text)} characters, a configuration has {MAX_BYTES} at most")])
    try:
        loader = Loader(text)
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise ConfigError(source, [Problem("", _syntax_message(error))]) from None
    try:
        value = loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(source, [Problem("", _syntax_message(error))]) from None
    finally:
        loader.dispose()
    problems = loader.problems or list(_hidden(value, ()))
    if problems:
        raise ConfigError(source, problems)
    return value


def _count(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Values in a node, those of aliases as often as they are named."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        raise yaml.YAMLError(f"line {node.start_mark.line + 1}: an alias within what it stands for")
    if id(node) not in known:
        above.add(id(node))
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        total = 1 + sum(_count(part, known, above) for part in parts)
        if total > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES} values, with what its aliases repeat")
        known[id(node)] = total
        above.remove(id(node))
    return known[id(node)]


def _hidden(value: Any, path: tuple[str, ...]) -> Iterator[Problem]:
    """Text with characters that control a terminal, reorder or hide what is shown, or are none."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _hidden(key, path)
            yield from _hidden(inner, (*path, str(key)))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _hidden(inner, (*path, str(number)))
    elif isinstance(value, str):
        for character in value:
            if _is_hidden(character) and character not in "\n\t":
                where = ".".join(path) if all(part.isprintable() for part in path) else ""
                message = f"{ascii(value)[:60]} has the character U+{ord(character):04X}, which is not shown; leave it out"
                yield Problem(where, message)
                break


def _is_hidden(character: str) -> bool:
    """Whether nothing is seen of a character: controls, formats, halves of pairs, private ones, line separators, and those that
    Unicode calls letters, marks or symbols, but that fonts leave blank; or that it is none at all.
    """
    code = ord(character)
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") or character in _BLANK:
        return True
    selects_variant = 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF
    return selects_variant or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF


def dump(value: Any) -> str:
    """Block-style YAML in the order of `value`; `parse` gives exactly `value` back."""
    text: str = yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**6)
    return text


def _syntax_message(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        what = f"{error.context}: {error.problem}" if error.context else str(error.problem)
        return f"line {error.problem_mark.line + 1}: not YAML: {what}"
    return f"not YAML: {error}"
