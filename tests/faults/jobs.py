"""What the ranks of the fault campaign run: training that is killed at a moment drawn beforehand."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from tests.dist.jobs import rank


def train_until_killed(
    arguments: list[str], target: int, moment: str, number: int, delay: float, steps: int, trace: str
) -> int:
    """Train; rank `target` gets SIGKILL.

    Args:
        arguments: of the command line.
        target: rank.
        moment: "start": `delay` seconds after the job has begun. "step": `delay` seconds after step `number` of this life has
            begun. "save": `delay` seconds after save number `number` of this life has begun.
        number: which.
        delay: from there.
        steps: at the latest, the rank dies in this step of its life, so that a run cannot end before its kills are used up.
        trace: file to which the rank writes, before it dies, where it was.
    """
    from megatron_synth.cli import main as cli
    from megatron_synth.train.checkpoint.writer import CheckpointWriter
    from megatron_synth.train.loop import Trainer

    batches, begin, work = Trainer._batches, CheckpointWriter.begin, CheckpointWriter._work
    state = {"step": 0, "saves": 0, "copying": False, "writing": False}

    def die() -> None:
        where = "save" if state["copying"] or state["writing"] else "step" if state["step"] else "start"
        with Path(trace).open("a") as file:
            file.write(f"{where}\n")
        os.kill(os.getpid(), signal.SIGKILL)

    def later() -> None:
        time.sleep(delay)
        die()

    def arm() -> None:
        threading.Thread(target=later, daemon=True).start()

    def counted(self: Any) -> Any:
        state["step"] += 1
        if moment == "step" and state["step"] == number:
            arm()
        if state["step"] >= steps:
            die()
        return batches(self)

    def copying(*args: Any) -> None:
        state["saves"] += 1
        if moment == "save" and state["saves"] == number:
            arm()
        state["copying"] = True
        begin(*args)
        state["copying"] = False

    def writing(*args: Any) -> None:
        state["writing"] = True
        work(*args)
        state["writing"] = False

    if rank() == target:
        Trainer._batches = counted  # type: ignore[method-assign]
        CheckpointWriter.begin = copying  # type: ignore[assignment, method-assign]
        CheckpointWriter._work = writing  # type: ignore[assignment, method-assign]
        if moment == "start":
            arm()
    return cli.main(arguments)


def train_on_a_small_disk(arguments: list[str], ballast: str, full: int) -> int:
    """Train; from save number `full` to the begin of the next, the file `ballast` takes all that is free on its disk."""
    from megatron_synth.cli import main as cli
    from megatron_synth.train.checkpoint.writer import CheckpointWriter

    saves, begin = 0, CheckpointWriter.begin

    def filled(*args: Any) -> None:
        nonlocal saves
        args[0].join()
        saves += 1
        if rank() == 0 and saves == full:
            with Path(ballast).open("wb", buffering=0) as file:
                try:
                    while file.write(b"0" * 65536):
                        pass
                except OSError:
                    pass
        elif rank() == 0 and saves == full + 1:
            Path(ballast).unlink()
        begin(*args)

    CheckpointWriter.begin = filled  # type: ignore[assignment, method-assign]
    return cli.main(arguments)


def train_timed(arguments: list[str]) -> tuple[int, float, float]:
    """Train: exit code, median seconds of a step, median seconds of a save until it is whole."""
    import statistics

    from megatron_synth.cli import main as cli
    from megatron_synth.train.checkpoint.writer import CheckpointWriter
    from megatron_synth.train.step import Stepper

    steps: list[float] = []
    saves: list[float] = []
    step, begin, work = Stepper.step, CheckpointWriter.begin, CheckpointWriter._work
    began = 0.0

    def timed_step(*args: Any) -> Any:
        start = time.perf_counter()
        result = step(*args)
        steps.append(time.perf_counter() - start)
        return result

    def timed_begin(*args: Any) -> None:
        nonlocal began
        args[0].join()
        began = time.perf_counter()
        begin(*args)

    def timed_work(*args: Any) -> None:
        work(*args)
        saves.append(time.perf_counter() - began)

    Stepper.step = timed_step  # type: ignore[method-assign]
    CheckpointWriter.begin = timed_begin  # type: ignore[assignment, method-assign]
    CheckpointWriter._work = timed_work  # type: ignore[assignment, method-assign]
    return cli.main(arguments), statistics.median(steps), statistics.median(saves)
