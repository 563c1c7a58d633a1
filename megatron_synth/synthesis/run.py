"""`synthesize run`: ask what has no answer yet, keep answers as they come, then make the corpus of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.config.load import to_yaml
from megatron_synth.core.exit_record import at_step
from megatron_synth.core.files import write_atomic, write_json
from megatron_synth.core.lock import Lock, refuse_alive
from megatron_synth.core.log import duration, human, show
from megatron_synth.core.records import Reader
from megatron_synth.data.preparing.progress import progress
from megatron_synth.data.preparing.readers.synthesized import Account, SynthesisRecord
from megatron_synth.synthesis.answers.parts import Answer, Answers
from megatron_synth.synthesis.canary import check_chat, check_engine
from megatron_synth.synthesis.corpus import make_corpus
from megatron_synth.synthesis.engines.base import Engine, EngineGone, StopAsking
from megatron_synth.synthesis.filters.base import Filters
from megatron_synth.synthesis.generator import MARK
from megatron_synth.synthesis.recombined import FOLDER, extraction, extraction_record, is_asked, is_missing
from megatron_synth.synthesis.requests import Request
from megatron_synth.synthesis.setup import ANSWERS, Counted, Setup
from megatron_synth.synthesis.shares import FOLDERS, Share
from megatron_synth.synthesis.synthesis_file import SynthesisConfig

SETTINGS = "synthesis.yaml"
ENGINE = "engine.json"
LOCK = "run.lock"

_FACTS: Reader[dict[str, Any]] = Reader(dict[str, Any], "remove it: the engine is asked again")


@dataclass(frozen=True)
class Outcome:
    """How a run has ended.

    account: of all requests; None where it was not taken, as the run was stopped, the engine has gone, or a share was run.
    record: of the corpus; None where it was not made. gone: why the engine answers no more. made: answers of this run.
    missing: requests of the share that have no answer; None where no share was run, or it was stopped.
    """

    account: Account | None
    record: SynthesisRecord | None
    gone: str | None
    made: int
    missing: int | None = None

    @property
    def is_complete(self) -> bool:
        """Whether there is a corpus."""
        return self.record is not None


@dataclass
class Made:
    """What this run has made so far."""

    answers: int = 0
    tokens: int = 0


def run(
    config: SynthesisConfig, stop: Callable[[], bool] = lambda: False, *, share: Share | None = None, ask: bool = True
) -> Outcome:
    """Make the corpus that the file asks for; go on where a run before this one has ended.

    stop: asked before each new request; from then on none is sent, and those in flight are waited for. share: only answer the
    requests of one; the corpus is made by a run without. ask: whether the engine is asked, or only what has answers is judged.

    Raises:
        UserError: something is wrong with the file, the input, the engine or the disk. All answers that came are kept.
    """
    folder = config.folder / ANSWERS / ("" if share is None else share.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(config.folder, folder, share):
        if is_asked(config) and not (before := _concepts(config, stop, share, ask)).is_complete:
            return before
        # a share, and who only judges, take what was exported when the answers began
        setup = Setup.of(config, export=(share is None and ask) or not (config.folder / MARK).is_dir())
        setup.warn()
        filters = Filters(config.filters)  # what it lacks is told before any long work
        if share is None:
            write_atomic(config.folder / SETTINGS, to_yaml(config))
        with closing(Answers(setup.answers, "" if share is None else share.folder)) as answers:
            made, gone = Made(), None
            if ask and next(_missing(setup, answers, share), None) is not None:
                where = config.folder if share is None else folder
                gone = _generate(setup, answers, stop, made, share, where)
            if gone is not None or stop():
                return Outcome(None, None, gone, made.answers)
            if share is not None:
                missing = sum(request.key not in answers for request in _missing(setup, answers, share))
                return Outcome(None, None, None, made.answers, missing)
            show(f"{config.output}: judging {human(len(answers))} answers", error=True)
            found = make_corpus(setup, answers, filters, engine_facts(config.folder))
    if isinstance(found, Account):
        return Outcome(found, None, None, made.answers)
    return Outcome(found.account, found, None, made.answers)


def _concepts(config: SynthesisConfig, stop: Callable[[], bool], share: Share | None, ask: bool) -> Outcome:
    """Make the concepts that the requests are about; a share, and who only judges, must find them.

    Raises:
        UserError: as `run`, or they are not there.
    """
    first = extraction(config)
    if share is None and ask:
        show(f"{first.output}: the concepts of the parents come first", error=True)
        return run(first, stop)
    if is_missing(config):
        raise UserError(
            f"{first.output}: the concepts come first: `synthesize run --slurm` or without --share, or the shares of "
            f"{config.folder / FOLDER}, whose settings are those of this file with `kind: concepts`"
        )
    return Outcome(None, extraction_record(config), None, 0)


@contextmanager
def _locked(output: Path, folder: Path, share: Share | None) -> Iterator[None]:
    """The locks of a run: of a share its own, of the whole that of the output and those of all shares.

    Raises:
        UserError: another run works in the output, on this share or by shares of another number.
    """
    program = "synthesize run" if share is None else f"synthesize run --share {share.number}/{share.of}"
    with ExitStack() as held:
        held.enter_context(Lock((output if share is None else folder) / LOCK, program))
        if share is None:
            for other in sorted(folder.glob(f"{FOLDERS}/")):
                held.enter_context(Lock(other / LOCK, program))
        else:  # whoever comes second, a share or the whole, sees the lock of the other
            refuse_alive(output / LOCK)
            for other in sorted(folder.parent.glob(f"{FOLDERS}/{LOCK}")):
                if not other.parent.name.endswith(folder.name.removeprefix(f"share-{share.number:05d}")):
                    refuse_alive(other)
        yield


def _missing(setup: Setup, answers: Answers, share: Share | None) -> Iterator[Request]:
    """Requests without an answer, of a share if one is given; with those that an engine batches together with them."""
    batches = setup.group > 1
    found = setup.requests(Counted(), None if batches else share)
    number = 0
    while batch := list(islice(found, setup.group)):
        mine = share is None or not batches or share.has_batch(number)
        number += 1
        if mine and any(request.key not in answers for request in batch):
            yield from batch


def _generate(
    setup: Setup, answers: Answers, stop: Callable[[], bool], made: Made, share: Share | None, folder: Path
) -> str | None:
    """Ask for all that is missing; why the engine has gone, if it has. folder: of the engine's log and facts."""
    engine = setup.engine(folder)
    try:
        _check(setup, engine, folder)
        at_step(len(answers))  # what a launcher knows progress by
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
                at_step(len(answers))

            def asked() -> Iterator[Request]:
                for number, request in enumerate(_missing(setup, answers, share)):
                    if number % setup.group == 0 and stop():
                        raise StopAsking
                    yield request

            with suppress(StopAsking):
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


def _check(setup: Setup, engine: Engine, folder: Path) -> None:
    """Refuse an engine that cannot do what is asked; note what it can."""
    found = engine.check()
    facts = {}
    if setup.config.decoding is None:  # models that are only asked for probabilities have no such faults
        check_chat(setup.wording, found)
        setup.check_context(found.context)
        facts = check_engine(engine, setup.wording)
    write_json(folder / ENGINE, {**engine.facts(), "context": found.context, **facts})


def engine_facts(output: Path) -> dict[str, Any]:
    """What the engines that made the answers have said of themselves; where they differ, all that they said."""
    files = [output / ENGINE, *sorted((output / ANSWERS).glob(f"{FOLDERS}/{ENGINE}"))]
    told = [facts for file in files if (facts := _FACTS.read_optional(file)) is not None]
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for facts in told for name in facts):
        values = [facts.get(name) for facts in told]
        different = [value for at, value in enumerate(values) if value not in values[:at]]
        merged[name] = different[0] if len(different) == 1 else different
    return merged
