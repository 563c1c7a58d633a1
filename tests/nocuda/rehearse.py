"""`make gpu-rehearsal`: steps of every configuration in CASES on the device that computes nothing, held against limits.

    python -m tests.nocuda.rehearse [--only TEXT] [--out FOLDER]

Writes a record and a JSON for each case, and `table.md`. Exit code 1 if a case asks for what it should not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_synth.train.record.run_dir import device_name
from tests.nocuda.build import build, environment
from tests.nocuda.record import PARTS

ROOT = Path(__file__).resolve().parents[2]
WAIT = "stream at train/step.py"
"""Where the one wait of a step is: its gradient norm decides whether it is taken."""
_SMALL, _LARGE, _LARGEST = "bench/h200.yaml", "bench/h200-3b.yaml", "bench/h200-8b.yaml"


@dataclass(frozen=True)
class Case:
    """One configuration, and what its step may ask for."""

    name: str
    arguments: tuple[str, ...]
    launches: int
    """At most; measured, and rounded up to hundreds."""
    one_block: int = 200
    """torch kernels of one block, at most."""
    near: float = 0.03
    """How far the allocator's peak may be from the memory model's, of the latter."""


def _fp8(recipe: str, number_format: str = "hybrid") -> tuple[str, ...]:
    return f"precision.fp8={recipe}", f"precision.fp8_format={number_format}", "precision.fp8_backend=own"


_PARALLEL = (
    *("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2", "train.global_batch_size=32"),
    *("--world", "8"),
)
_OF_512 = (
    *("parallel.tensor_model_parallel_size=8", "parallel.pipeline_model_parallel_size=4", "train.global_batch_size=256"),
    *("--world", "512"),
)
_INTERLEAVED = ("parallel.virtual_pipeline_model_parallel_size=2",)
CASES = (
    Case("1.3B BF16", (_SMALL,), 4000),
    # two of a layer's three more one-block kernels are torch's own: it zeroes a random state that nobody draws from
    Case("1.3B BF16, documents of 512", (_SMALL, "--documents", "512"), 5500, one_block=600),
    Case("1.3B FP8 current", (_SMALL, *_fp8("current")), 8000),
    Case("1.3B FP8 delayed", (_SMALL, *_fp8("delayed")), 6800),
    Case("1.3B FP8 blockwise", (_SMALL, *_fp8("blockwise", "e4m3")), 6800),
    Case("3B BF16", (_LARGE,), 5300),
    Case("3B BF16, documents of 512", (_LARGE, "--documents", "512"), 7100, one_block=700),
    Case("3B FP8 current", (_LARGE, *_fp8("current")), 10000),
    Case("1.3B BF16, TP2 x PP2 x DP2, first rank", (_SMALL, *_PARALLEL, "--rank", "0"), 2000),
    Case("1.3B BF16, TP2 x PP2 x DP2, last rank", (_SMALL, *_PARALLEL, "--rank", "7"), 2000),
    Case("1.3B FP8 current, TP2 x PP2 x DP2, first rank", (_SMALL, *_fp8("current"), *_PARALLEL, "--rank", "0"), 4200),
    Case("8B BF16, TP8 x PP4 x DP16, first rank", (_LARGEST, *_OF_512, "--rank", "0"), 1600),
    Case("8B BF16, TP8 x PP4 x DP16, last rank", (_LARGEST, *_OF_512, "--rank", "511"), 1700),
    Case("8B BF16, interleaved, first rank", (_LARGEST, *_OF_512, *_INTERLEAVED, "--rank", "0"), 1600),
    Case("8B BF16, interleaved, last rank", (_LARGEST, *_OF_512, *_INTERLEAVED, "--rank", "511"), 1700),
    Case("8B FP8 current, TP8 x PP4 x DP16, first rank", (_LARGEST, *_fp8("current"), *_OF_512, "--rank", "0"), 3100),
    Case(
        "8B FP8 blockwise, interleaved, last rank",
        (_LARGEST, *_fp8("blockwise", "e4m3"), *_OF_512, *_INTERLEAVED, "--rank", "511"),
        2500,
    ),
)


def problems(case: Case, found: dict[str, Any]) -> list[str]:
    """What a step asks of the device and should not; empty if it is as it should be."""
    told = []
    for kind in ("faults", "pageable", "unknown"):
        told += [f"{kind}: {one}" for one in dict.fromkeys(found[kind])]
    waits = found["waits"]
    told += [f"an unforeseen wait: {wait}" for wait in waits if not wait.startswith(WAIT)]
    if len(waits) != 1:
        told.append(f"{len(waits)} waits in a step, expected 1")
    for kind, most in (("launches", case.launches), ("one_block", case.one_block)):
        if found[kind] > most:
            told.append(f"{kind}: {found[kind]:,}, expected {most:,} at most")
    if abs(found["peak_bytes"] / found["modeled_bytes"] - 1) > case.near:
        told.append(f"peak of {found['peak_bytes'] / 1e9:.2f} GB, the memory model has {found['modeled_bytes'] / 1e9:.2f}")
    return told


def run(case: Case, library: Path, out: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """A case in a process of its own: what it found, and what is wrong."""
    name = "".join(letter if letter.isalnum() else "-" for letter in case.name.lower())
    file = out / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "tests.nocuda.step",
        *case.arguments,
        "--record",
        str(out / f"{name}.tsv"),
        "--json",
        str(file),
    ]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(command, env={**environment(library), "PYTHONPATH": paths}, capture_output=True, text=True, cwd=ROOT)
    if done.returncode or not file.exists():
        return None, [f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['nothing was printed'])[-1]}"]
    found = json.loads(file.read_text())
    return found, problems(case, found)


def row(case: Case, found: dict[str, Any]) -> str:
    """A case's line of the table."""
    cells = [
        *(f"{found[key]:,}" for key in ("launches", "one_block", "products")),
        f"{1000 * found['host_s']:,.0f}",
        f"{1000 * found['host_s'] / found['micro_batches']:.0f}",
        *(str(len(found[key])) for key in ("waits", "pageable")),
        *(f"{found[key] / 1e9:.2f}" for key in ("peak_bytes", "modeled_bytes")),
        f"{100 * (found['peak_bytes'] / found['modeled_bytes'] - 1):+.1f} %",
    ]
    return f"| {case.name} | " + " | ".join(cells) + " |"


HEAD = [
    "| configuration | launches | of one block | products | host, ms | of a micro-batch | waits | pageable copies | peak, GB | "
    "model, GB | |",
    "| --- |" + " ---: |" * 10,
]


def parts_row(case: Case, found: dict[str, Any]) -> str:
    """Whose code the host runs in a case's step."""
    return f"| {case.name} | " + " | ".join(f"{100 * share:.0f} %" for share in found["host_parts"].values()) + " |"


PARTS_HEAD = ["| the host runs | " + " | ".join([*PARTS, "other"]) + " |", "| --- |" + " ---: |" * (len(PARTS) + 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose names hold TEXT")
    parser.add_argument("--out", type=Path, default=ROOT / "build/rehearsal-out")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    library = build(ROOT / "build/nocuda")
    lines, parts, tried, failed = list(HEAD), list(PARTS_HEAD), 0, 0
    for case in CASES:
        if options.only not in case.name:
            continue
        tried += 1
        found, wrong = run(case, library, options.out)
        print(f"{'failed' if wrong else 'passed'}: {case.name}", *wrong, sep="\n  ", flush=True)
        failed += bool(wrong)
        if found is not None:
            lines.append(row(case, found))
            parts.append(parts_row(case, found))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    used = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "megatron-core"))
    lines += [
        "",
        *parts,
        "",
        f"`make gpu-rehearsal`, commit {commit}, {datetime.now(UTC):%Y-%m-%d}, {used}, on {device_name()}.",
    ]
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), f"{tried - failed} passed, {failed} failed", sep="\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
