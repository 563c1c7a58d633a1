"""`megatron-synth bench gpu`: everything that one GPU has to show, in one command and within eight minutes.

Every part runs in processes of its own, within a budget of its own, and the file is written after each: a part that crashes or
hangs loses only itself. `--smoke` runs the same parts with tiny models on whatever there is, a CPU included.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_json
from megatron_synth.core.log import say

SMOKE_PATIENCE = 6
"""A smoke run may stand on a busy CPU: its budgets are there to end what hangs."""
LEVERS = (
    "Triton kernels",
    "torch.compile",
    "fused loss",
    "recomputation",
    "addition and norm in one",
    "read-ahead",
    "garbage collection between steps",
)
"""Those that one GPU has, the most wanted first."""


@dataclass(frozen=True)
class Part:
    """One command of the script."""

    name: str
    command: tuple[str, ...]
    """Arguments of Python; `{json}` stands for the file to write, `{data}` for prepared random tokens."""
    budget_s: float
    skipped: str = ""
    """Why it cannot run here; empty when it can."""


def measure(selected: Sequence[Part], smoke: bool, file: Path, command: Sequence[str]) -> bool:
    """Run parts and write `file` after each; whether none failed.

    Args:
        selected: of `parts`.
        smoke: whether they are those of a smoke run.
        file: JSON to write.
        command: how this was called, for the head of the table.

    Raises:
        UserError: there is no GPU, and this is no smoke run.
    """
    if not smoke and _gpus() == 0:
        raise UserError("no GPU is visible; `bench gpu --smoke` runs the same on a CPU with tiny models")

    from megatron_synth.bench.tables import header, header_lines

    document: dict[str, Any] = {**header("bench", ["gpu", *command]), "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        data = random_source(Path(folder) / "data", 400_000 if smoke else 40_000_000)
        for part in selected:
            document["parts"][part.name] = _run(part, Path(folder), data, part.budget_s * (SMOKE_PATIENCE if smoke else 1))
            write_json(file, document)
    say("\n" + "\n".join([*header_lines(document), "", *_table(document)]))
    say(f"\nwritten to {file}; `megatron-synth bench report {file}` draws and compares")
    return not any(part["status"] in ("failed", "over its budget") for part in document["parts"].values())


def parts(smoke: bool) -> list[Part]:
    """All parts, the most wanted first within each kind. Budgets sum to eight minutes."""
    # a file for each model: its vocabulary belongs to the row
    files = {"llama-1.3b": "bench/h200.yaml", "llama-3b": "bench/h200-3b.yaml"}
    if smoke:
        files = dict.fromkeys(("tiny-1m", "tiny-4m"), "bench/tiny-7m.yaml")
    sizes = tuple(files)
    small = ("train.sequence_length=32", "model.vocab_size=256", "--warmup", "1", "--pairs", "1", "--steps", "2")
    counts = small if smoke else ("--warmup", "4", "--pairs", "3", "--steps", "4")
    found = []

    def train(name: str, model: str, *more: str, budget_s: float, skipped: str = "") -> None:
        command = ("-m", "megatron_synth", "bench", "train", files[model], "--model", model, *counts, *more)
        found.append(Part(name, (*command, "--vs", "none", "--json", "{json}"), budget_s, skipped))

    found.append(_tests(smoke))
    for model in sizes:
        train(f"{model} bf16", model, "precision.dtype=bf16", "--profile", budget_s=40)
    for model in sizes:
        for backend in ("te", "own"):
            settings, skipped = fp8_settings(backend, smoke)
            train(f"{model} fp8 {backend}", model, *settings, "--profile", budget_s=40, skipped=skipped)
    real = ("data.sources.random.path={data}", "data.sources.random.max_epochs=.inf", "--data", "real")
    train(f"{sizes[0]} bf16, real loader", sizes[0], "precision.dtype=bf16", *real, budget_s=40)
    # a lever takes the time of a start beside that of its steps, so those are few; all that end within the budget are turned
    few = () if smoke else ("train.global_batch_size=4", "--warmup", "2", "--pairs", "3", "--steps", "3")
    # a CPU compiles longer than all the rest takes
    names = [name for name in LEVERS if not (smoke and name == "torch.compile")]
    levers = ("--ablations", ",".join(names), "--budget", "65", *few)
    train(f"{sizes[0]} bf16, levers", sizes[0], "precision.dtype=bf16", *real, *levers, budget_s=80)
    found.append(_kernels(smoke))
    return found


def fp8_settings(backend: str, smoke: bool) -> tuple[list[str], str]:
    """Overrides for FP8 by one of its two paths, and why it cannot run here, if so."""
    import importlib.util

    from megatron_synth.config.schema import PrecisionConfig

    fields = PrecisionConfig.model_fields
    if "fp8" not in fields or "fp8_backend" not in fields:
        return [], "this version has no precision.fp8"
    if backend == "te" and importlib.util.find_spec("transformer_engine") is None:
        return [], "TransformerEngine is not installed"
    more = ["model.vocab_size=256"] if smoke else []
    return ["precision.dtype=bf16", "precision.fp8=current", f"precision.fp8_backend={backend}", *more], ""


def _tests(smoke: bool) -> Part:
    """The gpu-marked tests of the clone, or, on a smoke run, one quick file of tests in the same way."""
    folder = Path(__file__).resolve().parents[2] / "tests"
    chosen = (str(folder / "unit" / "data" / "test_permutation.py"),) if smoke else ("-m", "gpu", str(folder))
    command = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen)
    return Part("numerics tests", command, 70, "" if folder.is_dir() else "no tests beside the package: run it from a clone")


def _kernels(smoke: bool) -> Part:
    command = ("-m", "megatron_synth", "bench", "kernels", "--vs", "eager", "--json", "{json}")
    return Part("kernels", (*command, "--smoke") if smoke else command, 50)


def _run(part: Part, folder: Path, data: Path, budget_s: float) -> dict[str, Any]:
    if part.skipped:
        say(f"{part.name}: skipped, {part.skipped}")
        return {"status": "skipped", "why": part.skipped}
    file = folder / "part.json"
    file.unlink(missing_ok=True)
    command = [argument.replace("{json}", str(file)).replace("{data}", str(data)) for argument in part.command]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    began = time.perf_counter()
    log = folder / "part.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = "done" if process.wait(budget_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = "over its budget"
    took = time.perf_counter() - began
    say(f"{part.name}: {status} in {took:.1f} s")
    printed = log.read_text(errors="replace")
    return {
        "status": status,
        "took_s": took,
        "budget_s": budget_s,
        "result": json.loads(file.read_text()) if file.exists() else None,
        "printed": "" if status == "done" and file.exists() else printed[-4000:],
    }


def random_source(prefix: Path, tokens: int) -> Path:
    """A shard of random tokens below 256 with documents of 1,000, for the real loader."""
    import numpy as np

    from megatron_synth.data.shards.indexed import ShardWriter

    generator = np.random.default_rng(0)
    writer = ShardWriter(prefix, np.dtype(np.uint16))
    for _ in range(tokens // 400_000):
        writer.add(generator.integers(0, 256, 400_000).astype(np.uint16), np.full(400, 1000))
    writer.finish()
    return prefix


def _gpus() -> int:
    code = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def _table(document: dict[str, Any]) -> Sequence[str]:
    from megatron_synth.bench.tables import markdown_table
    from megatron_synth.estimate.hardware import show_mfu

    rows = [["part", "status", "s", "tokens/s", "MFU", "ms/step", "largest shares of the time, or what levers do to a step's"]]
    for name, part in document["parts"].items():
        cells = [name, part.get("why") or part["status"], f"{part.get('took_s', 0):.0f}", "", "", "", ""]
        result = part.get("result")
        if result and "rows" in result and "layout" in result:
            row = result["rows"][0]
            steps = sorted(second for block in row["step_s"] for second in block)
            shares = sorted((result.get("shares") or {}).items(), key=lambda item: -item[1])[:4]
            cells[3:] = [
                f"{row['tokens_per_s_per_rank']:,.0f}",
                show_mfu(row["mfu"]),
                f"{1000 * steps[len(steps) // 2]:.1f}",
                ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in shares),
            ]
        elif result and "levers" in result:
            ratios = [(one["turned_to"], one["step_time_ratios"]) for one in result["levers"] if one["status"] == "measured"]
            cells[6] = ", ".join(f"{turned} x{statistics.median(found):.2f}" for turned, found in ratios)
        rows.append(cells)
    return markdown_table(rows)
