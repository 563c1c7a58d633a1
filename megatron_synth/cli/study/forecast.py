"""`megatron-synth study forecast`: larger runs predicted from the finished ones, written down, and scored afterwards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.core.log import compact, say
from megatron_synth.study.execute.folder import Folder
from megatron_synth.study.fit.table.row_filter import number
from megatron_synth.study.forecast.predict import LAWS, SAME, Target
from megatron_synth.study.plan.runs import Run, expand
from megatron_synth.study.plan.study_file import Study, load_study
from megatron_synth.study.report.collect import Collected, Row

EXIT_CHANGED = 1
_Cells = dict[tuple[str, str, int], list[Run]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add = parser.add_argument
    add("--score", action="store_true", help="hold what was written down against the runs that are finished since")
    add("--arm", action="append", default=[], help="of this arm; may be given again. Default: all")
    add("--size", help="at this size of the study. Default: every cell of the study without a run")
    add("--n-params", metavar="N", help="at so many non-embedding parameters, which no size of the study has")
    add("--tokens", metavar="TOKENS", help="at this budget, which the grid may have or not")
    add("--law", choices=LAWS, help="the law to use. Default: the one that the smaller runs allow")
    add("--from", dest="table", metavar="RUNS.csv", type=Path, help="take the runs from such a table instead")
    add("--hindsight", action="store_true", help="also of runs that have begun or are finished; marked as such")


def run(arguments: argparse.Namespace) -> int:
    """Write forecasts down, or score them. Returns 1 if some were changed after they were written."""
    study = load_study(arguments.file, arguments.overrides)
    runs, folder = expand(study), Folder(study.folder)
    rows = _collected(study, runs, folder, arguments.table).rows
    return _score(study, folder, rows, arguments.table) if arguments.score else _write(study, runs, folder, rows, arguments)


def _collected(study: Study, runs: Sequence[Run], folder: Folder, table: Path | None) -> Collected:
    from megatron_synth.study.report.collect import collect, read_runs_csv

    return collect(study, runs, folder) if table is None else Collected(read_runs_csv(table), [])


def _score(study: Study, folder: Folder, rows: Sequence[Row], table: Path | None) -> int:
    from megatron_synth.study.forecast.score import score_text
    from megatron_synth.study.report.forecasts import scored

    found = scored(study, rows, folder, from_table=table is not None)
    if not found.scores and not found.lost:
        raise UserError(f"{folder.forecasts}: nothing was forecast yet: `megatron-synth study forecast FILE` writes it down")
    say(score_text(found.scores))
    if found.lost:
        say(f"{folder.forecasts}: {found.lost}")
    return EXIT_CHANGED if found.lost or any(one.changed for one in found.scores) else EXIT_OK


def _write(study: Study, runs: Sequence[Run], folder: Folder, rows: Sequence[Row], arguments: argparse.Namespace) -> int:
    from megatron_synth.study.forecast.ledger import write_down
    from megatron_synth.study.forecast.predict import Prediction, predict
    from megatron_synth.study.forecast.score import forecast_text

    targets = _targets(study, runs, rows, arguments)
    begun = [_begun(target, runs, folder, rows, arguments.table) for target in targets]
    if not arguments.hindsight:
        late = [(target, why) for target, why in zip(targets, begun, strict=True) if why]
        named = bool(arguments.size or arguments.n_params or arguments.tokens)
        if late and (named or len(late) == len(targets)):
            raise UserError(
                f"{late[0][0].name}: {late[0][1]}, so a forecast would come too late; --hindsight writes it down, and marks it"
            )
        targets = [target for target, why in zip(targets, begun, strict=True) if not why]
        begun = [""] * len(targets)
    predictions: list[tuple[Prediction, bool]] = []
    for target, why in zip(targets, begun, strict=True):
        try:
            settings = {"bootstraps": study.report.bootstraps, "seed": study.report.seed}
            predictions.append((predict(rows, target, law=arguments.law, **settings), bool(why)))
        except UserError as error:
            if len(targets) == 1:
                raise
            say(f"no forecast of {error}")
    if not predictions:
        raise UserError("nothing can be forecast from the runs that are finished")
    found, late_flags = zip(*predictions, strict=True)
    from megatron_synth.study.report.collect import aggregate_name

    written = write_down(folder.forecasts, found, rows, aggregate=aggregate_name(study), hindsight=late_flags)
    say(forecast_text(written))
    say(f"\n{folder.forecasts}: {len(written)} forecasts, the last digest is {written[-1]['digest']}; keep it elsewhere, too")
    return EXIT_OK


def _targets(study: Study, runs: Sequence[Run], rows: Sequence[Row], arguments: argparse.Namespace) -> list[Target]:
    """What the options name; without any the cells of the study that have no finished run."""
    for arm in arguments.arm:
        if arm not in study.arms:
            raise UserError(f"--arm {arm}: no arm of the study; one of: {', '.join(study.arms)}")
    arms = arguments.arm or list(study.arms)
    cells: _Cells = {}
    for one in runs:
        cells.setdefault((one.arm, one.size, one.tokens), []).append(one)
    sizes = {one.size: one.parameters for one in runs}
    tokens = _number("--tokens", arguments.tokens)
    if arguments.n_params and arguments.size:
        raise UserError("--n-params and --size both say how large: give one")
    if arguments.size and arguments.size not in sizes:
        raise UserError(f"--size {arguments.size}: no size of the study's grid; one of: {', '.join(sizes)}")
    if arguments.n_params:
        if tokens is None:
            raise UserError("--n-params needs --tokens")
        n_params = round(_number("--n-params", arguments.n_params) or 0)
        return [Target(arm, compact(n_params), n_params, round(tokens), len(study.seeds)) for arm in arms]
    if tokens is not None and arguments.size:
        at = arguments.size, sizes[arguments.size], round(tokens), len(study.seeds)
        return [_target(cells, Target(arm, *at)) for arm in arms]
    if tokens is not None or arguments.size:
        raise UserError("--tokens and --size name a cell together: give both, or none for every cell that has no run")
    found = []
    measured = {row.id for row in rows}
    for (arm, size, count), members in cells.items():
        if arm in arms and (arguments.hindsight or not any(one.id in measured for one in members)):
            found.append(Target(arm, size, members[0].parameters, count, len(members)))
    if not found:
        raise UserError(
            "every cell of the study has finished runs; name a larger one by --size and --tokens, or add --hindsight"
        )
    return found


def _target(cells: _Cells, wanted: Target) -> Target:
    """The cell of the study that is meant, or the one beyond it as it is."""
    for (arm, size, tokens), members in cells.items():
        if (arm, size) == (wanted.arm, wanted.size) and abs(tokens / wanted.tokens - 1) < SAME:
            return replace(wanted, tokens=tokens, runs=len(members))
    return wanted


def _begun(target: Target, runs: Sequence[Run], folder: Folder, rows: Sequence[Row], table: Path | None) -> str:
    """Why it is too late for a forecast; empty where it is not."""
    finished = [row.run for row in rows if target.holds(row)]
    if finished:
        return f"run {finished[0]} is finished"
    if table is not None:
        return ""
    for one in runs:
        if (one.arm, one.size, one.tokens) == (target.arm, target.size, target.tokens) and folder.state(one) != "to do":
            return f"run {one.name} has begun"
    return ""


def _number(option: str, text: str | None) -> float | None:
    value = None if text is None else number(text)
    if text is not None and (value is None or value < 1):
        raise UserError(f"{option} '{text}': expected a number such as 20B")
    return value
