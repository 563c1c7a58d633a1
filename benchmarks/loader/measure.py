"""Loaders of mixtures side by side: speed against a limit, start-up, memory, exactness, resuming.

The limit is the least that any loader must do: read a memory map of the same shards from front to back and copy batches
of 8 x 4096 tokens into an int64 torch tensor. Beside it stands the same at random places, 4096 tokens each, which is the
least for a loader that shuffles. Both are measured in the process of each contender, in turn with it; a ratio compares
neighbors.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loader.memory import anonymous_bytes
from benchmarks.loader.peers import CONTENDERS, EOD, ROWS, SHARES, VALUES, Contender, Sources
from megatron_synth.core.log import say

SEQUENCE_LENGTH = 4096
SHORT = 32
"""Sequence length where only the order matters: of worst deviation, resuming and extending."""
MEAN_DOCUMENT = 1000
ROUNDS = 5
ROUND_S = 0.4
SETTLE_S, SETTLE_LOOKS = 0.05, 200
PREFIXES = 100_000
"""Samples over whose prefixes, batch by batch, the worst deviation is taken."""
RESUME_STEP = 10_000
EXTEND_BATCHES = 200
TIME_LIMIT_S = 600


def write_sources(folder: Path, tokens: int) -> None:
    """The benchmark's sources: random tokens in documents of log-normal length, `tokens` of them each."""
    from megatron_synth.data.shards.indexed import (
        ShardWriter,
    )  # other environments, which only read, need not have what it needs

    for number, prefix in enumerate(Sources(folder, SEQUENCE_LENGTH).prefixes):
        generator = np.random.default_rng(number)
        stream = generator.integers(number * VALUES, (number + 1) * VALUES, tokens, dtype=np.uint16)
        lengths = np.clip(generator.lognormal(np.log(MEAN_DOCUMENT) - 0.5, 1.0, tokens // 200), 20, None).astype(np.int32)
        ends = np.cumsum(lengths)
        count = int(np.searchsorted(ends, tokens, side="right"))
        assert 0 < count < len(ends)
        stream[ends[:count] - 1] = EOD
        writer = ShardWriter(prefix, np.dtype(np.uint16))
        writer.add(stream[: ends[count - 1]], lengths[:count])
        writer.finish()


def run(tokens: int, only: str | None, peers: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Every contender in a process of its own.

    Args:
        tokens: of each source.
        only: contenders whose name holds this, or `peers`: all but ours. Default: all.
        peers: interpreters of other environments; what is not installed here is looked for there.
    """
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as name:
        folder = Path(name)
        write_sources(folder, tokens)
        for contender in CONTENDERS:
            if only is None or only in contender.name or (only == "peers" and contender.needs is not None):
                results.append(_in_process(contender, folder, peers))
                say(f"{contender.name}: {results[-1].get('left_out', 'done')}")
    return results


def _in_process(contender: Contender, folder: Path, peers: Sequence[Path]) -> dict[str, Any]:
    python = _python(contender, peers)
    if python is None:
        return {"name": contender.name, "left_out": "not installed"}
    # megatron-core keeps its indexes here: one row of the table must not find what another has built
    shutil.rmtree(folder / "cache", ignore_errors=True)
    command = [python, "-m", "benchmarks.loader.measure", contender.name, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
    # another environment has no copy of this package
    path = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"name": contender.name, "left_out": f"took more than {TIME_LIMIT_S} s"}
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return {"name": contender.name, "left_out": f"failed: {last[:160]}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _python(contender: Contender, peers: Sequence[Path]) -> str | None:
    """The interpreter of the first environment that has what the contender needs."""
    if not contender.missing:
        return sys.executable
    assert contender.needs is not None
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    for python in peers:
        if subprocess.run([str(python), "-c", probe, contender.needs], stderr=subprocess.DEVNULL).returncode == 0:
            return str(python)
    return None


def measure(contender: Contender, folder: Path) -> dict[str, Any]:
    """All figures of one contender."""
    torch.set_num_threads(1)
    long, short = Sources(folder, SEQUENCE_LENGTH), Sources(folder, SHORT)
    # files that are made once for all runs, and imports, are no part of a start
    for sources in (long, short):
        stream = contender.open(sources, 1000)
        stream.next()
        stream.close()
    return {
        "name": contender.name,
        "package": contender.package,
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "torch")},
        **_starts(contender, long),
        **_rates(contender, long),
        **_order(contender, short),
    }


def _starts(contender: Contender, sources: Sources) -> dict[str, Any]:
    """Seconds from nothing to the first batch, and memory that is held then, at each length of a run."""
    seconds, held = {}, {}
    for samples in contender.sizes:
        before, began = anonymous_bytes(), time.perf_counter()
        stream = contender.open(sources, samples)
        stream.next()
        seconds[str(samples)], held[str(samples)] = time.perf_counter() - began, anonymous_bytes() - before
        stream.close()
        del stream
    sizes = [str(samples) for samples in contender.sizes]
    return {"start_s": seconds, "held_bytes": held, "growth_bytes": max(0, held[sizes[-1]] - held[sizes[0]])}


def _rates(contender: Contender, sources: Sources) -> dict[str, Any]:
    """Tokens per second of the limits and of the contender, in turn."""
    stream = contender.open(sources, 10**6)
    in_order, at_random = _limit(sources, shuffled=False), _limit(sources, shuffled=True)
    for one in (in_order, at_random, stream.next):
        _rate(one, 0.5)
    rounds = []
    for _ in range(ROUNDS):
        _settle()
        limits = {"limit": _rate(in_order, ROUND_S), "random": _rate(at_random, ROUND_S)}
        _rate(stream.next, ROUND_S)  # what was read ahead meanwhile is not counted
        rounds.append({**limits, "own": _rate(stream.next, ROUND_S)})
    stream.close()
    return {"rounds": rounds}


def _settle() -> None:
    """Wait until threads that read ahead have filled their buffers: they would take from what is measured next."""
    for _ in range(SETTLE_LOOKS):
        used = time.process_time()
        time.sleep(SETTLE_S)
        if time.process_time() - used < SETTLE_S / 10:
            return


def _rate(batch: Callable[[], Any], seconds: float) -> float:
    tokens, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < seconds:
        for _ in range(4):
            batch()
            tokens += ROWS * SEQUENCE_LENGTH
    return tokens / took


def _limit(sources: Sources, *, shuffled: bool) -> Callable[[], Any]:
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
    streams = [np.asarray(sources.stream(number)) for number in range(len(SHARES))]
    step = SEQUENCE_LENGTH if shuffled else ROWS * SEQUENCE_LENGTH
    places = [(number, at) for number, tokens in enumerate(streams) for at in range(0, len(tokens) - step, step)]
    if shuffled:
        places = [places[at] for at in np.random.default_rng(0).permutation(len(places))]
    out = torch.empty((ROWS, SEQUENCE_LENGTH), dtype=torch.int64)
    rows, position = out.numpy(), 0

    def batch() -> None:
        nonlocal position
        if position + ROWS > len(places):
            position = 0
        if shuffled:
            for row in range(ROWS):
                number, at = places[position + row]
                rows[row] = streams[number][at : at + step]
            position += ROWS
        else:
            number, at = places[position]
            out.copy_(torch.from_numpy(streams[number][at : at + step]).view(ROWS, SEQUENCE_LENGTH))
            position += 1

    return batch


def _order(contender: Contender, sources: Sources) -> dict[str, Any]:
    """What the order of the samples is worth: deviation, resuming, extending."""
    stream = contender.open(sources, PREFIXES + PREFIXES // 10)
    kinds, state, expected = [], None, None
    for number in range(PREFIXES // ROWS):
        if number == RESUME_STEP:
            state = pickle.dumps(stream.state())
        tokens = stream.next()
        if number == RESUME_STEP:
            expected = tokens.clone()
        # the smallest of some tokens is none of the markers of a document's end
        kinds.append(tokens[:, :8].amin(dim=1).numpy() // VALUES)
    stream.close()
    # nobody sees a part of a batch: the prefixes are those that end with one
    counts = np.cumsum([np.bincount(kind, minlength=len(SHARES)) for kind in kinds], axis=0)
    due = ROWS * np.arange(1, len(counts) + 1)[:, None] * np.array([float(share) for share in SHARES])
    assert state is not None and expected is not None
    began = time.perf_counter()
    again = contender.open(sources, PREFIXES + PREFIXES // 10)
    again.restore(pickle.loads(state))
    found = again.next()
    resume_s = time.perf_counter() - began
    resumed = torch.equal(found, expected)
    again.close()
    firsts = [_first_batches(contender, sources, PREFIXES * tenths // 10) for tenths in (10, 11, 13)]
    same = [sum(torch.equal(a, b) for a, b in zip(firsts[0], longer, strict=True)) for longer in firsts[1:]]
    return {
        "worst": float(np.abs(counts - due).max()),
        "resume_s": resume_s,
        "resumed_exactly": resumed,
        "state_bytes": len(state),
        "extend": same,
    }


def _first_batches(contender: Contender, sources: Sources, samples: int) -> list[torch.Tensor]:
    stream = contender.open(sources, samples)
    batches = [stream.next().clone() for _ in range(EXTEND_BATCHES)]
    stream.close()
    return batches


def package_lines(results: list[dict[str, Any]], versions: dict[str, str]) -> list[str]:
    """Which versions of others were measured, as a line of a Markdown list; none without others.

    versions: of this environment: only what differs from it is reported of another one.
    """
    found: dict[str, str] = {}
    for result in results:
        if result.get("package"):
            others = [f"{name} {one}" for name, one in result["versions"].items() if one != versions[name]]
            found[result["package"]] = f" (with {', '.join(others)})" if others else ""
    return [f"- peers: {', '.join(name + rest for name, rest in found.items())}"] if found else []


def table_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """The table, head first."""
    head = ["loader", "M tokens/s", "of limit", "of random limit", "start 1e5, s", "1e7, s", "1e12, s", "growth, MiB"]
    rows = [[*head, "worst, samples", "resume, s", "state, bytes", "extend +10 % / +30 %"]]
    limits = [turn for result in results for turn in result.get("rounds", [])]
    if limits:
        for name, key in (("limit: in order", "limit"), ("limit: random windows", "random")):
            rate = statistics.median(turn[key] for turn in limits)
            share = statistics.median(turn[key] / turn["limit"] for turn in limits)
            rows.append([name, f"{rate / 1e6:.0f}", f"{share:.1%}", *[""] * (len(rows[0]) - 3)])
    for result in results:
        if "left_out" in result:
            rows.append([result["name"], result["left_out"], *[""] * (len(rows[0]) - 2)])
            continue
        own = statistics.median(turn["own"] for turn in result["rounds"])
        ratios = [statistics.median(turn["own"] / turn[key] for turn in result["rounds"]) for key in ("limit", "random")]
        starts = [result["start_s"].get(str(samples)) for samples in (10**5, 10**7, 10**12)]
        exactly = "" if result["resumed_exactly"] else ", other batch"
        rows.append(
            [
                result["name"],
                f"{own / 1e6:.1f}",
                *(f"{ratio:.1%}" for ratio in ratios),
                *("" if start is None else f"{start:.4f}" for start in starts),
                f"{result['growth_bytes'] / 2**20:.1f}",
                f"{result['worst']:.2f}",
                f"{result['resume_s']:.4f}{exactly}",
                str(result["state_bytes"]),
                " / ".join(map(str, result["extend"])),
            ]
        )
    return rows


if __name__ == "__main__":
    chosen = next(one for one in CONTENDERS if one.name == sys.argv[1])
    print(json.dumps(measure(chosen, Path(sys.argv[2]))), flush=True)
    os._exit(0)  # threads of others' loaders may not end by themselves
