"""`python -m tests.faults.kills --prepare 200 --train 130 --study 120 --pairs 20`: SIGKILL for real programs, at any moment.

A preparation, a run of two ranks (the launcher or a rank is killed; every fourth start is launch/local.sh, the others its
launcher alone) and a study on this machine (the program or one of its children) are killed and started again until the kills
are used up, then go to their end. Each must give what one that nobody touched gave: the same bytes, the same losses. `--pairs`
starts two programs on one folder, of each kind (run, prepared output, study, synthesis), at about the same time: one does the
work, the other is refused by name, leaves it to the other, or comes when all is done. No traceback may come at any time.
Programs begin with their imports done (`warm.py`). `--state FOLDER` keeps counts, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import atexit
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

from megatron_synth.core.lock import holder
from megatron_synth.study.execute.folder import Folder
from megatron_synth.train.record.run_lock import LOCK
from tests.faults import synthesis, warm
from tests.faults.tally import Tally
from tests.support import ROOT, assert_same_losses, read_ledger, read_metrics, write_config, write_corpus, write_source
from tests.unit.study.test_study_run import opened
from tests.unit.study.test_study_run import write as write_study

_LIMIT_S = 1800.0
_STEPS = 60
_SHELL_EVERY = 4
_PART = 10
Round = Callable[[int, random.Random], Counter[str]]
"""Kills so many times, as drawn; what happened."""


def _environment() -> dict[str, str]:
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    return {name: value for name, value in os.environ.items() if name not in launched} | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


class Program:
    """A program in a session of its own, and what it prints."""

    def __init__(self, words: list[str], log: Path):
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(words, env=_environment(), stdout=file, stderr=file, start_new_session=True)

    def end(self) -> tuple[int, str]:
        """Exit code and output; all processes of its session are gone."""
        try:
            code = self.process.wait(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end: {self._log.read_text(errors='replace')[-4000:]}") from None
        printed = self._log.read_text(encoding="utf-8", errors="replace")
        assert "Traceback" not in printed, printed[-4000:]
        return code, printed

    def family(self) -> list[psutil.Process]:
        """The program and what it started, that which began last at the end."""
        try:
            main = psutil.Process(self.process.pid)
            return [main, *(child for child in main.children(recursive=True) if not _is_tracker(child))]
        except psutil.NoSuchProcess:
            return []


def _is_tracker(process: psutil.Process) -> bool:
    """Whether it is the process of Python's own that cleans up semaphores; without it the next one prints tracebacks."""
    try:
        return any("resource_tracker" in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _kill(program: Program, draw: random.Random, within_s: float, which: int | None = None) -> bool:
    """Kill one process of a program, or that number of its family, some time from now; False: it had ended."""
    deadline = time.monotonic() + draw.uniform(0, within_s)
    while time.monotonic() < deadline and program.process.poll() is None:
        time.sleep(0.02)
    family = program.family()
    if program.process.poll() is not None or not family:
        return False
    try:
        (draw.choice(family) if which is None else family[min(which, len(family) - 1)]).send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return False
    return True


def _gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=120)
    assert not alive, f"outlive their launcher: {[process.cmdline() for process in alive]}"


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- preparations


def _prepare_words(folder: Path, output: Path) -> list[str]:
    text = folder / "text.jsonl"
    if not text.exists():
        draw = random.Random(5)
        words = [f"word{number}" for number in range(500)]
        lines = (f'{{"text": "{number} {" ".join(draw.choices(words, k=60))}"}}\n' for number in range(20_000))
        text.write_text("".join(lines))
    file = folder / f"{output.name}.yaml"
    file.write_text(
        f"output: {output}\ntokenizer: {{train: {{vocab_size: 600, max_bytes: 200000}}}}\nshard_tokens: 200000\n"
        f"shuffle: {{seed: 3}}\nsources: {{web: {{kind: natural, input: {text}, holdout: 1/50}}}}\n"
    )
    return [sys.executable, "-m", "megatron_synth", "prepare", str(file), "--workers", "2"]


def kill_preparations(folder: Path) -> Round:
    """Kill a preparation, or one of its workers, again and again."""
    whole, output = folder / "whole", folder / "killed"
    began = time.monotonic()
    code, printed = Program(_prepare_words(folder, whole), folder / "log").end()
    assert code == 0, printed
    took, words = time.monotonic() - began, _prepare_words(folder, output)

    def kill(count: int, draw: random.Random) -> Counter[str]:
        happened = Counter[str]()
        while happened.total() - happened["ends, with the same bytes"] < count:
            program = Program(words, folder / "log")
            which = 0 if draw.random() < 0.7 else draw.randrange(1, 5)
            hit = _kill(program, draw, took, which)
            family = program.family()
            code, printed = program.end()
            assert code in (0, -signal.SIGKILL, 70, 2), (code, printed)
            if hit and code != 0:
                happened["kills of the program" if code == -signal.SIGKILL else "kills of a worker"] += 1
            _gone(family)
            if code == 0:
                _same_output(output, whole)
                happened["ends, with the same bytes"] += 1
        code, printed = Program(words, folder / "log").end()
        assert code == 0, printed
        _same_output(output, whole)
        assert not list(folder.glob(".killed*"))
        return happened + Counter({"ends, with the same bytes": 1})

    return kill


def _same_output(output: Path, whole: Path) -> None:
    assert _tree(output / "web") == _tree(whole / "web")
    shutil.rmtree(output)


# ---- runs


def kill_runs(folder: Path) -> Round:
    """Kill the launcher or a rank of a run of two ranks."""
    config = write_config(folder / "run.yaml", write_corpus(folder / "corpus"))
    endless = ("data.sources.web.max_epochs=.inf", "data.sources.qa.max_epochs=.inf")
    settings = (f"train.steps={_STEPS}", "checkpoint.interval=4", "log.interval=5", "train.lost_rank_timeout_s=10", *endless)

    def words(run: Path, shell: bool) -> list[str]:
        tail = [str(config), *settings, "--run-dir", str(run)]
        if shell:
            return ["bash", str(ROOT / "launch" / "local.sh"), "2", *tail]
        launcher = [sys.executable, "-m", "megatron_synth.cluster.agent", "--local", "--nproc-per-node", "2"]
        return [*launcher, "-m", "megatron_synth", "train", *tail]

    took = {}
    for shell in (True, False):
        began = time.monotonic()
        code, printed = Program(words(folder / f"whole-{shell}", shell), folder / "log").end()
        assert code == 0, printed
        took[shell] = time.monotonic() - began
    whole, run = folder / "whole-True", folder / "killed"

    def finished() -> None:
        assert_same_losses(read_metrics(run), read_metrics(whole), 0)
        assert read_ledger(run) == read_ledger(whole) and not (run / LOCK).exists()
        shutil.rmtree(run)

    def kill(count: int, draw: random.Random) -> Counter[str]:
        happened, ends = Counter[str](), 0
        while happened.total() < count:
            shell = draw.randrange(_SHELL_EVERY) == 0
            program = Program(words(run, shell), folder / "log")
            which = draw.randrange(3)  # the launcher and its ranks; local.sh itself is only the shell around them
            hit = _kill(program, draw, took[shell], which + shell)
            family = program.family()
            code, printed = program.end()
            if hit and code != 0:
                assert code in (70, 2, -signal.SIGKILL), (code, printed[-2000:])
                happened["kills of a rank" if which else "kills of the launcher"] += 1
            _gone(family)
            if code == 0:
                finished()
                ends += 1
        code, printed = Program(words(run, False), folder / "log").end()
        assert code == 0, printed
        finished()
        return happened + Counter({"ends, losses and ledger to the bit": ends + 1})

    return kill


# ---- studies


def _corpus_of_studies(folder: Path) -> Path:
    """Sources that suffice for the runs of a study."""
    for seed, name in enumerate(("web", "qa")):
        write_source(folder / name, seed, 20_000)
    write_source(folder / "val", 9, 400)
    return folder


def _study_words(file: Path) -> list[str]:
    return [sys.executable, "-m", "megatron_synth", "study", "submit", str(file), "--local", "--jobs", "2"]


def kill_studies(folder: Path) -> Round:
    """Kill the program of a study, or a run of it."""
    corpus = _corpus_of_studies(folder / "corpus")
    whole = write_study(corpus, folder / "whole")
    began = time.monotonic()
    code, printed = Program(_study_words(whole), folder / "log").end()
    assert code == 0, printed
    took, file = time.monotonic() - began, write_study(corpus, folder / "killed")

    def finished() -> None:
        (ours, runs), (theirs, _) = opened(file), opened(whole)
        for run in runs:
            assert_same_losses(read_metrics(ours.run(run)), read_metrics(theirs.run(run)), 0)
        shutil.rmtree(folder / "killed")

    def kill(count: int, draw: random.Random) -> Counter[str]:
        happened, ends = Counter[str](), 0
        while happened.total() < count:
            program = Program(_study_words(file), folder / "log")
            hit = _kill(program, draw, took)
            family = program.family()
            code, _ = program.end()
            if hit and code != 0:
                happened["kills of the program" if code < 0 else "kills of a run"] += 1
            _gone(family)
            if code == 0:
                finished()
                ends += 1
        for _ in range(3):  # a run that was killed has failed; the next submit tries it again
            code, printed = Program(_study_words(file), folder / "log").end()
            if code == 0:
                break
        assert code == 0, printed
        finished()
        return happened + Counter({"ends, all losses to the bit": ends + 1})

    return kill


# ---- two programs at once


def pairs(folder: Path) -> Round:
    """Two programs on one folder, of each kind."""
    config = write_config(folder / "run.yaml", write_corpus(folder / "corpus"))
    for_study, server = _corpus_of_studies(folder / "study-corpus"), synthesis.Server(rate=200)
    atexit.register(server.kill)

    def start(count: int, draw: random.Random) -> Counter[str]:
        happened = Counter[str]()
        for _ in range(count):
            folders = {kind: folder / kind for kind in ("prepare", "train", "study", "synthesis")}
            study = write_study(for_study, folders["study"])
            file = synthesis.settings(folder, "synthesis", server.url, 200)
            kinds = {
                "prepare": _prepare_words(folder, folders["prepare"]),
                "train": [sys.executable, "-m", "megatron_synth", "train", str(config), "--run-dir", str(folders["train"])],
                "study": _study_words(study),
                "synthesis": [sys.executable, "-m", "megatron_synth", "synthesize", "run", str(file)],
            }
            for kind, words in kinds.items():
                first = Program(words, folder / "log-1")
                time.sleep(draw.uniform(0, 3) ** 2 / 3)
                second = Program(words, folder / "log-2")
                ends = [first.end(), second.end()]
                codes = sorted(code for code, _ in ends)
                assert codes[0] == 0 and codes[1] in (0, 1, 2), ends
                refused = [printed for code, printed in ends if code == 2]
                assert all(" in use by `megatron-synth " in printed for printed in refused), refused
                happened[f"{kind}: {'one refused' if refused else 'both ended well'}"] += 1
            assert [record["step"] for record in read_metrics(folders["train"])] == list(range(1, 21))
            found, runs = opened(study)
            assert {Folder(found.path).state(one) for one in runs} == {"done"} and holder(folders["train"] / LOCK) is None
            for kind, made in folders.items():
                whole = folder / f"first-{kind}"
                if not whole.exists():
                    made.rename(whole)
                    continue
                if kind == "prepare":
                    assert _tree(made / "web") == _tree(whole / "web")
                elif kind == "train":
                    assert_same_losses(read_metrics(made), read_metrics(whole), 0)
                elif kind == "synthesis":
                    assert _tree(made / "corpus") == _tree(whole / "corpus")
                shutil.rmtree(made)
        return happened

    return start


def main(argv: list[str]) -> int:
    """Run the campaign; an AssertionError tells what did not survive."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills", description=__doc__)
    parts: dict[str, tuple[Callable[[Path], Round], int]] = {
        "prepare": (kill_preparations, _PART),
        "train": (kill_runs, _PART),
        "study": (kill_studies, _PART),
        "pairs": (pairs, 1),
    }
    for name in parts:
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path, help="folder that keeps what is done, to go on")
    options = parser.parse_args(argv)
    warm.install()
    for name, (prepared, of_part) in parts.items():
        tally = Tally(options.state and options.state / f"kills-{name}.jsonl", options.seed)
        count: int = getattr(options, name)
        if next(tally.missing(count, of_part), None) is not None:
            folder, began = Path(tempfile.mkdtemp(prefix=f"kills-{name}-")), time.monotonic()
            work = prepared(folder)
            tally.run(count, of_part, lambda seed, number, work=work: work(number, random.Random(seed)))  # type: ignore[misc]
            print(f"{name}, in {(time.monotonic() - began) / 60:.0f} min: {tally.text()}", flush=True)
            shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
