"""Question-answer rephrasing of docstrings by rule: the generator of the built-in `qa` source.

Which wording a question gets is chosen by the hash of what it asks about, so that the text is the same in every run.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PAIRS_PER_DOCUMENT = 8

WHAT = ("What does {name} do?", "What is {name} for?", "Can you explain {name}?", "When would I use {name}?")
MORE = ("What else should I know about {name}?", "Can you tell me more about {name}?", "Are there details to {name}?")
SIGNATURE = ("What is the signature of {name}?", "How do I call {name}?", "How is {name} called?")
ARGUMENTS = ("Which arguments does {name} take?", "What can be passed to {name}?", "What are the parameters of {name}?")
METHODS = ("Which methods does {name} have?", "What can I do with an instance of {name}?", "What does {name} offer?")
MODULE = ("What is the module {name} about?", "What does the module {name} provide?", "Why would I import {name}?")

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'`(])")
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Entry:
    """A module, class or function and what its source says about it.

    depth: 0 for the module, 1 for what it defines, 2 for methods, and so on; signature: "(a, b=1)" or "".
    required, optional: names of arguments, the latter with their defaults; methods: public methods of a class.
    """

    kind: str
    qualified_name: str
    depth: int
    docstring: str
    signature: str = ""
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()


def entries(module: str, tree: ast.Module) -> Iterator[Entry]:
    """The module itself and all classes and functions that are not local to a function, in order of appearance."""
    yield Entry("module", module, 0, _docstring(tree))
    yield from _definitions(module, 1, tree.body)


def documents(module: str, found: Sequence[Entry]) -> Iterator[str]:
    """Documents of up to eight question-answer pairs, all on one module."""
    pairs = [
        f"Question: {question}\nAnswer: {answer}\n"
        for entry in found
        if entry.docstring
        for question, answer in _pairs(module, entry)
    ]
    for start in range(0, len(pairs), PAIRS_PER_DOCUMENT):
        yield "\n".join(pairs[start : start + PAIRS_PER_DOCUMENT])


def _definitions(prefix: str, depth: int, body: Sequence[ast.stmt]) -> Iterator[Entry]:
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):  # a definition for some platforms only
            yield from _definitions(prefix, depth, node.body)
        elif isinstance(node, _Definition):
            entry = _entry(prefix, depth, node)
            yield entry
            if isinstance(node, ast.ClassDef):
                yield from _definitions(entry.qualified_name, depth + 1, node.body)


def _entry(prefix: str, depth: int, node: _Definition) -> Entry:
    name, docstring = f"{prefix}.{node.name}", _docstring(node)
    if not isinstance(node, ast.ClassDef):
        required, optional = _arguments(node.args)
        return Entry("function", name, depth, docstring, f"({ast.unparse(node.args)})", required, optional)
    functions = [child for child in node.body if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))]
    methods = tuple(dict.fromkeys(child.name for child in functions if not child.name.startswith("_")))
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    return Entry("class", name, depth, docstring, f"({bases})" if bases else "", methods=methods)


def _docstring(node: _Definition | ast.Module) -> str:
    text = ast.get_docstring(node, clean=False) or ""
    # a few docstrings spell surrogates in escapes, which no UTF-8 file can hold
    return inspect.cleandoc(text).encode("utf-8", "replace").decode().strip()


def _arguments(args: ast.arguments) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the required arguments, and "name (default value)" of the others; without self and cls."""
    positional = [*args.posonlyargs, *args.args]
    plain = len(positional) - len(args.defaults)
    required = [arg.arg for arg in positional[:plain] if arg.arg not in ("self", "cls")]
    optional = [_with_default(arg, default) for arg, default in zip(positional[plain:], args.defaults, strict=True)]
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        if default is None:
            required.append(arg.arg)
        else:
            optional.append(_with_default(arg, default))
    return tuple(required), tuple(optional)


def _with_default(arg: ast.arg, default: ast.expr) -> str:
    return f"{arg.arg} (default {ast.unparse(default)})"


def _pairs(module: str, entry: Entry) -> Iterator[tuple[str, str]]:
    name = entry.qualified_name
    summary, *rest = _sentences(entry.docstring)
    if entry.kind == "module":
        yield _choose(MODULE, name), summary
    else:
        yield _choose(WHAT, name), f"{summary} It is a {entry.kind} of {module}."
    if rest:
        yield _choose(MORE, name), " ".join(rest)
    if entry.kind == "function":
        yield _choose(SIGNATURE, name), f"{name}{entry.signature}"
        if entry.required or entry.optional:
            parts = []
            if entry.required:
                parts.append(f"It needs {_listed(entry.required)}.")
            if entry.optional:
                parts.append(f"It also accepts {_listed(entry.optional)}.")
            yield _choose(ARGUMENTS, name), " ".join(parts)
    if entry.methods:
        yield _choose(METHODS, name), f"{name} offers {_listed(entry.methods)}."


def _sentences(docstring: str) -> list[str]:
    """The docstring as sentences; running text is unwrapped, code and lists are not. The first ends in a stop."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.splitlines()
        if any(line.startswith((" ", ">>>", "-", "*")) for line in lines):
            found.append("\n" + paragraph)
        else:
            found.extend(_SENTENCE_END.split(" ".join(lines)))
    summary = found[0].strip()
    return [summary if summary.endswith((".", "!", "?", ":")) else summary + ".", *found[1:]]


def _choose(templates: tuple[str, ...], name: str) -> str:
    digest = hashlib.blake2b((templates[0] + name).encode(), digest_size=4).digest()
    return templates[int.from_bytes(digest, "little") % len(templates)].format(name=name)


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
