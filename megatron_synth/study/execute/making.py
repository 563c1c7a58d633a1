"""Making a corpus of a study: the model of a run writes, what it wrote is filtered, prepared and measured.

    corpora/<name>/text/         what `synthesize run` writes: the exported model, answers, corpus, record
    corpora/<name>/prepared/     what `prepare` makes of it, with that record in the manifest
    corpora/<name>/corpus.json   what was made and what it cost, written last

Each part goes on where it was stopped: no text is asked for twice, and a corpus that is there is not made again.
"""

from __future__ import annotations

import shutil
import signal
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from megatron_synth.config.errors import EXIT_OK, EXIT_STOPPED, UserError
from megatron_synth.config.prepare import PrepareConfig, PrepareSource, TokenizerConfig
from megatron_synth.core.files import write_json
from megatron_synth.core.log import show
from megatron_synth.data.shards.source import Source, check_compatible, open_source
from megatron_synth.study.execute.folder import CORPUS, Folder
from megatron_synth.study.plan.corpora import Corpus, corpora_of
from megatron_synth.study.plan.runs import expand
from megatron_synth.study.plan.study_file import Study
from megatron_synth.synthesis.setup import ANSWERS

FORMAT_VERSION = 1
_TEXT_LEFT = "change its filters, the generator, or ask for more: nothing that was answered is asked again"


class StopRequest:
    """Set by a signal; the engine is asked to end what it has begun."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.asked


def make(study: Study, folder: Folder, corpus: Corpus) -> int:
    """Generate, prepare and measure. Returns the exit code: 0, or 75 when it was asked to stop or the engine has gone.

    Raises:
        UserError: a weight is missing, the synthesis is wrong, or nothing was kept.
    """
    from megatron_synth.synthesis.run import run

    stop = StopRequest()
    began = time.process_time()
    for one in corpus.needs:
        _check_weights(folder, corpus, one.name, folder.run(one), folder.result(one) is not None)
    natural = [open_source(source.path, name) for name, source in study.sources.items()]
    info = check_compatible(natural)  # told before any text is made
    path = next((source.tokenizer_path for source in natural if source.tokenizer_path is not None), None)
    if info is None or path is None:
        raise UserError("generated sources need the tokenizer of the others, whose folders have no manifest.json; prepare them")
    config = corpus.synthesis([folder.run(one) for one in corpus.needs])
    _take_answers(study, folder, corpus)
    outcome = run(config, stop)
    if outcome.gone is not None:
        raise UserError(f"{config.output}: {outcome.gone}; what was answered is kept: submit again to go on")
    if outcome.record is None:
        if outcome.account is not None:
            raise UserError(f"{config.output}: {outcome.account.unanswered:,} requests have no answer; submit again to go on")
        return EXIT_STOPPED
    account = outcome.record.account
    if not outcome.record.documents:
        reasons = ", ".join(f"{reason} {count}" for reason, count in account.rejected.items()) or "no chunk was long enough"
        raise UserError(f"{config.output}: of {account.asked:,} texts none was kept ({reasons}); {_TEXT_LEFT}")
    source = _prepared(corpus, path, info.eod_id)
    write_json(corpus.folder / CORPUS, _result(study, corpus, natural, source, outcome, time.process_time() - began))
    folder.clear_failure(corpus)
    return EXIT_OK


def _take_answers(study: Study, folder: Folder, corpus: Corpus) -> None:
    """Copy the answers of a finished corpus that differs in its filters alone, so that none is asked for again."""
    from megatron_synth.synthesis.run import ENGINE

    answers = corpus.folder / "text" / ANSWERS
    if answers.exists():
        return
    for other in corpora_of(expand(study)):
        if other.answers_id == corpus.answers_id and other.id != corpus.id and folder.is_done(other):
            show(f"answers of {other.name}, which differs in its filters alone")
            answers.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(other.folder / "text" / ENGINE, answers.parent / ENGINE)
            partial = answers.with_name(f"{ANSWERS}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(other.folder / "text" / ANSWERS, partial)
            partial.rename(answers)
            return


def _check_weights(folder: Folder, corpus: Corpus, name: str, run: Path, finished: bool) -> None:
    if not finished:
        raise UserError(f"{corpus.name}: its generator {name} is not finished; submit without --only, or that run first")
    if not (run / "checkpoints").is_dir():
        raise UserError(
            f"{corpus.name}: the weights of its generator were deleted, as nothing needed them then; delete {run}, and submit "
            f"again: it is then trained anew and keeps them"
        )


def _prepared(corpus: Corpus, tokenizer: Path, eod_id: int) -> Source:
    """The corpus as shards, by the tokenizer of the study's other sources."""
    from tokenizers import Tokenizer

    from megatron_synth.data.preparing.prepare import prepare

    eod = Tokenizer.from_file(str(tokenizer)).id_to_token(eod_id)
    name = corpus.template.name
    output = corpus.folder / "prepared"
    source = PrepareSource(kind=corpus.template.source_kind, synthesized=str(corpus.folder / "text"))
    made = prepare(
        PrepareConfig(output=str(output), tokenizer=TokenizerConfig(path=str(tokenizer), eod=eod), sources={name: source}),
        force=output.exists(),
    )
    opened = open_source(str(corpus.prepared), name)
    assert made is None or made[0].manifest.counts.tokens == opened.num_tokens
    show(f"{output}: {opened.num_tokens:,} tokens")
    return opened


def _result(
    study: Study, corpus: Corpus, natural: list[Source], source: Source, outcome: Any, processor_s: float
) -> dict[str, Any]:
    from megatron_synth.synthesis.measure.unigrams import compare_unigrams, count_tokens
    from megatron_synth.synthesis.status import totals
    from megatron_synth.train.record.run_dir import git_state, versions

    assert source.manifest is not None
    vocab_size = source.manifest.tokenizer.vocab_size
    baseline = study.arms[study.baseline_arm]
    counts = np.sum([count_tokens(one, vocab_size) for one in natural if one.name in baseline], axis=0)
    record = outcome.record
    return {
        "format_version": FORMAT_VERSION,
        "id": corpus.id,
        "name": corpus.name,
        "seed": corpus.seed,
        "kind": record.kind,
        "template": record.template.name,
        "by": corpus.describe(),
        "documents": record.documents,
        "tokens": source.num_tokens,
        "account": record.account.model_dump(mode="json"),
        "cost": record.cost.model_dump(mode="json"),
        "seconds": totals(corpus.folder / "text" / ANSWERS).seconds,
        "processor_seconds": processor_s,
        "unigrams": asdict(compare_unigrams(count_tokens(source, vocab_size), counts)),
        "fingerprint": record.fingerprint,
        "git": git_state(Path(__file__).parent),
        "versions": versions(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
