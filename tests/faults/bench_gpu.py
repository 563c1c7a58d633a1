"""`bench gpu` killed at random moments: it goes on, keeps each result, and leaves no process behind.

    python -m tests.faults.bench_gpu --kills 20 [--seed N] -- --smoke

What follows `--` are arguments of `bench gpu`. On a machine without a GPU, in the environment of `make gpu-rehearsal` with the
device preloaded (tests/nocuda/build.py), it is the whole script that is killed. There it ends with 1 (`--ends 1`), as parts
that ask for numbers find none; what is done must be kept all the same.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from megatron_synth.bench.gpu import _MARK, _RUNNING


def campaign(
    command: Sequence[str], file: Path, kills: int, seed: int, longest_s: float, patience_s: float = 600, ends: int = 0
) -> int:
    """Kill `command`, which writes `file`, at random moments of its parts, and let it end; how many kills there were.

    Args:
        command: to be run again after each kill.
        file: what `bench gpu --json` names.
        kills: at most; fewer where the script ends before.
        seed: of the moments.
        longest_s: between the start of a part and the kill.
        patience_s: longest time of a run of the command.
        ends: the exit code of a whole run.

    Raises:
        AssertionError: a result was lost or changed, or a process was left.
    """
    moments, done, killed = random.Random(seed), {}, 0
    marks: set[str | None] = set()
    running = file.with_name(file.name + ".running") / _RUNNING
    while True:
        begun_before = _mark(running)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        deadline = time.monotonic() + patience_s
        if killed < kills:
            while process.poll() is None and _mark(running) in (None, begun_before):
                assert time.monotonic() < deadline, "no part was begun"
                time.sleep(0.02)
            try:
                process.wait(moments.uniform(0, longest_s))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed += 1
                marks.add(_mark(running))
                done = _kept(file, done)
                print(f"killed {killed}; done: {len(done)}", flush=True)
                continue
        printed, _ = process.communicate(timeout=patience_s)
        assert process.returncode == ends, printed
        _kept(file, done)
        left = [
            one.info["pid"]
            for one in psutil.process_iter(["pid", "environ"])
            if (one.info["environ"] or {}).get(_MARK) in marks - {None}
        ]
        assert not left, f"processes {left} are left"
        assert not running.parent.exists()
        return killed


def _mark(running: Path) -> str | None:
    try:
        return str(json.loads(running.read_text())["mark"])
    except (OSError, ValueError):
        return None


def _kept(file: Path, before: dict[str, Any]) -> dict[str, Any]:
    """What is done by now; what was done before must be in it as it was."""
    parts = json.loads(file.read_text())["parts"] if file.exists() else {}
    done = {name: part for name, part in parts.items() if part["status"] == "done"}
    assert before.items() <= done.items(), f"lost or changed: {[name for name in before if before[name] != done.get(name)]}"
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=40.0, metavar="S", help="from the start of a part to its kill")
    parser.add_argument("--ends", type=int, default=0, metavar="CODE", help="exit code of a whole run (%(default)s)")
    parser.add_argument("arguments", nargs="*", help="of `bench gpu`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gpu.json"
        command = [sys.executable, "-m", "megatron_synth", "bench", "gpu", *options.arguments, "--json", str(file)]
        killed = campaign(command, file, options.kills, options.seed, options.longest, ends=options.ends)
        print(f"{killed} kills, {len(_kept(file, {}))} parts done, {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
