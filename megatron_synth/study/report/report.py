"""`study report`: tables, laws, figures and the page, from the runs that are finished.

report/index.html            the page; everything is inside it
report/runs.csv              one row per run; ratios.csv and metrics.csv in olmix's shape
report/laws/<law>.json       every fit, with the runs it comes from
report/figures/<name>.*      the figures, as .png, .svg and the numbers as .csv
report/generation.json       of a study that makes its own text: loops, costs, corpora
report/findings.txt          the answers in sentences
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_synth import __version__
from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_atomic, write_json
from megatron_synth.core.log import say
from megatron_synth.study.execute.folder import Folder
from megatron_synth.study.plan.runs import Run
from megatron_synth.study.plan.study_file import Study


def write_report(
    study: Study, runs: Sequence[Run], folder: Folder, *, out: Path | None = None, table: Path | None = None
) -> Path:
    """Write the report of a study and return the path of its page.

    Args:
        study: the study.
        runs: all its runs.
        folder: where they are.
        out: folder to write to. Default: report/ in the study's folder.
        table: a runs.csv to take the runs from, instead of the folder.

    Raises:
        UserError: no run is finished, a result is damaged, or the folder cannot be written.
    """
    import scipy.linalg  # noqa: F401  # a limit holds for the libraries that are loaded
    from threadpoolctl import threadpool_limits

    # matrices of a few hundred rows: a second thread mostly waits, and on a busy machine it takes five times as long
    with threadpool_limits(1, user_api="blas"):
        return _write_report(study, runs, folder, out=out, table=table)


def _write_report(study: Study, runs: Sequence[Run], folder: Folder, *, out: Path | None, table: Path | None) -> Path:
    from megatron_synth.study.report.analysis import analyze
    from megatron_synth.study.report.checks import check_study, sentences
    from megatron_synth.study.report.collect import Collected, collect, read_runs_csv, write_tables
    from megatron_synth.study.report.figures.answers import draw_all
    from megatron_synth.study.report.figures.checks import draw_checks
    from megatron_synth.study.report.figures.drawing import looks
    from megatron_synth.study.report.figures.maps import draw_maps
    from megatron_synth.study.report.findings import findings
    from megatron_synth.study.report.generation.analysis import generation_of
    from megatron_synth.study.report.generation.figures import draw_generation
    from megatron_synth.study.report.generation.section import Section, generation_findings
    from megatron_synth.study.report.page import render
    from megatron_synth.train.record.run_dir import git_state

    if table is None:
        collected = collect(study, runs, folder)
    else:
        rows = read_runs_csv(table)
        unknown = sorted({row.arm for row in rows} - set(study.arms))
        if unknown:
            raise UserError(f"{table}: arms {', '.join(unknown)} are not in the study")
        known = {row.id for row in rows}
        collected = Collected(rows, [run for run in runs if run.id not in known])
    say(f"{len(collected.rows)} runs, {len(collected.missing)} missing")
    out = out or folder.report
    try:
        for name in ("laws", "figures"):
            (out / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: the report cannot be written ({error.strerror or error})") from error
    analysis = analyze(study, [row for row in collected.rows if not row.swept], say)
    generation = generation_of(study, runs, collected.rows, folder, analysis.noise)
    say("decisions, forecasts, rates")
    swept = [row for row in collected.rows if row.swept]
    checks = check_study(study, analysis, swept, folder, from_table=table is not None)
    say("figures")
    style = looks(analysis)
    figures = [*draw_all(analysis), *draw_maps(analysis, style), *draw_checks(checks, style)]
    said = [*findings(analysis), *sentences(checks)]
    if generation is not None:
        figures = [*draw_generation(generation, study.baseline_arm, style), *figures]
        write_json(out / "generation.json", generation.to_json())
        said = [*said[:1], *generation_findings(generation, study.costs), *said[1:]]  # behind the noise floor
    write_tables(study, collected.rows, out)
    for fitted in [*analysis.fits, *analysis.domains]:
        write_json(out / "laws" / f"{fitted.name}.json", fitted.to_json())
    for family, choice in analysis.ratio.items():
        used = [row.run for row in analysis.mixture[family].rows]
        write_json(out / "laws" / f"ratio-{family}.json", {"law": "ratio", "of": [family], **choice.to_json(), "runs": used})
    for figure in figures:
        for ending, content in (("png", figure.png), ("svg", figure.file), ("csv", figure.data)):
            write_atomic(out / "figures" / f"{figure.name}.{ending}", content)
    write_atomic(out / "findings.txt", "".join(f"{line}\n" for line in said))
    git = git_state(Path(__file__).parent)
    commit = f", commit {git['commit'][:10]}{' with changes' if git['dirty'] else ''}" if git else ""
    page = out / "index.html"
    made_with = f"megatron-synth {__version__}{commit}"

    def generated(arm: Any, sources: Any) -> Any:
        return "" if generation is None else Section(generation, study.costs, arm, sources).render()

    write_atomic(page, render(analysis, collected, figures, style, made_with, checks, said, generated))
    return page
