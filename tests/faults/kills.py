"""`python -m tests.faults.kills --prepare 60 --train 10 --study 10 --pairs 5`: SIGKILL for real programs, at any moment.

A preparation, a run of two ranks under launch/local.sh (its agent or a rank is killed) and a study on this machine (the program
or one of its children) are killed and started again until the kills are used up, then go to their end. Each must give what one
that nobody touched gave: the same bytes, the same losses. `--pairs` starts two programs on one folder, of each kind, at about
the same time: one does the work, the other is refused by name, leaves it to the other, or comes when all is done. No traceback
may come at any time.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from megatron_synth.core.lock import holder
from megatron_synth.study.execute.folder import Folder
from megatron_synth.train.record.run_lock import LOCK
from tests.support import ROOT, assert_same_losses, read_ledger, read_metrics, write_config, write_corpus, write_source
from tests.unit.study.test_study_run import opened
from tests.unit.study.test_study_run import write as write_study

_LIMIT_S = 1800.0
_STEPS = 60


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
        code = self.process.wait(timeout=_LIMIT_S)
        printed = self._log.read_text(encoding="utf-8", errors="replace")
        assert "Traceback" not in printed, printed[-4000:]
        return code, printed

    def family(self) -> list[psutil.Process]:
        """The program and what it started, that which began last at the end."""
        try:
            main = psutil.Process(self.process.pid)
            return [main, *main.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


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
        lines = (f'{{"text": "{number} {" ".join(draw.choices(words, k=60))}"}}\n' for number in range(60_000))
        text.write_text("".join(lines))
    file = folder / f"{output.name}.yaml"
    file.write_text(
        f"output: {output}\ntokenizer: {{train: {{vocab_size: 600, max_bytes: 200000}}}}\nshard_tokens: 200000\n"
        f"shuffle: {{seed: 3}}\nsources: {{web: {{kind: natural, input: {text}, holdout: 1/50}}}}\n"
    )
    return [sys.executable, "-m", "megatron_synth", "prepare", str(file), "--workers", "2"]


def kill_preparations(folder: Path, count: int, draw: random.Random) -> str:
    """Kill a preparation again and again."""
    whole = folder / "whole"
    began = time.monotonic()
    code, printed = Program(_prepare_words(folder, whole), folder / "log").end()
    assert code == 0, printed
    took, killed, finished = time.monotonic() - began, 0, 0
    output = folder / "killed"
    words = _prepare_words(folder, output)
    while killed < count:
        program = Program(words, folder / "log")
        hit = _kill(program, draw, took, which=0)
        family = program.family()
        code, printed = program.end()
        killed += hit and code == -signal.SIGKILL
        _gone(family)
        if code == 0:
            assert _tree(output / "web") == _tree(whole / "web")
            shutil.rmtree(output)
            finished += 1
    code, printed = Program(words, folder / "log").end()
    assert code == 0, printed
    assert _tree(output / "web") == _tree(whole / "web") and not list(folder.glob(".killed*"))
    return f"{killed} kills of a preparation; {finished + 1} times it came to its end, with the same bytes"


# ---- runs


def kill_runs(folder: Path, count: int, draw: random.Random) -> str:
    """Kill the script, the agent or a rank of a run of two ranks."""
    config = write_config(folder / "run.yaml", write_corpus(folder / "corpus"))
    endless = ("data.sources.web.max_epochs=.inf", "data.sources.qa.max_epochs=.inf")
    settings = (f"train.steps={_STEPS}", "checkpoint.interval=4", "log.interval=5", "train.lost_rank_timeout_s=10", *endless)

    def words(run: Path) -> list[str]:
        return ["bash", str(ROOT / "launch" / "local.sh"), "2", str(config), *settings, "--run-dir", str(run)]

    began = time.monotonic()
    code, printed = Program(words(folder / "whole"), folder / "log").end()
    assert code == 0, printed
    took, killed, victims, run, ended = time.monotonic() - began, 0, Counter[str](), folder / "killed", 0
    while killed < count:
        program = Program(words(run), folder / "log")
        which = draw.choice((1, 2, 3))  # the agent and its ranks; local.sh itself is only the shell around them
        hit = _kill(program, draw, took, which)
        family = program.family()
        code, printed = program.end()
        if hit and code != 0:
            assert code in (70, 2), (code, printed[-2000:])
            killed += 1
            victims["agent" if which == 1 else "rank"] += 1
        _gone(family)
        if code == 0:
            ended += 1
            assert_same_losses(read_metrics(run), read_metrics(folder / "whole"), 0)
            shutil.rmtree(run)
    code, printed = Program(words(run), folder / "log").end()
    assert code == 0, printed
    assert_same_losses(read_metrics(run), read_metrics(folder / "whole"), 0)
    assert read_ledger(run) == read_ledger(folder / "whole") and not (run / LOCK).exists()
    return f"{killed} kills of a run of two ranks ({dict(victims)}); {ended + 1} times it came to its end, to the bit"


# ---- studies


def _corpus_of_studies(folder: Path) -> Path:
    """Sources that suffice for the runs of a study."""
    for seed, name in enumerate(("web", "qa")):
        write_source(folder / name, seed, 20_000)
    write_source(folder / "val", 9, 400)
    return folder


def kill_studies(folder: Path, count: int, draw: random.Random) -> str:
    """Kill the program of a study, or a run of it."""
    corpus = _corpus_of_studies(folder / "corpus")

    def words(file: Path) -> list[str]:
        return [sys.executable, "-m", "megatron_synth", "study", "submit", str(file), "--local", "--jobs", "2"]

    whole = write_study(corpus, folder / "whole")
    began = time.monotonic()
    code, printed = Program(words(whole), folder / "log").end()
    assert code == 0, printed
    took, killed = time.monotonic() - began, 0
    file = write_study(corpus, folder / "killed")
    while killed < count:
        program = Program(words(file), folder / "log")
        hit = _kill(program, draw, took)
        family = program.family()
        code, printed = program.end()
        killed += hit and code != 0
        _gone(family)
        if code == 0:
            _same_study(file, whole)
            shutil.rmtree(folder / "killed")
    for _ in range(3):  # a run that was killed has failed; the next submit tries it again
        code, printed = Program(words(file), folder / "log").end()
        if code == 0:
            break
    assert code == 0, printed
    _same_study(file, whole)
    return f"{killed} kills of a study, its program or its runs; it came to its end, all losses to the bit"


def _same_study(one: Path, other: Path) -> None:
    (ours, runs), (theirs, _) = opened(one), opened(other)
    for run in runs:
        assert_same_losses(read_metrics(ours.run(run)), read_metrics(theirs.run(run)), 0)


# ---- two programs at once


def pairs(folder: Path, count: int, draw: random.Random) -> str:
    """Two programs on one folder, of each kind."""
    config = write_config(folder / "run.yaml", write_corpus(folder / "corpus"))
    for_study, happened = _corpus_of_studies(folder / "study-corpus"), Counter[str]()
    for number in range(count):
        output, run, study = folder / f"out-{number}", folder / f"run-{number}", folder / f"study-{number}"
        kinds = {
            "prepare": _prepare_words(folder, output),
            "train": [sys.executable, "-m", "megatron_synth", "train", str(config), "--run-dir", str(run)],
            "study": [
                sys.executable,
                "-m",
                "megatron_synth",
                "study",
                "submit",
                str(write_study(for_study, study)),
                "--local",
            ],
        }
        for kind, words in kinds.items():
            first = Program(words, folder / "log-1")
            time.sleep(draw.uniform(0, 4))
            second = Program(words, folder / "log-2")
            ends = [first.end(), second.end()]
            codes = sorted(code for code, _ in ends)
            assert codes[0] == 0 and codes[1] in (0, 1, 2), ends
            refused = [printed for code, printed in ends if code == 2]
            assert all(" in use by `megatron-synth " in printed for printed in refused), refused
            happened[f"{kind}: {'one refused' if refused else 'both ended well'}"] += 1
        assert [record["step"] for record in read_metrics(run)] == list(range(1, 21))
        if number:
            assert_same_losses(read_metrics(run), read_metrics(folder / "run-0"), 0)
            assert _tree(output / "web") == _tree(folder / "out-0" / "web")
        found, runs = opened(folder / f"study-{number}.yaml")
        assert {Folder(found.path).state(one) for one in runs} == {"done"} and holder(run / LOCK) is None
    return f"{count} pairs of programs of each kind: {dict(sorted(happened.items()))}"


def main(argv: list[str]) -> int:
    """Run the campaign; an AssertionError tells what did not survive."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills", description=__doc__)
    parser.add_argument("--prepare", type=int, default=0)
    parser.add_argument("--train", type=int, default=0)
    parser.add_argument("--study", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    parts = {"prepare": kill_preparations, "train": kill_runs, "study": kill_studies, "pairs": pairs}
    for name, part in parts.items():
        if number := getattr(options, name):
            folder, began = Path(tempfile.mkdtemp(prefix=f"kills-{name}-")), time.monotonic()
            print(
                f"{part(folder, number, random.Random(options.seed))}, in {(time.monotonic() - began) / 60:.0f} min", flush=True
            )
            shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
