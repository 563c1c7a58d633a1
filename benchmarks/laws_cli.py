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

from benchmarks import laws
from megatron_synth.bench import tables
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.core.files import write_json
from megatron_synth.core.log import say

FILES = {"regmix": "regmix", "repetition": "datablations/datablations_c4_fit.csv", "over-training": "gadre/gadre_104.csv"}
"""Of the parts that need data, in the folder of `--data`."""
PARTS = ("regmix", "few", "proposal", "repetition", "over-training", "designs", "coverage")


def main(argv: list[str]) -> int:
    """Run the parts, print their tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks laws",
        description="Laws beside published ones on public tables, and designs and intervals on simulated studies.",
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--data", type=Path, metavar="DIR", help=f"folder with {', '.join(FILES.values())}")
    parser.add_argument("--studies", type=int, default=40, metavar="N", help="simulated studies; default %(default)s")
    parser.add_argument("--subsets", type=int, default=5, help="draws of 64 of RegMix's mixtures; default %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add what was measured to this file, by part")
    options = parser.parse_args(argv)
    parts = list(dict.fromkeys(options.parts.split(",")))
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UserError(f"--parts: unknown part '{unknown[0]}'; any of {', '.join(PARTS)} with commas")
    if options.data is None and set(parts) - {"designs", "coverage"}:
        raise UserError("--data: needed for all parts but designs and coverage")
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(f"--json: {options.json.parent} is not a folder")
    shown = ["DIR" if options.data is not None and part == str(options.data) else part for part in argv]
    head = {**tables.header("benchmarks", []), "command": shlex.join(["python", "-m", "benchmarks", "laws", *shown])}
    say("\n".join(tables.header_lines(head)))
    for part in parts:
        file = None
        if part in FILES or part in ("few", "proposal"):
            name = FILES.get(part, FILES["regmix"])
            file = laws.require(options.data, {part: name})[part]
        found = _run(part, file, options)
        if options.json is not None:
            before = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {}
            write_json(options.json, {**before, part: {**head, "found": found}})
    return EXIT_OK


def _run(part: str, file: Path | None, options: argparse.Namespace) -> Any:
    """Run a part and print its table."""
    if part == "designs":
        found = laws.designs(options.studies, _tell)
        _print(
            f"{options.studies} simulated studies of three sources: true loss of the mixture that is chosen", _designs(found)
        )
        return found
    if part == "coverage":
        covered = laws.coverage(options.studies, tell=_tell)
        _print(f"{options.studies} simulated studies of three sources: 90 % intervals", _coverage(covered))
        return covered
    assert file is not None
    if part == "repetition":
        repeated = laws.repetition(file)
        _print(f"repetition: {repeated['runs']} runs, {repeated['beyond_20_epochs']} beyond 20 epochs", _repetition(repeated))
        return repeated
    if part == "over-training":
        trained = laws.over_training(file)
        _print("over-training: fitted to five small runs per corpus, on the runs of 1.4B and 6.9B", _gadre(trained))
        return trained
    data = laws.read_regmix(file)
    if part == "proposal":
        proposal = laws.regmix_proposal(data)
        say("\n" + json.dumps(proposal, indent=2))
        return proposal
    if part == "regmix":
        scores, chosen = laws.regmix_scores(data, tell=_tell)
        title = f"RegMix at 1M: {len(data.train)} mixtures, {len(data.test)} to predict, {len(data.domains)} domains"
        _print(title, _scores(scores))
        return {"scores": [asdict(score) for score in scores], "chosen": chosen}
    draws = [laws.regmix_scores(data, 64, seed, _tell)[0] for seed in range(options.subsets)]
    means = sorted(_means(draws), key=lambda score: score.error)
    _print(f"RegMix at 1M from 64 mixtures, means of {options.subsets} draws", _scores(means))
    return [asdict(score) for score in means]


def _means(draws: Sequence[Sequence[laws.Score]]) -> list[laws.Score]:
    """Means over draws by law."""
    means = []
    for name in [score.law for score in draws[0]]:
        found = [one for draw in draws for one in draw if one.law == name]
        covered = [one.covered for one in found if one.covered is not None]
        rank, error, seconds = (float(np.mean([getattr(one, key) for one in found])) for key in ("rank", "error", "seconds"))
        means.append(laws.Score(name, rank, error, float(np.mean(covered)) if covered else None, seconds))
    return means


def _tell(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r  {text:<60}", end="", file=sys.stderr, flush=True)


def _print(title: str, rows: list[list[str]]) -> None:
    say("\n".join(["", f"{title}", "", *tables.markdown_table(rows)]))


def _scores(scores: Sequence[laws.Score]) -> list[list[str]]:
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
    rows = [["runs", f"within one noise floor ({laws.NOISE:.1%}) of the lowest", "mean excess"]]
    rows += [[name, f"{one['within_one_noise_floor']:.0%}", f"{one['mean_excess']:.3%}"] for name, one in found.items()]
    return rows


def _coverage(found: dict[int, dict[str, float]]) -> list[list[str]]:
    rows = [["runs", "new runs covered", "lowest of a study", "error of the law"]]
    rows += [[str(runs), f"{one['covered']:.1%}", f"{one['lowest']:.1%}", f"{one['error']:.2%}"] for runs, one in found.items()]
    return rows
