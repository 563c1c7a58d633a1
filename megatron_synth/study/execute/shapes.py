"""What stands in the records of a study's runs."""

from __future__ import annotations

from typing import NotRequired

from pydantic import with_config
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from megatron_synth.core.records import OPEN, Amount, Count, Number, Positive, Reader, Whole
from megatron_synth.train.record.shapes import GitInfo, SourceCounts


@with_config(OPEN)
class Result(TypedDict):
    """result.json of a finished run."""

    id: str
    run: str
    seed: Whole
    steps: Positive
    tokens: Positive
    parameters: Positive
    vocab_size: Positive
    flops: Amount
    loss: dict[str, Number | None]
    """By validation domain; None: no label of it counted."""
    bpb: dict[str, Number | None]
    tokens_evaluated: dict[str, Count]
    train_loss: Number | None
    skipped: Count
    sources: dict[str, SourceCounts]
    train_seconds: Amount
    device: str
    layout: str
    world_size: Positive
    git: GitInfo | None
    versions: dict[str, str]
    data_digest: str
    trunk: NotRequired[str]
    """Id of the run that it is a branch of, or of itself if others are; results of one trunk are not independent."""
    finished: str
    last_forecast: NotRequired[str | None]
    """Digest of the last forecast that the study's folder held when the run ended."""


@with_config(OPEN)
class Failure(TypedDict):
    """state/<id>.json: the last failure of a run."""

    run: NotRequired[str]
    attempts: Positive
    exit_code: Whole
    message: str
    time: str


@with_config(OPEN)
class UnigramCounts(TypedDict):
    """As `synthesis.measure.unigrams.Unigrams`."""

    counted: Count
    tail_types: Count
    lost: Number
    lost_by_chance: Number
    tail: Number
    kl: Number
    kl_reverse: Number
    kl_by_chance: Number
    kl_reverse_by_chance: Number


@with_config(OPEN)
class CorpusAccount(TypedDict):
    """asked = kept + rejected + refused + unanswered."""

    asked: Count
    kept: Count
    rejected: dict[str, Count]
    refused: Count
    unanswered: Count


@with_config(OPEN)
class CorpusCost(TypedDict):
    """What generation took, rejected text included."""

    tokens_in: Count
    tokens_out: Count
    flops: Amount | None


@with_config(OPEN)
class CorpusResult(TypedDict):
    """corpus.json of a corpus that a study has made."""

    id: str
    name: str
    seed: Whole
    kind: str
    template: str
    by: str
    documents: Positive
    tokens: Positive
    account: CorpusAccount
    cost: CorpusCost
    seconds: Amount
    processor_seconds: Amount
    unigrams: UnigramCounts
    fingerprint: str
    finished: str


RESULT: Reader[Result] = Reader(Result, "delete it, and the next submit makes it again", nan_is_null=True)
CORPUS: Reader[CorpusResult] = Reader(CorpusResult, "delete it, and the next submit makes it again")
FAILURE: Reader[Failure] = Reader(Failure, "delete it, and the next submit tries the run again")
