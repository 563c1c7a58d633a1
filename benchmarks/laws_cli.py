"""`python -m benchmarks laws`."""

from __future__ import annotations

import argparse
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

FILES = {"regmix": "regmix", "repetition": "datablations/datablations_c4_fit.csv", "gadre": "gadre/gadre_104.csv"}


def main(argv: list[str]) -> int:
    """Fit the laws, print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks laws",
        description="Laws beside published ones on public tables, and designs and intervals on simulated studies.",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help=f"folder with {', '.join(FILES.values())}")
    parser.add_argument("--simulate", type=int, default=0, metavar="N", help="simulated studies of three sources; default none")
    parser.add_argument("--subsets", type=int, default=5, help="draws of 64 of RegMix's mixtures; default %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    options = parser.parse_args(argv)
    if options.data is None and not options.simulate:
        raise UserError("give --data DIR, --simulate N, or both")
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(f"--json: {options.json.parent} is not a folder")
    shown = ["DIR" if options.data is not None and part == str(options.data) else part for part in argv]
    head = {**tables.header("benchmarks", []), "command": shlex.join(["python", "-m", "benchmarks", "laws", *shown])}
    say("\n".join(tables.header_lines(head)))
    result: dict[str, Any] = {}
    if options.data is not None:
        files = laws.require(options.data, FILES)
        result |= _public(files, options.subsets)
    if options.simulate:
        result["designs"] = laws.designs(options.simulate, _tell)
        result["coverage"] = laws.coverage(options.simulate, tell=_tell)
        _print("simulated studies of three sources: true loss of the mixture that is chosen", _designs(result["designs"]))
        _print("simulated studies of three sources: 90 % intervals", _coverage(result["coverage"]))
    if options.json is not None:
        write_json(options.json, {**head, **result})
    return EXIT_OK


def _public(files: dict[str, Path], subsets: int) -> dict[str, Any]:
    data = laws.read_regmix(files["regmix"])
    scores, chosen = laws.regmix_scores(data, tell=_tell)
    _print(
        f"RegMix at 1M: {len(data.train)} mixtures, {len(data.test)} to predict, {len(data.domains)} domains", _scores(scores)
    )
    few = [laws.regmix_scores(data, 64, seed, _tell)[0] for seed in range(subsets)]
    by_law = {score.law: [one for draw in few for one in draw if one.law == score.law] for score in few[0]}
    means = [
        laws.Score(
            name,
            *(float(np.mean([getattr(one, key) for one in found])) for key in ("rank", "error")),
            None if found[0].covered is None else float(np.mean([one.covered for one in found])),
            float(np.mean([one.seconds for one in found])),
        )
        for name, found in by_law.items()
    ]
    _print(f"the same from 64 mixtures, means of {subsets} draws", _scores(sorted(means, key=lambda score: score.error)))
    proposal = laws.regmix_proposal(data)
    say(f"\n{proposal}")
    repeated = laws.repetition(files["repetition"])
    _print(f"repetition: {repeated['runs']} runs, {repeated['beyond_20_epochs']} beyond 20 epochs", _repetition(repeated))
    trained = laws.over_training(files["gadre"])
    _print("over-training: fitted to five small runs per corpus, on the runs of 1.4B and 6.9B", _gadre(trained))
    return {
        "regmix": [asdict(score) for score in scores],
        "chosen": chosen,
        "regmix_64": [asdict(score) for score in means],
        "proposal": proposal,
        "repetition": repeated,
        "over_training": trained,
    }


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
