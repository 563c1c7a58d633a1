"""The journal of a preparation: what is done, told after it is on disk, so that a run that was stopped can be continued.

Each line is a checksum and a JSON object. The checksum is taken over the line and all lines before it, so a line that is
torn, altered, lost or exchanged ends what is believed. An entry says by its keys what it is about; entries are looked up
by these keys and never counted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from megatron_synth.core.files import sync_folder, write_atomic

JOURNAL = "journal.jsonl"

Entry = dict[str, Any]


class Journal:
    """What a preparation has done, one entry per line, the head first. Opening drops what is not whole."""

    def __init__(self, folder: Path, head: Mapping[str, Any]):
        """Opens the journal of `folder`, or begins one; one that is there begins with the same head."""
        self._path = folder / JOURNAL
        found = read_journal(self._path)
        assert not found or found[0] == head
        self.entries: list[Entry] = found[1:]
        """Without the head."""
        self._head = dict(head)
        self.continued = bool(self.entries)
        """Whether a run before this one has got anywhere."""
        self._chain = xxhash.xxh3_64()
        self._write_all()

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add an entry. It is on disk when this returns; what it tells of must be there before."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(_line(self._chain, entry))
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(dict(entry))

    def drop(self, stale: Iterable[Entry]) -> None:
        """Take entries back: what they tell of is to be done again. They are gone on disk when this returns."""
        gone = [id(entry) for entry in stale]
        if gone:
            self.entries = [entry for entry in self.entries if id(entry) not in gone]
            self._write_all()

    def of(self, kind: str, **keys: Any) -> list[Entry]:
        """Entries of a kind whose values agree, in order."""
        wanted = {"kind": kind, **keys}.items()
        return [entry for entry in self.entries if all(entry.get(key) == value for key, value in wanted)]

    def one(self, kind: str, **keys: Any) -> Entry | None:
        """The only entry of a kind whose values agree; None if there is none."""
        found = self.of(kind, **keys)
        assert len(found) <= 1, f"{self._path}: {kind} {keys} was told {len(found)} times"
        return found[0] if found else None

    def _write_all(self) -> None:
        self._chain = xxhash.xxh3_64()
        write_atomic(self._path, "".join(_line(self._chain, entry) for entry in [self._head, *self.entries]))
        sync_folder(self._path.parent)


def _line(chain: xxhash.xxh3_64, entry: Mapping[str, Any]) -> str:
    text = json.dumps(entry)
    chain.update(text.encode())
    return f"{chain.hexdigest()} {text}\n"


def read_journal(path: Path) -> list[Entry]:
    """The entries of a journal, the head first, up to the first line that is not as it was written."""
    try:
        data = path.read_bytes()
    except OSError:
        return []
    found: list[Entry] = []
    chain = xxhash.xxh3_64()
    for line in data.splitlines(keepends=True):
        checksum, _, text = line.partition(b" ")
        if not text.endswith(b"\n"):
            break
        chain.update(text[:-1])
        if checksum != chain.hexdigest().encode():
            break
        found.append(json.loads(text))
    return found
