"""What stands in the records of a run directory, whichever version wrote them."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, BeforeValidator, with_config
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from megatron_synth.config.section import parse_ratio
from megatron_synth.core.records import OPEN, Amount, Count, Positive, Reader
from megatron_synth.data.mixing.ledger import EarlierLabels


def _ratio(text: str) -> str:
    parse_ratio(text)
    return text


RatioText = Annotated[str, AfterValidator(_ratio)]
"""An exact share, such as `2/3`."""
AnyRatio = Annotated[Any, BeforeValidator(lambda value: None if value is None else parse_ratio(value))]
"""The same as a Fraction; None where phases have the shares."""


# ---- run.json


@with_config(OPEN)
class StartInfo(TypedDict):
    """One start of a run."""

    time: str
    layout: str
    world_size: Positive
    resumed_from_step: Count | None


@with_config(OPEN)
class GitInfo(TypedDict):
    """A commit."""

    commit: str
    dirty: bool


@with_config(OPEN)
class RunInfo(TypedDict):
    """run.json."""

    id: str
    created: str
    starts: list[StartInfo]
    digest: str
    host: str
    device: str
    layout: str
    world_size: Positive
    versions: dict[str, str]
    git: GitInfo | None


# ---- ledger.json


@with_config(OPEN)
class SourceCounts(TypedDict):
    """What a source has delivered."""

    ratio: RatioText
    samples: Count
    tokens: Count
    epochs: Amount
    share: Amount


@with_config(OPEN)
class LearnedCounts(TypedDict):
    """Labels that were in the loss."""

    tokens: Count
    sources: dict[str, Count]
    earlier: NotRequired[EarlierLabels]


@with_config(OPEN)
class LedgerInfo(TypedDict):
    """ledger.json."""

    samples: Count
    tokens: Count
    sequence_length: Positive
    sources: dict[str, SourceCounts]
    learned: NotRequired[LearnedCounts]


# ---- config.yaml: what is read of it without being valid in this version


@with_config(OPEN)
class _Model(TypedDict):
    name: str
    num_layers: Positive
    hidden_size: Positive
    num_attention_heads: Positive
    num_query_groups: NotRequired[Positive | None]


@with_config(OPEN)
class _Source(TypedDict):
    ratio: NotRequired[AnyRatio]


@with_config(OPEN)
class _Data(TypedDict):
    sources: dict[str, _Source]
    phases: NotRequired[list[Any]]


@with_config(OPEN)
class _Train(TypedDict):
    steps: Positive
    sequence_length: Positive
    seed: int


@with_config(OPEN)
class _Precision(TypedDict):
    dtype: str


@with_config(OPEN)
class RunConfig(TypedDict):
    """config.yaml of a run of any version."""

    model: _Model
    data: _Data
    train: _Train
    precision: _Precision


RUN: Reader[RunInfo] = Reader(RunInfo, "restore it from a copy, or use another folder")
LEDGER: Reader[LedgerInfo] = Reader(LedgerInfo, "restore it from a copy; the next checkpoint of the run writes it again")
CONFIG: Reader[RunConfig] = Reader(RunConfig, "restore it from a copy, or start the run again with its configuration")
COMMIT: Reader[GitInfo] = Reader(GitInfo, "submit the job again")
