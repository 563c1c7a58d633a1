"""The `data` section of a training configuration. Each field's docstring is its description."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from megatron_synth.config.expression import parse
from megatron_synth.config.section import Amount, DiskPath, PositiveInt, Ratio, Section


def _expression(value: str) -> str:
    try:
        parse(value)
    except ValueError as error:
        raise ValueError(f"{value!r:.200}: {error}") from None
    return value


Where = Annotated[str, AfterValidator(_expression)]
SampleNumber = Annotated[int, Field(ge=0, le=2**60)]


class SourceConfig(Section):
    """One training source of the mixture."""

    path: str
    """A prepared source: the folder of its manifest.json, also in object storage (`s3://bucket/web`, with data.staging), or the
    prefix of a Megatron .bin/.idx pair."""
    ratio: Ratio | None = None
    """Share of the training samples: `1/3`, `0.337`. Exact; all ratios sum to 1. Required unless data.phases says it."""
    max_epochs: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 1.0
    """How often the source may be seen; `.inf` for any number. A run that needs more is refused before training."""
    unique_tokens: Amount | None = None
    """Use only so many tokens of the source, in whole windows chosen by the data seed; a smaller number chooses a part of
    what a larger one does. Epochs are then passes over these. Default: all."""
    where: Where | None = None
    """Only the documents that an expression over the source's columns means, such as `score >= 0.8 and kind == 'qa'`: a source
    of its own, with its own ratio and epochs, read without a copy. Default: all. Not for a source that was packed."""
    shift_windows: bool = False
    """Cut each epoch into windows at an offset of its own, chosen by the data seed: documents that come again are then cut
    elsewhere. Not with unique_tokens, nor for a source that was packed."""

    @field_validator("max_epochs")
    @classmethod
    def _no_more_than_can_be(cls, value: float) -> float:
        if 1e12 < value < float("inf"):
            raise ValueError(f"must be at most 1e12, or .inf for any number, got {value:g}")
        return value


class ValidationConfig(Section):
    """One validation domain."""

    path: str
    """A prepared source, as for training."""
    where: Where | None = None
    """Documents of it, as for training."""


class AnswersConfig(Section):
    """A domain of questions whose right answers are scored in every evaluation: bits per byte, and accuracy of choices."""

    path: DiskPath
    """A .jsonl of rows `{"context": ..., "answer": ...}`, or `{"context": ..., "choices": [...], "answer": 2}`, the number of
    a choice from 0. The answer is what follows the context, a space included."""
    task: DiskPath | None = None
    """A task file of lm-evaluation-harness, whose templates make context and answers of the rows. Default: they have them."""
    limit: PositiveInt | None = None
    """The first so many rows. Default: all."""


class RampConfig(Section):
    """A straight line from one mixture to another, in blocks of fixed ratios."""

    start: dict[str, Ratio] = Field(alias="from", min_length=1)
    """Shares at the start, by source; a source that is not named has none. They sum to 1."""
    end: dict[str, Ratio] = Field(alias="to", min_length=1)
    """Shares at the end."""
    blocks: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Steps of the line; each has the exact ratios of the line at its middle."""
    until: Amount | None = None
    """End of the line, in tokens since the run began, where the phase ends before it does: what a branch leaves of
    a ramp of its trunk. Default: the phase's."""


class PhaseConfig(Section):
    """A part of the run with a mixture of its own."""

    tokens: Amount | None = None
    """Length. Ends are rounded to the nearest whole sample."""
    until: Amount | None = None
    """End, in tokens since the run began, instead of `tokens`. The last phase may have neither: it does not end."""
    ratios: dict[str, Ratio] | None = Field(default=None, min_length=1)
    """Share of each source; a source that is not named has none. Default: the ratios in data.sources."""
    ramp: RampConfig | None = None
    """Change of the shares along a straight line, instead of `ratios`."""


class DataConfig(Section):
    """The mixture and the validation domains."""

    sources: dict[str, SourceConfig] = Field(min_length=1)
    """Training sources by name."""
    phases: tuple[PhaseConfig, ...] = ()
    """Mixtures that follow each other. Default: one, with the ratios in `sources`."""
    skip: tuple[tuple[SampleNumber, SampleNumber], ...] = ()
    """Samples that are left out for ever, as ranges `[first, last]` of their numbers: those that events.log names at a spike,
    for a run or branch that goes on from before it. All others keep their numbers."""
    validation: dict[str, ValidationConfig] = {}
    """Validation domains by name."""
    answers: dict[str, AnswersConfig] = {}
    """Domains of questions by name, evaluated with those of `validation`."""
    windows_per_sequence: PositiveInt = 1
    """Windows that a sequence is made of, each of sequence_length / windows_per_sequence tokens of one source: every sequence
    then holds several sources, at their exact ratios as near as whole windows allow. A sample is one window."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    """Seed of the data order. Default: train.seed."""
    verify: Literal["sizes", "blocks"] = "sizes"
    """What is checked while reading: file sizes when a source is opened, or also the checksum of every 4 MiB block before
    anything of it is used, at 0.5 to 1 times the reading speed. Token ids beyond the vocabulary are refused either way."""
    memory_map: bool = True
    """Read tokens through a memory map. false reads with calls instead: slower from a page cache, but some network file systems
    like it better. With `verify: blocks` it is always so."""
    staging: DiskPath | None = None
    """Folder on a disk of the machine, such as a local NVMe drive: sources are copied there when training starts, unless they
    are there already, and read from there. For corpora on a network file system, and needed for those in object storage. Needs
    sources with a manifest.json."""
    staging_bytes: Amount | None = None
    """Most bytes that the copies in staging take together: before others are made, those that no process uses go, the one used
    longest ago first. Default: none goes."""
    document_masks: bool = False
    """Attention within documents only, positions counted from the beginning of each (Megatron's --reset-attention-mask and
    --reset-position-ids). Otherwise a row of tokens is one text, whatever documents it is made of."""
    eod_mask_loss: bool = False
    """No loss where the label is the first token of the next document: a row of tokens is then trained on fewer labels, and
    losses are means over those (Megatron's --eod-mask-loss)."""
    exclude_parents_of: Literal["validation"] | None = None
    """validation: of every source that has a column of type parent, leave out the documents of which a parent is a document of
    a validation domain, by its id. The domains need a column of type id or text_id."""
    cache: DiskPath | None = None
    """Folder for the indexes that `where` and `exclude_parents_of` need. Default: megatron-synth in $XDG_CACHE_HOME, or in
    ~/.cache."""
    tokenizer: str | None = None
    """tokenizer.json for sources without a manifest. Default: the one that the manifests name."""

    @property
    def phase_ends(self) -> tuple[int | None, ...]:
        """End of each phase in tokens since the run began; None: it has no end."""
        ends: list[int | None] = []
        for phase in self.phases:
            before = ends[-1] if ends else 0
            after = None if phase.tokens is None or before is None else before + phase.tokens
            ends.append(phase.until if phase.until is not None else after)
        return tuple(ends)

    def phase_ratios(self, phase: PhaseConfig) -> dict[str, Fraction]:
        """Fixed shares of a phase by source, after the default."""
        if phase.ratios is not None:
            return phase.ratios
        return {name: source.ratio or Fraction(0) for name, source in self.sources.items()}
