"""How long `study report` takes, on fabricated runs of a large study, and a digest of what it says.

The study is that of configs/study/paper.yaml: ten arms, eight sizes, eight budgets, nine domains; one seed is 150 runs, three
are 450. Losses are made by a law in N, D and the share of each kind, with 0.3 % of scatter between seeds.
"""

from __future__ import annotations

import hashlib
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.study.execute.folder import Folder
from megatron_synth.study.plan.runs import Run, expand
from megatron_synth.study.plan.study_file import Study, load_study
from megatron_synth.study.report.collect import Row, runs_csv
from megatron_synth.study.report.report import write_report

STUDY = Path("configs/study/paper.yaml")
NOISE = 0.003
_BEST = {"hq": 0.3, "qa": 0.45, "txbk": 0.2}


def fabricated(study: Study, runs: list[Run], seed: int = 0) -> list[Row]:
    """Finished runs with losses of a known law, a factor of its own for each domain."""
    random = np.random.default_rng(seed)
    rows = []
    for run in runs:
        share, size, tokens = float(study.share(run.arm)), float(run.parameters), float(run.tokens)
        best = _BEST.get(study.family(run.arm), 0.0)
        floor = 1.8 + 0.25 * ((share - best) ** 2 - best**2)
        clean = floor + 480 * np.exp(-0.05 * share) / size**0.35 + 2085 * np.exp(-0.3 * share) / tokens**0.37
        domains = {
            name: float(clean * (1 + 0.04 * place) * np.exp(NOISE * random.standard_normal()))
            for place, name in enumerate(study.validation)
        }
        others = {f"bpb/{name}": loss / 3 for name, loss in domains.items()}
        for name, part in study.arms[run.arm].items():
            others[f"tokens/{name}"] = float(part.ratio) * tokens
            others[f"epochs/{name}"] = float(part.ratio) * tokens / 210e9
        loss = float(np.mean(list(domains.values())))
        rows.append(
            Row(
                run=run.name,
                id=run.id,
                arm=run.arm,
                family=study.family(run.arm),
                share=str(study.share(run.arm)),
                ratio=share,
                size=run.size,
                n_params=run.parameters,
                budget=run.budget,
                tokens=run.tokens,
                seed=run.seed,
                steps=run.config.train.steps,
                flops=6.0 * size * tokens,
                loss=loss,
                train_loss=loss,
                train_seconds=1.0,
                device="none",
                domains=domains,
                others=others,
            )
        )
    return rows


def report_times(seeds: tuple[int, ...] = (1, 3)) -> list[dict[str, Any]]:
    """Wall and processor seconds of the report of the study with so many seeds, and a digest of its findings and laws."""
    found = []
    for count in seeds:
        study = load_study(STUDY, [f"seeds={list(range(1, count + 1))}"])
        runs = expand(study)
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder, "runs.csv")
            table.write_text(runs_csv(fabricated(study, runs)), encoding="utf-8")
            wall, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
            page = write_report(study, runs, Folder(Path(folder, "study")), table=table)
            after = resource.getrusage(resource.RUSAGE_SELF)
            found.append(
                {
                    "runs": len(runs),
                    "laws": len(list((page.parent / "laws").glob("*.json"))),
                    "seconds": time.monotonic() - wall,
                    "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
                    "page_kb": page.stat().st_size / 1e3,
                    "digest": _digest(page.parent),
                }
            )
    return found


def _digest(out: Path) -> str:
    """Of the findings and of the parameters and intervals of all laws, to nine digits."""
    told = [(out / "findings.txt").read_text(encoding="utf-8")]
    for file in sorted((out / "laws").glob("*.json")):
        told.append(json.dumps(_rounded(json.loads(file.read_text(encoding="utf-8"))), sort_keys=True))
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value
