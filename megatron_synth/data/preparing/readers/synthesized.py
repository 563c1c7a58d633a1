"""A corpus that `megatron-synth synthesize` made, as a source: its text, and the record of how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import Kind, PrepareSource
from megatron_synth.config.section import Section
from megatron_synth.core.names import plain_name
from megatron_synth.core.records import Count
from megatron_synth.core.records import Reader as RecordReader
from megatron_synth.data.preparing.readers.files import Files, fingerprint

RECORD = "synthesis.json"
CORPUS = "corpus"

Short = Annotated[str, Field(max_length=1000)]
Name = Annotated[str, Field(max_length=8192)]


class Account(Section):
    """What became of every request: asked = kept + rejected + refused + unanswered."""

    asked: Count
    kept: Count
    rejected: dict[Annotated[str, Field(pattern="^[a-z][a-z_]*$", max_length=64)], Count]
    """By reason."""
    refused: Count
    """The engine would not answer."""
    unanswered: Count
    """No server answered, after all attempts."""

    def is_balanced(self) -> bool:
        """Whether nothing is missing and nothing counted twice."""
        return self.asked == self.kept + sum(self.rejected.values()) + self.refused + self.unanswered


class Cost(Section):
    """What generation took, rejected text included."""

    tokens_in: Count
    """Of prompts."""
    tokens_cached: Count
    """Of these, those that a prefix cache had."""
    tokens_out: Count
    untold: Count
    """Answers whose server did not say how many tokens they took: they are missing in the numbers above."""
    flops: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    """2 x parameters x (tokens_in - tokens_cached + tokens_out); null where the parameters are not known."""


class TemplateInfo(Section):
    """How requests were worded."""

    name: Short
    version: Count
    origin: str
    digest: Short


class SynthesisRecord(Section):
    """How a corpus was made. Nothing here differs between two runs that do the same."""

    format_version: Literal[1] = 1
    program: Short
    kind: Kind
    """What the text is, as a source."""
    template: TemplateInfo
    generator: dict[str, Any]
    """Name, revision, digest of the weights, parameters, and engine."""
    generator_name: Name
    sampling: dict[str, Any]
    seed: Count
    filters: dict[str, Any]
    settings_digest: Annotated[str, Field(max_length=64)]
    parents: dict[str, Any]
    """What the parents are read from."""
    documents: Count
    """Of the corpus."""
    tokens: dict[Literal["generator", "study"], Count] = {}
    """Of the corpus, by the generator's tokenizer and by that of the study, where they are known."""
    parent_documents: Count
    """Documents of the parents that were read."""
    skipped: dict[str, Count]
    """Parents and chunks about which nothing was asked, by reason."""
    account: Account
    cost: Cost
    license: Short
    """What to heed about the generator's outputs."""
    files: Annotated[list[Annotated[str, Field(max_length=255)]], Field(max_length=100_000)]
    """Of the corpus, in order."""
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of names and contents of these files."""


_RECORD: RecordReader[SynthesisRecord] = RecordReader(SynthesisRecord, "synthesize the corpus again")


def read_record(folder: Path) -> SynthesisRecord:
    """The record of a corpus.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = folder / RECORD
    if not file.is_file():
        raise UserError(f"{folder}: no finished corpus (no {RECORD}); run `megatron-synth synthesize run` to its end")
    record = _RECORD.read(file)
    for name in record.files:
        try:
            plain_name(name, "files")
        except ValueError as error:
            raise UserError(f"{file}: damaged: {error}; synthesize the corpus again") from None
    if not record.account.is_balanced():
        raise UserError(f"{file}: damaged: its account does not add up; synthesize the corpus again")
    return record


class Synthesized(Files):
    """The files of a corpus, which must be those that were made."""

    def __init__(self, name: str, source: PrepareSource):
        assert source.synthesized is not None
        self.folder = Path(source.synthesized)
        try:
            self.record = read_record(self.folder)
        except UserError as error:
            raise UserError(f"sources.{name}.synthesized: {error}") from None
        if self.record.kind != source.kind:
            raise UserError(f"sources.{name}.kind: {self.folder} holds text of kind {self.record.kind}, found {source.kind}")
        if not self.record.files:
            raise UserError(
                f"sources.{name}.synthesized: {self.folder}: nothing was kept of {self.record.account.asked} answers"
            )
        paths = tuple(str(self.folder / CORPUS / one) for one in self.record.files)
        super().__init__(name, source.model_copy(update={"input": paths, "text_key": "text"}))

    @property
    def generator(self) -> str | None:
        """The one of the settings, or else of the record."""
        return self.source.generator or self.record.generator_name

    def describe(self) -> dict[str, Any]:
        """The record of how the corpus was made.

        Raises:
            UserError: the corpus was altered since.
        """
        found = fingerprint([self.folder / CORPUS / one for one in self.record.files])
        if found != self.record.fingerprint:
            raise UserError(
                f"{self.folder / CORPUS}: altered since it was made; synthesize it again, or give its files as `input`"
            )
        return {"synthesized": str(self.folder), "record": self.record.model_dump(mode="json")}
