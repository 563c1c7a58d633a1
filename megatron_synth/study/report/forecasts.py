"""The forecasts of a study beside what came of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_synth.study.execute.folder import Folder
from megatron_synth.study.forecast.ledger import read_ledger
from megatron_synth.study.forecast.score import Finished, Score, lost, score
from megatron_synth.study.plan.runs import Run, expand
from megatron_synth.study.plan.study_file import Study
from megatron_synth.study.report.collect import Row, aggregate_name


@dataclass(frozen=True)
class Scored:
    """All forecasts with their scores, and what is wrong with their file as a whole."""

    scores: tuple[Score, ...] = ()
    lost: str = ""


def scored(study: Study, rows: Sequence[Row], folder: Folder, *, from_table: bool) -> Scored:
    """Score what was written down in a study's folder.

    from_table: the rows come from a table, so that no records of runs say when they ended.

    Raises:
        UserError: the file is damaged.
    """
    ledger = read_ledger(folder.forecasts)
    finished = {} if from_table else _finished(expand(study), folder)
    return Scored(tuple(score(ledger, rows, aggregate_name(study), finished)), lost(ledger, finished))


def _finished(runs: Sequence[Run], folder: Folder) -> dict[str, Finished]:
    """Of runs by id, what their results say of forecasts."""
    found = {}
    for run in runs:
        result = folder.result(run)
        if result is not None:
            found[run.id] = Finished(result["finished"], result.get("last_forecast"))
    return found
