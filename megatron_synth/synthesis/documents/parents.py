"""Natural documents as parents: read by `prepare`'s readers, without what it holds out for validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.config.synthesis import ParentsConfig
from megatron_synth.data.preparing.readers.documents import is_held_out, with_text
from megatron_synth.data.preparing.readers.inputs import reader_of
from megatron_synth.data.preparing.readers.values import document_id


@dataclass(frozen=True, slots=True)
class Parent:
    """A document.

    id: a digest of its text; order: its place among all documents of all parents; source: the name that it was read under.
    """

    id: str
    order: int
    source: str
    text: str


@dataclass(frozen=True)
class Chosen:
    """Documents that were chosen, by their ids, and how, for the manifest."""

    ids: frozenset[str]
    described: dict[str, Any]


class Parents:
    """All documents of all sources, in the order of the file. Reading again gives the same."""

    def __init__(self, sources: Mapping[str, ParentsConfig], chosen: Chosen | None = None):
        """`chosen`: those that are left of all, if not all are."""
        self._sources, self._chosen = sources, chosen
        self._readers = {name: reader_of(name, source.as_source()) for name, source in sources.items()}

    def check(self) -> None:
        """Look for their files.

        Raises:
            UserError: there are none, or they cannot be reached.
        """
        for reader in self._readers.values():
            try:
                reader.files()
            except UserError as error:
                raise _as_parents(error) from None

    def describe(self) -> dict[str, Any]:
        """What they are read from, down to a fingerprint of the content, for the manifest.

        Raises:
            UserError: something is missing or cannot be read.
        """
        found = {}
        for name, reader in self._readers.items():
            try:
                found[name] = reader.describe()
            except UserError as error:
                raise _as_parents(error) from None
            holdout = self._sources[name].holdout
            if holdout is not None:
                found[name] |= {"without_holdout": str(holdout)}
            for limit in ("max_bytes", "max_documents"):
                value = getattr(self._sources[name], limit)
                if value is not None:
                    found[name] |= {limit: value}
        # no source has a name with spaces
        return found if self._chosen is None else {**found, "chosen by loss": self._chosen.described}

    def only(self, chosen: Chosen) -> Parents:
        """The same, of which others are left out."""
        return Parents(self._sources, chosen)

    def __iter__(self) -> Iterator[Parent]:
        """The documents.

        Raises:
            UserError: a record is no text, and its source does not skip such records.
        """
        order = 0
        for name in self._sources:
            try:
                for text in self._texts(name):
                    parent = Parent(document_id(text), order, name, text)
                    order += 1
                    if self._chosen is None or parent.id in self._chosen.ids:
                        yield parent
            except UserError as error:
                raise _as_parents(error) from None

    def with_holdout(self) -> list[str]:
        """Names of the sources of which documents are held out for validation."""
        return [name for name, settings in self._sources.items() if settings.holdout is not None]

    def held_out(self, name: str) -> Iterator[str]:
        """Texts of a source that are no parents, as `prepare` holds them out for validation."""
        return self._texts(name, held_out=True)

    def _texts(self, name: str, *, held_out: bool = False) -> Iterator[str]:
        settings, reader = self._sources[name], self._readers[name]
        skipped: list[str] = []
        documents = read = 0
        found = (document for split in reader.splits() for document in reader.documents(split))
        for document, size in with_text(name, settings.as_source(), found, skipped):
            if len(skipped) > settings.max_errors:
                raise UserError(f"sources.{name}: more than {settings.max_errors} records are no text; the first: {skipped[0]}")
            if (settings.holdout is not None and is_held_out(document.key, settings.holdout)) == held_out:
                yield document.text
                documents += 1
            read += size
            if (settings.max_bytes is not None and read >= settings.max_bytes) or documents == settings.max_documents:
                return


def _as_parents(error: UserError) -> UserError:
    """Readers speak of `sources`, as in a file of `prepare`; here the key is `parents`."""
    text = str(error)
    return UserError("parents" + text.removeprefix("sources")) if text.startswith("sources.") else error
