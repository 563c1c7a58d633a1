"""How the built-in corpus was made of the standard library of Python 3.11.7. `python -m tests.golden.corpus` writes it.

natural  module sources, docstrings under their qualified names, and the topics of `help()`
qa       questions and answers about the same modules, made from docstrings and signatures by rule
unseen   sources and docstrings of `asyncio` and `email`, which the other two leave out

A document's key is the module that it is about, so that a held-out module is held out of source text, docstrings and
questions alike. Another version of Python has other text, so what was made is kept in the package, with its digest.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import lzma
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_synth.data.preparing import builtin_corpus
from tests.golden import corpus_questions

PYTHON = "3.11.7"
UNSEEN = ("asyncio", "email")
TOPICS = "pydoc_data.topics"
# tests; packages that distributions split off; tables of characters; files about one installation
SKIPPED = frozenset(
    [
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "tkinter",
        "turtle",
        "turtledemo",
        "lib2to3",
        "ensurepip",
        "distutils",
        "venv",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "encodings",
        "msilib",
        "pydoc_data",
        "sitecustomize",
        "usercustomize",
    ]
)


@dataclass(frozen=True)
class ModuleText:
    """One module: dotted name, source text, and what its docstrings say, in order of appearance."""

    name: str
    source: str
    entries: tuple[corpus_questions.Entry, ...]


def documents(builtin: str) -> Iterator[tuple[str, str]]:
    """(key, text) of each document of `natural`, `qa` or `unseen`, sorted by module, no text twice."""
    seen: set[bytes] = set()
    for key, text in _all_documents(builtin):
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield key, text


def _all_documents(builtin: str) -> Iterator[tuple[str, str]]:
    unseen = builtin == "unseen"
    for module in _modules():
        if (module.name.split(".")[0] in UNSEEN) is not unseen:
            continue
        if builtin == "qa":
            for text in corpus_questions.documents(module.name, module.entries):
                yield module.name, text
        else:
            yield module.name, module.source
            for text in _docstrings(module):
                yield module.name, text
    if builtin == "natural":
        yield from _topics()


def _docstrings(module: ModuleText) -> Iterator[str]:
    """One document per top-level definition: each qualified name with its signature, then its docstring."""
    group: list[str] = []
    for entry in module.entries:
        if entry.depth <= 1 and group:
            yield "\n\n".join(group) + "\n"
            group = []
        if entry.docstring:
            group.append(f"{entry.qualified_name}{entry.signature}\n\n{entry.docstring}")
    if group:
        yield "\n\n".join(group) + "\n"


def _topics() -> Iterator[tuple[str, str]]:
    nodes = [node for _, path in _topics_file() for node in ast.parse(path.read_bytes()).body]
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            for name in sorted(topics):
                yield f"{TOPICS}.{name}", topics[name].strip() + "\n"


def _topics_file() -> list[tuple[str, Path]]:
    """The texts of `help("topic")`; none where the distribution left them out."""
    path = _root().joinpath(*TOPICS.split(".")).with_suffix(".py")
    return [(TOPICS, path)] if path.is_file() else []


@cache
def _modules() -> tuple[ModuleText, ...]:
    """All modules of the corpus, parsed once per process."""
    parsed = (_parse(name, path) for name, path in _module_files())
    return tuple(module for module in parsed if module is not None)


def _parse(name: str, path: Path) -> ModuleText | None:
    """One module; None for files that this Python cannot parse, such as templates, and for empty ones."""
    data = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        source = io.StringIO(data.decode(encoding), newline=None).read()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return None
    if not source.strip():
        return None
    return ModuleText(name, source, tuple(corpus_questions.entries(name, tree)))


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _module_files() -> list[tuple[str, Path]]:
    """(dotted name, file) of each module, sorted by name."""
    root = _root()
    found: list[tuple[str, Path]] = []
    _collect(root, (), found)
    assert any(name.split(".")[0] in UNSEEN for name, _ in found), root
    return sorted(found)


def _collect(folder: Path, package: tuple[str, ...], found: list[tuple[str, Path]]) -> None:
    for path in folder.iterdir():
        stem = path.stem
        if stem in SKIPPED or stem.startswith("_sysconfigdata"):
            continue
        if path.suffix == ".py" and stem.isidentifier():
            name = package if stem == "__init__" else (*package, stem)
            found.append((".".join(name), path))
        elif path.name.isidentifier() and (path / "__init__.py").is_file():
            _collect(path, (*package, path.name), found)


def content() -> bytes:
    """The corpus as it is kept, before it is compressed: a line of JSON for each document, [source, key, text]."""
    found = [[name, key, text] for name in builtin_corpus.NAMES for key, text in documents(name)]
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in found).encode()


def main() -> None:
    """Write the corpus into the package; its digest goes into `builtin_corpus.SHA256`."""
    assert platform.python_version() == PYTHON, f"expected Python {PYTHON}, found {platform.python_version()}"
    data = content()
    settings = {"preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0, "dict_size": 2**24, "nice_len": 273}
    packed = lzma.compress(data, filters=[{"id": lzma.FILTER_LZMA2, **settings}])
    builtin_corpus.FILE.write_bytes(packed)
    print(f"{builtin_corpus.FILE}: {len(data):,} bytes in {len(packed):,}, SHA-256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
