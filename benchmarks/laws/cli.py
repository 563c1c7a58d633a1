"""`python -m benchmarks laws`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.laws import intervals, measure, report
from megatron_synth.bench import tables
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.core.files import write_json
from megatron_synth.core.log import say

FILES = {"regmix": "regmix", "repetition": "datablations/datablations_c4_fit.csv", "over-training": "gadre/gadre_104.csv"}
"""Of the parts that need data, in the folder of `--data`."""
SIMULATED = ("designs", "coverage", "intervals", "report")
PARTS = ("regmix", "few", "proposal", "repetition", "over-training", *SIMULATED)


def main(argv: list[str]) -> int:
    """Run the parts, print their tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks laws",
        description="Laws beside published ones on public tables, and designs and intervals on simulated studies.",
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--data", type=Path, metavar="DIR", help=f"folder with {', '.join(FILES.values())}")
    parser.add_argument("--studies", type=int, default=40, metavar="N", help="simulated studies; default %(default)s")
    parser.add_argument("--draws", type=int, default=200, help="of each design of `intervals`; default %(default)s")
    parser.add_argument("--subsets", type=int, default=5, help="draws of 64 of RegMix's mixtures; default %(default)s")
    parser.add_argument("--goals", action="store_true", help="run nothing: hold what --json has against the goals, a line each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add what was measured to this file, by part")
    options = parser.parse_args(argv)
    parts = list(dict.fromkeys(options.parts.split(",")))
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UserError(f"--parts: unknown part '{unknown[0]}'; any of {', '.join(PARTS)} with commas")
    if options.goals:
        if options.json is None or not options.json.is_file():
            raise UserError("--goals: --json names the file with what was measured")
        measured = json.loads(options.json.read_text(encoding="utf-8"))
        say("\n".join(tables.markdown_table(_goals(measured))))
        return EXIT_OK
    if options.data is None and set(parts) - set(SIMULATED):
        raise UserError(f"--data: needed for all parts but {', '.join(SIMULATED)}")
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(f"--json: {options.json.parent} is not a folder")
    shown = ["DIR" if options.data is not None and part == str(options.data) else part for part in argv]
    head = {**tables.header("benchmarks", []), "command": shlex.join(["python", "-m", "benchmarks", "laws", *shown])}
    say("\n".join(tables.header_lines(head)))
    for part in parts:
        file = None
        if part in FILES or part in ("few", "proposal"):
            name = FILES.get(part, FILES["regmix"])
            file = measure.require(options.data, {part: name})[part]
        found = _run(part, file, options)
        if options.json is not None:
            before = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {}
            write_json(options.json, {**before, part: {**head, "found": found}})
    return EXIT_OK


def _goals(measured: dict[str, Any]) -> list[list[str]]:
    """A row per goal: what was asked, what was found, whether it is met, and the commit that it was measured at."""
    rows = [["goal", "found", "met", "commit"]]

    def row(part: str, goal: str, found: str, met: bool) -> None:
        git = measured[part].get("git") or {}
        rows.append([goal, found, "yes" if met else "**no**", str(git.get("commit", ""))[:10]])

    if "regmix" in measured:
        by_law = {score["law"]: score for score in measured["regmix"]["found"]["scores"]}
        best, parametric = by_law["automatic"], by_law["best parametric"]
        met = best["rank"] >= 0.985
        row("regmix", "RegMix at 1M, automatic: mean rank correlation at least 0.985", f"{best['rank']:.4f}", met)
        row("regmix", "the same: error at most 1.3 %", f"{best['error']:.2%}", best["error"] <= 0.013)
        row("regmix", "the same: 90 % intervals cover 85 to 95 %", f"{best['covered']:.1%}", 0.85 <= best["covered"] <= 0.95)
        row("regmix", "the same: under 120 processor seconds", f"{best['seconds']:.0f} s", best["seconds"] < 120)
        row("regmix", "best parametric law: at least 0.97", f"{parametric['rank']:.4f}", parametric["rank"] >= 0.97)
    if "few" in measured:
        few = next(score for score in measured["few"]["found"] if score["law"] == "automatic")
        row("few", "from 64 mixtures: at least 0.92", f"{few['rank']:.4f}", few["rank"] >= 0.92)
    if "proposal" in measured:
        proposal = measured["proposal"]["found"]
        place, of = proposal["rank_of_the_one_nearest_to_the_proposal"], proposal["test_mixtures"]
        row("proposal", "Pile-CC: the proposal among the best 5 %", f"nearest measured is {place} of {of}", place <= 0.05 * of)
    if "repetition" in measured:
        found = measured["repetition"]["found"]
        held = found["published, R_N fitted"]
        at, fitted = found["base as published"]["objective"], found["all parameters"]
        row("repetition", "repetition, base fixed: objective at most 0.015826", f"{at:.6f}", at <= 0.0158265)
        beyond = fitted["error_beyond_20_epochs"]
        told = f"{beyond:.2%}; base as published {held['error_beyond_20_epochs']:.2%}"
        row("repetition", "repetition: error at most 5 % beyond 20 epochs", told, beyond <= 0.05)
        warned = "repetition-ignored" in found["joint"]["warnings"]
        row("repetition", "a warning where epochs vary and the law ignores it", "joint: repetition-ignored", warned)
    if "over-training" in measured:
        furthest = max(one["furthest_from_published"] for one in measured["over-training"]["found"])
        row("over-training", "over-training: within 1 % of the published laws", f"{furthest:.2%}", furthest <= 0.01)
    if "coverage" in measured:
        rates = {int(runs): one["covered"] for runs, one in measured["coverage"]["found"].items()}
        told = ", ".join(f"{runs} runs {rate:.1%}" for runs, rate in sorted(rates.items()))
        row("coverage", "three sources: intervals cover 85 to 95 %", told, all(0.85 <= rate <= 0.95 for rate in rates.values()))
    if "intervals" in measured:
        told_of = [one for one in measured["intervals"]["found"] if one["cluster"] or one["errors"] == "independent"]
        rates = [one[key] for one in told_of for key in ("B", "beta", "E", "far")]
        chance = 2 * float(np.sqrt(0.9 * 0.1 / told_of[0]["draws"]))
        inside = float(np.mean([0.85 - chance <= rate <= 0.95 + chance for rate in rates]))
        told = f"{np.mean(rates):.1%} in the mean, {min(rates):.0%} to {max(rates):.0%}; {inside:.0%} of {len(rates)} within"
        goal = f"few runs, dependent rows among them: 85 to 95 %, give or take {chance:.0%} of chance"
        row("intervals", goal, told, inside == 1)
    if "report" in measured:
        took = measured["report"]["found"]
        told = ", ".join(f"{one['runs']} runs {one['processor_seconds']:.0f} s" for one in took)
        row(
            "report",
            "study report of 150 to 450 runs: under 30 processor seconds",
            told,
            all(one["processor_seconds"] < 30 for one in took),
        )
    if "designs" in measured:
        found = measured["designs"]["found"]
        rates = {name: one["within_one_noise_floor"] for name, one in found.items()}
        proposed = max(rate for name, rate in rates.items() if "proposed" in name)
        grid = next(rate for name, rate in rates.items() if "grid" in name)
        filled = next(rate for name, rate in rates.items() if "space-filling" in name)
        told = f"{proposed:.0%}; the grid {grid:.0%}; as many runs that only fill the space {filled:.0%}"
        row("designs", "proposed mixture within a noise floor of the best, with half a grid's runs", told, proposed >= grid)
    return rows


def _run(part: str, file: Path | None, options: argparse.Namespace) -> Any:
    """Run a part and print its table."""
    if part == "designs":
        found = measure.designs(options.studies, _tell)
        _print(
            f"{options.studies} simulated studies of three sources: true loss of the mixture that is chosen", _designs(found)
        )
        return found
    if part == "coverage":
        covered = measure.coverage(options.studies, tell=_tell)
        _print(f"{options.studies} simulated studies of three sources: 90 % intervals", _coverage(covered))
        return covered
    if part == "intervals":
        covering = intervals.all_designs(options.draws, _tell)
        _print(f"90 % intervals of the law in D, {options.draws} draws of each design", _intervals(covering))
        return covering
    if part == "report":
        took = report.report_times()
        _print("study report on fabricated runs of configs/study/paper.yaml", _report(took))
        return took
    assert file is not None
    if part == "repetition":
        repeated = measure.repetition(file)
        _print(f"repetition: {repeated['runs']} runs, {repeated['beyond_20_epochs']} beyond 20 epochs", _repetition(repeated))
        return repeated
    if part == "over-training":
        trained = measure.over_training(file)
        _print("over-training: fitted to five small runs per corpus, on the runs of 1.4B and 6.9B", _gadre(trained))
        return trained
    data = measure.read_regmix(file)
    if part == "proposal":
        proposal = measure.regmix_proposal(data)
        say("\n" + json.dumps(proposal, indent=2))
        return proposal
    if part == "regmix":
        scores, chosen = measure.regmix_scores(data, tell=_tell)
        title = f"RegMix at 1M: {len(data.train)} mixtures, {len(data.test)} to predict, {len(data.domains)} domains"
        _print(title, _scores(scores))
        return {"scores": [asdict(score) for score in scores], "chosen": chosen}
    draws = [measure.regmix_scores(data, 64, seed, _tell)[0] for seed in range(options.subsets)]
    means = sorted(_means(draws), key=lambda score: score.error)
    _print(f"RegMix at 1M from 64 mixtures, means of {options.subsets} draws", _scores(means))
    return [asdict(score) for score in means]


def _means(draws: Sequence[Sequence[measure.Score]]) -> list[measure.Score]:
    """Means over draws by law."""
    means = []
    for name in [score.law for score in draws[0]]:
        found = [one for draw in draws for one in draw if one.law == name]
        covered = [one.covered for one in found if one.covered is not None]
        rank, error, seconds = (float(np.mean([getattr(one, key) for one in found])) for key in ("rank", "error", "seconds"))
        means.append(measure.Score(name, rank, error, float(np.mean(covered)) if covered else None, seconds))
    return means


def _tell(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r  {text:<60}", end="", file=sys.stderr, flush=True)


def _print(title: str, rows: list[list[str]]) -> None:
    say("\n".join(["", f"{title}", "", *tables.markdown_table(rows)]))


def _scores(scores: Sequence[measure.Score]) -> list[list[str]]:
    rows = [["law", "rank correlation", "error", "covered by 90 %", "processor seconds"]]
    for score in scores:
        covered = "" if score.covered is None else f"{score.covered:.1%}"
        seconds = f"{score.seconds:.1f}" if score.seconds else ""
        rows.append([score.law, f"{score.rank:.4f}", f"{score.error:.2%}", covered, seconds])
    return rows


def _repetition(found: dict[str, Any]) -> list[list[str]]:
    rows = [["law", "R_D", "R_N", "objective", "error", "beyond 20 epochs", "warnings"]]
    for name, one in found.items():
        if isinstance(one, dict):
            params = [f"{one['params'][key]:.4g}" if key in one["params"] else "" for key in ("R_D", "R_N")]
            errors = [f"{one[key]:.2%}" for key in ("error", "error_beyond_20_epochs")]
            rows.append([name, *params, f"{one['objective']:.6f}", *errors, ", ".join(one["warnings"])])
    return rows


def _gadre(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    keys = ("furthest_from_published", "error", "published_error", "error_fitted_to_all_smaller_runs")
    rows = [
        ["corpus", "furthest from the published law", "error", "published law's error", "error, fitted to all smaller runs"]
    ]
    rows += [[one["corpus"], *(f"{one[key]:.2%}" for key in keys)] for one in found]
    return rows


def _designs(found: dict[str, Any]) -> list[list[str]]:
    rows = [["runs", f"within one noise floor ({measure.NOISE:.1%}) of the lowest", "mean excess"]]
    rows += [[name, f"{one['within_one_noise_floor']:.0%}", f"{one['mean_excess']:.3%}"] for name, one in found.items()]
    return rows


def _coverage(found: dict[int, dict[str, float]]) -> list[list[str]]:
    rows = [["runs", "new runs covered", "lowest of a study", "error of the law"]]
    rows += [[str(runs), f"{one['covered']:.1%}", f"{one['lowest']:.1%}", f"{one['error']:.2%}"] for runs, one in found.items()]
    return rows


def _intervals(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row per kind of errors and size of the design: the lowest and the highest rate over the noises."""
    rows = [["errors", "`--cluster`", "budgets", "seeds", "noise", "B", "beta", "E", "loss at 10 times the largest D"]]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in found:
        groups.setdefault(tuple(one[key] for key in ("errors", "cluster", "budgets", "seeds")), []).append(one)
    for (errors, cluster, budgets, seeds), each in groups.items():
        noises = [one["noise"] for one in each]
        told = f"{min(noises):.2%}" if len(noises) == 1 else f"{min(noises):.2%} to {max(noises):.2%}"
        cells = [_span([one[key] for one in each]) for key in ("B", "beta", "E", "far")]
        rows.append([errors, cluster or "", str(budgets), str(seeds), told, *cells])
    return rows


def _span(rates: Sequence[float]) -> str:
    low, high = min(rates), max(rates)
    return f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"


def _report(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [["runs", "laws", "wall seconds", "processor seconds", "page, kB", "digest of findings and laws"]]
    for one in found:
        numbers = (f"{one[key]:.1f}" for key in ("seconds", "processor_seconds"))
        rows.append([str(one["runs"]), str(one["laws"]), *numbers, f"{one['page_kb']:.0f}", one["digest"]])
    return rows
