"""`megatron-synth bench gpu`: everything that one GPU has to show, in one command and within ten minutes.

Every part runs in processes of its own, within a budget of its own, and the file is written after each: a part that crashes or
hangs loses only itself. Cheap parts that tell most come first. A command that was cut off, by SIGKILL too, goes on where it
was, part by part; a part that was cut off keeps the blocks of steps that it had measured until it runs again. What is being
measured is in a folder beside the file, `FILE.running`. `--smoke` runs the same parts with tiny models on whatever there is, a
CPU included.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_json
from megatron_synth.core.log import say
from megatron_synth.core.processes import end_with_parent

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


ADVICE: tuple[tuple[str, str], ...] = (
    (r"out of memory|OutOfMemory", "train.micro_batch_size=1, then train.recompute=selective, then train.recompute=full"),
    (r"CompilationError|ptxas|OutOfResources", "`megatron-synth kernels` names the kernels; kernels.NAME=torch leaves one out"),
    (r"cannot be had", "the message says which recipes work here: precision.fp8 and precision.fp8_format"),
    (r"not finite", "the same with kernels.NAME=torch, one after the other, then precision.fp8=off: who makes the NaN?"),
    (r"cuBLAS|CUBLAS|cublas", "CUBLAS_WORKSPACE_CONFIG unset; the same with precision.fp8=off; a newer nvidia-cublas"),
    (r"No module named|is not installed", "the package is missing from this environment: `megatron-synth kernels` lists them"),
)
"""What to try when a part fails, by what it printed; the first that is found."""


def measure(
    selected: Sequence[Part], smoke: bool, file: Path, command: Sequence[str], *, again: bool = False, patience: int = 1
) -> bool:
    """Run parts and write `file` after each; whether none failed.

    Args:
        selected: of `parts`.
        smoke: whether they are those of a smoke run.
        file: JSON to write. Parts that it has, done, by the same commit on the same device, are not run again.
        command: how this was called, for the head of the table.
        again: leave out nothing, and what `file` holds.
        patience: by which budgets are multiplied, on a machine that others keep busy.

    Raises:
        UserError: there is no GPU, and this is no smoke run; or `file` is of another commit or device.
    """
    if not smoke and not memory_of_gpus():
        raise UserError("no GPU is visible; `bench gpu --smoke` runs the same on a CPU with tiny models")

    from megatron_synth.bench.tables import header, header_lines

    document: dict[str, Any] = {**header("bench", ["gpu", *command]), "parts": {}}
    if not again:
        document["parts"] = _parts_before(file, document)
    folder = file.with_name(file.name + ".running")
    folder.mkdir(exist_ok=True)
    if (interrupted := _interrupted(folder)) and not again:
        document["parts"] = interrupted | document["parts"]
        write_json(file, document)
    data: Path | None = None
    for part in selected:
        before = document["parts"].get(part.name)
        if before is not None and before["status"] in ("done", "skipped") and before.get("command") == list(part.command):
            say(f"{part.name}: {before['status']} before")
            continue
        if data is None and any("{data}" in argument for argument in part.command):
            data = random_source(folder / "data", 400_000 if smoke else 40_000_000)
        found = _run(part, folder, data, part.budget_s * patience * (SMOKE_PATIENCE if smoke else 1))
        document["parts"][part.name] = {"command": list(part.command), **found}
        write_json(file, document)
        (folder / _RUNNING).unlink(missing_ok=True)
    shutil.rmtree(folder)
    say("\n" + "\n".join([*header_lines(document), "", *_table(document)]))
    say(f"\nwritten to {file}; `megatron-synth bench report {file}` draws and compares")
    return not any(part["status"] in ("failed", "over its budget") for part in document["parts"].values())


def _parts_before(file: Path, document: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call has left in `file`."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
        parts: dict[str, Any] = found["parts"]
        same = [key for key in ("git", "device", "versions") if found[key] != document[key]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: expected what `bench gpu` wrote, found {error!r}; name another file, or --again") from None
    if same:
        raise UserError(f"{file} is of another {same[0]}; name another file with --json, or write it anew with --again")
    return parts


def _interrupted(folder: Path) -> dict[str, Any]:
    """The part that an earlier call was killed in, with what it had measured; its processes, if any are left, are ended.

    They would hold the GPU's memory and time while others are measured.
    """
    try:
        told = json.loads((folder / _RUNNING).read_text())
        name, command, mark = str(told["part"]), list(told["command"]), str(told["mark"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == mark:
                process.kill()
                process.wait(10)
    (folder / _RUNNING).unlink()
    try:
        result = json.loads((folder / "part.json").read_text())
    except (OSError, ValueError):
        return {}
    return {name: {"command": command, "status": "cut off", "took_s": 0.0, "result": result}}


_RUNNING = "running.json"
"""What is being measured: name and command of the part, and the mark of its processes."""
_MARK = "MEGATRON_SYNTH_BENCH_PART"
"""Variable of the environment by which the processes of a part are known, their children too."""


def fitting(file: str, overrides: Sequence[str], memory: int, engines: int = 1) -> tuple[list[str], str]:
    """The largest micro-batch that a GPU has room for, as an override, and why there is none, if so.

    Args:
        file: a configuration.
        overrides: of it.
        memory: bytes of the GPU; 0: unknown, and nothing is changed.
        engines: models with their optimizers that are there at a time.
    """
    from megatron_synth.config.load import load_file
    from megatron_synth.config.schema import Config
    from megatron_synth.estimate.memory import memory_per_rank

    if not memory:
        return [], ""
    for settings in (["train.micro_batch_size=2"], ["train.micro_batch_size=1"], ["train.micro_batch_size=1", _RECOMPUTE]):
        config = load_file(Config, file, [*overrides, *settings])
        estimate = memory_per_rank(config, 1, config.model.vocab_size)[0]
        # what the engines hold all the time, and the passes of the one that runs
        if engines * estimate.static + (estimate.total - estimate.static) <= _ROOM * memory - _CONTEXT:
            return settings, ""
    return [], f"needs {estimate.total / 1e9:.0f} GB, the GPU has {memory / 1e9:.0f}"


_RECOMPUTE = "train.recompute=full"
_ROOM, _CONTEXT = 0.95, 10**9  # share that fragmentation leaves; CUDA's context and libraries, bytes


def parts(smoke: bool, memory: int = 0) -> list[Part]:
    """All parts, cheap and telling ones first. Budgets sum to less than ten minutes.

    Args:
        smoke: tiny models.
        memory: bytes of the GPU, for which micro-batches are chosen; 0: as the configurations have them.
    """
    # a file for each model: its vocabulary belongs to the row
    files = {"llama-1.3b": "bench/h200.yaml", "llama-3b": "bench/h200-3b.yaml"}
    if smoke:
        files = dict.fromkeys(("tiny-1m", "tiny-4m"), "bench/tiny-7m.yaml")
    sizes = tuple(files)
    small = ("train.sequence_length=32", "model.vocab_size=256", "--warmup", "1", "--pairs", "1", "--steps", "2")
    # a step of 1.3B and 65,536 tokens takes a second, so few tell enough; a start takes half of the budget
    counts = small if smoke else ("--warmup", "2", "--pairs", "3", "--steps", "2")
    found = []

    def train(name: str, model: str, *more: str, budget_s: float, skipped: str = "", engines: int = 1) -> None:
        overrides = [argument for argument in more if re.match(r"(train|precision)\.\w+=", argument)]
        room, why = fitting(files[model], overrides, memory, engines)
        command = ("-m", "megatron_synth", "bench", "train", files[model], "--model", model, *counts, *room, *more)
        found.append(Part(name, (*command, "--vs", "none", "--json", "{json}"), budget_s, skipped or why))

    found.append(_tests("numerics of kernels", smoke, _QUICK_TESTS, 50))
    own, _ = fp8_settings("own", smoke)
    for model in sizes:
        train(f"{model} bf16", model, "precision.dtype=bf16", "--profile", budget_s=48)
        train(f"{model} fp8 own", model, *own, "--profile", budget_s=48)
    found.append(_kernels(smoke))
    theirs, skipped = fp8_settings("te", smoke)
    for model in sizes:
        train(f"{model} fp8 te", model, *theirs, "--profile", budget_s=40, skipped=skipped)
    real = ("data.sources.random.path={data}", "data.sources.random.max_epochs=.inf", "--data", "real")
    train(f"{sizes[0]} bf16, real loader", sizes[0], "precision.dtype=bf16", *real, budget_s=40)
    # a lever takes the time of a start beside that of its steps, so those are few; all that end within the budget are turned
    few = () if smoke else ("train.global_batch_size=4", "--warmup", "2", "--pairs", "3", "--steps", "3")
    # a CPU compiles longer than all the rest takes
    names = [name for name in LEVERS if not (smoke and name == "torch.compile")]
    levers = ("--ablations", ",".join(names), "--budget", "65", *few)
    train(f"{sizes[0]} bf16, levers", sizes[0], "precision.dtype=bf16", *real, *levers, budget_s=80, engines=2)
    if not smoke:
        found.append(_tests("numerics of runs", smoke, ("-m", "gpu", "gpu/"), 65))
    return found


_QUICK_TESTS = (
    *("-m", "gpu", "gpu/test_kernels_gpu.py", "gpu/test_fp8_gpu.py::test_kernels_are_bit_equal_to_their_definition"),
    "gpu/test_fp8_gpu.py::test_what_quantizes_as_it_makes_is_bit_equal_to_making_and_quantizing",
)
"""Those that start no process of their own."""


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


def _tests(name: str, smoke: bool, chosen: Sequence[str], budget_s: float) -> Part:
    """Tests of the clone, or, on a smoke run, one quick file of tests in the same way."""
    folder = Path(__file__).resolve().parents[2] / "tests"
    if smoke:
        chosen = ("unit/data/mixing/test_permutation.py",)
    paths = [str(folder / one) if one.startswith(("gpu/", "unit/")) else one for one in chosen]
    command = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *paths)
    return Part(name, command, budget_s, "" if folder.is_dir() else "no tests beside the package: run it from a clone")


def _kernels(smoke: bool) -> Part:
    command = ("-m", "megatron_synth", "bench", "kernels", "--vs", "eager", "--json", "{json}")
    return Part("kernels", (*command, "--smoke") if smoke else command, 50)


def _run(part: Part, folder: Path, data: Path | None, budget_s: float) -> dict[str, Any]:
    if part.skipped:
        say(f"{part.name}: skipped, {part.skipped}")
        return {"status": "skipped", "why": part.skipped}
    file = folder / "part.json"
    file.unlink(missing_ok=True)
    command = [argument.replace("{json}", str(file)).replace("{data}", str(data)) for argument in part.command]
    mark = secrets.token_hex(8)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), _MARK: mark}
    write_json(folder / _RUNNING, {"part": part.name, "command": list(part.command), "mark": mark})
    began = time.perf_counter()
    log = folder / "part.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: end_with_parent(signal.SIGKILL),
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
    found: dict[str, Any] = {
        "status": status,
        "took_s": took,
        "budget_s": budget_s,
        "result": json.loads(file.read_text()) if file.exists() else None,
        "printed": "" if status == "done" and file.exists() else printed[-4000:],
    }
    if status != "done":
        found["advice"] = _advice(printed, status, command)
        say(f"  {(printed.strip().splitlines() or ['it printed nothing'])[-1]}\n  try: {found['advice']}")
    return found


def _advice(printed: str, status: str, command: Sequence[str]) -> str:
    """What to try when a part has failed."""
    for pattern, text in ADVICE:
        if re.search(pattern, printed):
            return text
    if status == "over its budget":
        return "the same command again: what it compiled is kept, so it starts faster; or alone, without a budget"
    return f"alone: {shlex.join(['python', *command])}"


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


def memory_of_gpus() -> list[int]:
    """Bytes of each GPU that torch sees; empty without any. By another process: this one takes none of them."""
    code = "import torch; print(*(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"torch does not start: {(done.stderr.strip().splitlines() or ['it printed nothing'])[-1]}")
    return [int(size) for size in done.stdout.split()]


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
