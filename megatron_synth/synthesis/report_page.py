"""The page of `synthesize report`: a finished corpus measured beside its parents, with samples.

report.html    the page; everything is inside it
figures.json   its figures

At most `MEASURED` documents are measured, drawn at random with the seed of the file, beside those of their parents that the
file still finds: natural text of about the same amount and matter, as divergences need.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_synth import __version__
from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_atomic, write_json
from megatron_synth.data.preparing.readers.synthesized import CORPUS, Account, SynthesisRecord, read_record
from megatron_synth.synthesis.corpus import REJECTED
from megatron_synth.synthesis.measure.corpus import Synthetic, measure_corpus
from megatron_synth.synthesis.measure.page import Sample, render
from megatron_synth.synthesis.setup import Setup
from megatron_synth.synthesis.status import entries
from megatron_synth.synthesis.synthesis_file import SynthesisConfig

PAGE, FIGURES = "report.html", "figures.json"
MEASURED = 5000
SHOWN = 8
UNKNOWN = "(not among the parents any more)"


def write_page(config: SynthesisConfig) -> Path:
    """Measure a finished corpus and write its page.

    Raises:
        UserError: there is no finished corpus, a file of it is damaged, or no word of it or of its parents is there.
    """
    record = read_record(config.folder)
    setup = Setup.of(config, export=False)
    drawn = _drawn(entries(config.folder / CORPUS, record.files), MEASURED, config.seed)
    rejected = _one_of_each_reason(config.folder)
    texts = _texts_of(setup, {parent for entry in (*drawn, *rejected) for parent in entry["parents"]})
    documents = [Synthetic(record.kind, _known(entry, texts), entry["text"]) for entry in drawn]
    natural = dict.fromkeys(text for one in documents for text in one.parents)
    try:
        figures = measure_corpus(documents, natural, validation=_validation(setup))
    except ValueError as error:
        raise UserError(f"{config.folder}: cannot be measured: {error}; look at its account with `synthesize status`") from None
    shown = [(entry, None) for entry in drawn[:SHOWN]] + [(entry, entry["reason"]) for entry in rejected]
    samples = [Sample(record.kind, _known(entry, texts) or (UNKNOWN,), entry["text"], reason) for entry, reason in shown]
    title = f"Synthetic text: {record.template['name']} by {record.generator_name}"
    page = config.folder / PAGE
    made_by = f"megatron-synth {__version__}, from {len(drawn):,} of {record.documents:,} documents"
    write_atomic(page, render(title, figures, samples, account=_account(record), made_by=made_by))
    write_json(config.folder / FIGURES, asdict(figures))
    return page


def _drawn(found: Iterable[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` of the entries, each as likely as any other, in random order."""
    draw = random.Random(seed)
    chosen: list[dict[str, Any]] = []
    for number, entry in enumerate(found):
        if len(chosen) < count:
            chosen.append(entry)
        elif (place := draw.randrange(number + 1)) < count:
            chosen[place] = entry
    draw.shuffle(chosen)
    return chosen


def _one_of_each_reason(folder: Path) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if (folder / REJECTED).is_file():
        for entry in entries(folder, [REJECTED]):
            found.setdefault(entry["reason"], entry)
    return [found[reason] for reason in sorted(found)]


def _texts_of(setup: Setup, wanted: set[str]) -> dict[str, str]:
    """Texts of the parents of these ids, as far as they are still there."""
    found: dict[str, str] = {}
    for parent in setup.parents:
        if parent.id in wanted:
            found[parent.id] = parent.text
            if len(found) == len(wanted):
                break
    return found


def _known(entry: dict[str, Any], texts: dict[str, str]) -> tuple[str, ...]:
    return tuple(texts[parent] for parent in entry["parents"] if parent in texts)


def _validation(setup: Setup) -> dict[str, Iterator[str]]:
    """Texts that are held out of the parents for validation."""
    return {f"{name}-valid": islice(setup.parents.held_out(name), MEASURED) for name in setup.parents.with_holdout()}


def _account(record: SynthesisRecord) -> dict[str, int]:
    account: Account = record.account
    rejected = {f"rejected: {reason}": count for reason, count in account.rejected.items()}
    return {"kept": account.kept, **rejected, "refused by the engine": account.refused, "unanswered": account.unanswered}
