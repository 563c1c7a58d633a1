"""Checks that what documents name exists: files and tests of the repository, Python modules, verbs and make targets.

Settings, options of verbs and samples of YAML are checked by `docs/settings.py`.

`python docs/references.py` prints what does not exist, with file and line; `make docs` runs it, and a test as well.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from docs import settings  # noqa: E402  # this file is also run by its path

# below these a path in a document may be meant, as readers shorten `megatron_synth/train/loop.py` to `train/loop.py`
HOMES = ("", "configs/train", "megatron_synth", "kernels/megatron_synth_kernels", "configs", "docs", "tests")
SUFFIXES = "py|c|yaml|sh|sbatch|toml|txt|md|png|csv"
# what runs leave behind, what users have, and files of other projects
ELSEWHERE = re.compile(r"(runs|RUN|data|text|corpus|qa|exported|build|transformer|core|slurm-\S*)/")
PATH = re.compile(rf"(?<![\w/.<{{*-])((?:[\w.-]+/)+[\w.-]+\.(?:{SUFFIXES}))(?![\w/*])")
MODULE = re.compile(r"(?<![\w/.])((?:megatron_synth|megatron_synth_kernels|benchmarks)(?:\.(?!md\b)\w+)+)")
VERB = re.compile(r"(?:`|^ *|&& )megatron-synth ([a-z]+)", re.MULTILINE)
EXAMPLE = re.compile(r"^```python\n.*?^```", re.MULTILINE | re.DOTALL)
TEST = re.compile(r"(?<![\w/])(tests/[\w/]+\.py)::(\w+)")
TARGET = re.compile(r"`make ([a-z][a-z-]*)`")


def documents() -> list[Path]:
    """Documents of the repository that readers follow; a changelog speaks of what was."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@cache
def verbs() -> frozenset[str]:
    """Verbs that the command line knows."""
    from megatron_synth.cli.main import VERBS

    return frozenset(VERBS)


@cache
def targets() -> frozenset[str]:
    """Targets of the Makefile."""
    return frozenset(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def is_module(name: str) -> bool:
    """Whether `name` is a module, or an attribute that the text of a module defines."""
    parts = name.split(".")
    for at in range(len(parts), 0, -1):
        base = "kernels" if parts[0] == "megatron_synth_kernels" else ""
        place = ROOT.joinpath(base, *parts[:at])
        if place.is_dir() or place.with_suffix(".py").is_file():
            source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            return at == len(parts) or (source.is_file() and re.search(rf"\b{parts[at]}\b", source.read_text()) is not None)
    return False


def missing(text: str, folder: Path) -> Iterator[tuple[int, str]]:
    """Line and description of each reference of `text`, a document in `folder`, to something that does not exist.

    Blocks of Python are examples of what is to be written, and are passed over.
    """
    text = EXAMPLE.sub(lambda match: "\n" * match[0].count("\n"), text)

    def line(match: re.Match[str]) -> int:
        return text.count("\n", 0, match.start(1)) + 1

    for match in PATH.finditer(text):
        path = match[1]
        if ELSEWHERE.match(path):
            continue
        if not any((ROOT / home / path).exists() for home in HOMES) and not (folder / path).exists():
            yield line(match), f"no file {path}"
    for match in TEST.finditer(text):
        file = ROOT / match[1]
        if file.is_file() and f"\ndef {match[2]}(" not in file.read_text():
            yield line(match), f"no test {match[2]} in {match[1]}"
    for match in MODULE.finditer(text):
        if not is_module(match[1]):
            yield line(match), f"no module {match[1]}"
    for match in VERB.finditer(text):
        if match[1] not in verbs():
            yield line(match), f"no verb {match[1]}"
    for match in TARGET.finditer(text):
        if match[1] not in targets():
            yield line(match), f"no target {match[1]} in the Makefile"


def problems() -> list[str]:
    """What documents name and does not exist, as `file:line: what`."""
    found = []
    for document in documents():
        text = document.read_text()
        for line, what in sorted([*missing(text, document.parent), *settings.wrong(text)]):
            found.append(f"{document.relative_to(ROOT)}:{line}: {what}")
    return found


if __name__ == "__main__":
    found = problems()
    print("\n".join(found))
    sys.exit(bool(found))
