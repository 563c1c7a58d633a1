"""`synthesize run`: ask what has no answer yet, keep answers as they come, then make the corpus of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_synth.config.load import to_yaml
from megatron_synth.core.files import write_atomic, write_json
from megatron_synth.core.lock import Lock
from megatron_synth.core.log import duration, human, show
from megatron_synth.core.records import Reader
from megatron_synth.data.preparing.progress import progress
from megatron_synth.data.preparing.readers.synthesized import Account, SynthesisRecord
from megatron_synth.synthesis.answers.parts import Answer, Answers
from megatron_synth.synthesis.canary import check_chat, check_engine
from megatron_synth.synthesis.corpus import make_corpus
from megatron_synth.synthesis.engines.base import Engine, EngineGone
from megatron_synth.synthesis.requests import Request
from megatron_synth.synthesis.setup import Counted, Setup
from megatron_synth.synthesis.synthesis_file import SynthesisConfig

SETTINGS = "synthesis.yaml"
ENGINE = "engine.json"
LOCK = "run.lock"

_FACTS: Reader[dict[str, Any]] = Reader(dict[str, Any], "remove it: the engine is asked again")


@dataclass(frozen=True)
class Outcome:
    """How a run has ended.

    account: of all requests; None where it was not taken, as the run was stopped or the engine has gone. record: of the corpus;
    None where it was not made. gone: why the engine answers no more. made: answers of this run.
    """

    account: Account | None
    record: SynthesisRecord | None
    gone: str | None
    made: int


@dataclass
class Made:
    """What this run has made so far."""

    answers: int = 0
    tokens: int = 0


def run(config: SynthesisConfig, stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Make the corpus that the file asks for; go on where a run before this one has ended.

    stop: asked before each new request; from then on none is sent, and those in flight are waited for.

    Raises:
        UserError: something is wrong with the file, the input, the engine or the disk. All answers that came are kept.
    """
    config.folder.mkdir(parents=True, exist_ok=True)
    with Lock(config.folder / LOCK, "synthesize run"):
        setup = Setup.of(config, export=True)
        setup.warn()
        write_atomic(config.folder / SETTINGS, to_yaml(config))
        with closing(Answers(setup.answers)) as answers:
            made, gone = Made(), None
            if next(_missing(setup, answers, 1), None) is not None:
                gone = _generate(setup, answers, stop, made)
            if gone is not None or stop():
                return Outcome(None, None, gone, made.answers)
            show(f"{config.output}: judging {human(len(answers))} answers", error=True)
            found = make_corpus(setup, answers, _facts(config.folder))
    if isinstance(found, Account):
        return Outcome(found, None, None, made.answers)
    return Outcome(found.account, found, None, made.answers)


def _missing(setup: Setup, answers: Answers, group: int) -> Iterator[Request]:
    """Requests without an answer; with those that an engine batches together with them."""
    found = setup.requests(Counted())
    while batch := list(islice(found, group)):
        if any(request.key not in answers for request in batch):
            yield from batch


def _generate(setup: Setup, answers: Answers, stop: Callable[[], bool], made: Made) -> str | None:
    """Ask for all that is missing; why the engine has gone, if it has."""
    engine = setup.engine()
    try:
        _check(setup, engine)
        start = time.monotonic()
        with progress(setup.config.output, 0, "answers") as bar:

            def sink(pairs: Sequence[tuple[Request, Answer]]) -> None:
                answers.add(
                    [
                        (
                            request.key,
                            [parent.id for parent in request.chunk.parents],
                            request.chunk.number,
                            request.sample,
                            answer,
                        )
                        for request, answer in pairs
                    ]
                )
                made.answers += len(pairs)
                made.tokens += sum(answer.tokens_out or 0 for _, answer in pairs)
                bar.update(len(pairs))

            def asked() -> Iterator[Request]:
                for number, request in enumerate(_missing(setup, answers, engine.group)):
                    if number % engine.group == 0 and stop():
                        return
                    yield request

            engine.run(asked(), sink, setup.config.sampling.max_tokens)
        took = time.monotonic() - start
        rate = made.tokens / max(took, 1e-9)
        told = f"{made.answers:,} answers, {human(made.tokens)} tokens in {duration(took)}, {human(rate)} tokens/s"
        show(f"{setup.config.output}: {told}", error=True)
    except EngineGone as error:
        return str(error)
    finally:
        engine.close()
    return None


def _check(setup: Setup, engine: Engine) -> None:
    """Refuse an engine that cannot do what is asked; note what it can."""
    found = engine.check()
    facts = {}
    if setup.config.decoding is None:  # models that are only asked for probabilities have no such faults
        check_chat(setup.wording, found)
        setup.check_context(found.context)
        facts = check_engine(engine, setup.wording)
    write_json(setup.config.folder / ENGINE, {**engine.facts(), "context": found.context, **facts})


def _facts(folder: Path) -> dict[str, Any]:
    """What the engine that made the answers has said of itself."""
    return _FACTS.read_optional(folder / ENGINE) or {}
