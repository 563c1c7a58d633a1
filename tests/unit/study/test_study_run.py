"""Studies that really train: killed, resumed, failed and retried; models of some thousand parameters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_synth.cli.study import main
from megatron_synth.config.errors import EXIT_STOPPED, UserError
from megatron_synth.study.execute import worker
from megatron_synth.study.execute.folder import Folder
from megatron_synth.study.execute.local import Progress, Slots
from megatron_synth.study.plan.runs import Run, expand
from megatron_synth.study.plan.study_file import load_study
from tests.support import ROOT, read_metrics, write_source
from tests.unit.study.test_study_file import study_of

STEPS = 60
TOKENS = STEPS * 4 * 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for seed, name in enumerate(("web", "qa")):
        write_source(folder / name, seed, 20_000)
    write_source(folder / "val", 9, 400)
    return folder


def write(corpus: Path, output: Path, **changes: Any) -> Path:
    """A study of four runs of 60 steps, on prepared sources."""
    content = study_of(
        corpus,
        output=str(output),
        sizes={"s": study_of(corpus)["sizes"]["s"]},
        arms={"natural": {"web": 1}, "synthetic": {"qa": 1}},
        grid=[{"tokens": [TOKENS]}],
        validation={"val": {"path": str(corpus / "val")}},
        **changes,
    )
    content["protocol"] |= {"checkpoint": {"interval": 20}, "log": {"interval": 10}}
    file = output.parent / f"{output.name}.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def opened(file: Path) -> tuple[Folder, list[Run]]:
    study = load_study(file)
    return Folder(study.folder), expand(study)


def command(*arguments: str) -> tuple[list[str], dict[str, str]]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return [sys.executable, "-m", "megatron_synth", "study", *arguments], environment


def submit(file: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words, environment = command("submit", str(file), "--local", *more)
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)


def losses(folder: Folder, run: Run) -> list[float]:
    return [record["train/loss"] for record in read_metrics(folder.run(run))]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, list[Run]]:
    """The study, not interrupted, one run at a time; it keeps its checkpoints."""
    file = write(corpus, tmp_path_factory.mktemp("whole") / "study", keep_checkpoints=True)
    done = submit(file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 runs finished, 0 failed" in done.stdout and "| eta 0:00:00" in done.stdout
    return opened(file)


@pytest.mark.slow
def test_results_say_what_was_trained(whole: tuple[Folder, list[Run]]) -> None:
    folder, runs = whole
    for run in runs:
        result = folder.result(run)
        assert result is not None and folder.state(run) == "done"
        assert (result["id"], result["tokens"], result["steps"]) == (run.id, TOKENS, STEPS)
        assert result["tokens_evaluated"] == {"val": 384} and 0 < result["loss"]["val"] < 6
        tokens = {name: source["tokens"] for name, source in result["sources"].items()}
        assert tokens == dict.fromkeys(run.config.data.sources, TOKENS)
        assert result["flops"] == run.flops(result["vocab_size"])
    by_arm = {run.arm: losses(folder, run) for run in runs if run.seed == 1}
    assert len(by_arm["natural"]) == STEPS and by_arm["natural"] != by_arm["synthetic"]
    # one seed is one model: before the first update only the text differs, and the loss is that of a uniform guess
    assert abs(by_arm["natural"][0] - by_arm["synthetic"][0]) < 0.05


@pytest.mark.slow
def test_kill_9_in_the_middle_then_the_same_command(
    corpus: Path, whole: tuple[Folder, list[Run]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(corpus, tmp_path / "study")
    folder, runs = opened(file)
    words, environment = command("submit", str(file), "--local", "--jobs", "2")
    with open(tmp_path / "log", "w") as log:
        parent = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 600  # to end, not to judge
        while not any(25 <= folder.steps_done(run) < STEPS for run in runs):
            assert parent.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    # the children are signaled by the kernel, save, and leave; none is left that would write beside its successor
    while any(folder.is_locked(run) for run in runs):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = {run.id: folder.state(run) for run in runs}
    assert "stopped" in before.values() and not {"running", "failed"} & set(before.values())
    assert main(["status", str(file), "--runs"]) == 0
    assert "stopped" in capsys.readouterr().out
    finished = [folder.run(run) / "result.json" for run in runs if before[run.id] == "done"]
    stamps = [path.stat().st_mtime_ns for path in finished]

    again = submit(file, "--jobs", "2")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{len(finished)} finished already" in again.stdout
    assert [path.stat().st_mtime_ns for path in finished] == stamps, "a finished run is not run twice"
    resumed = [run for run in runs if before[run.id] == "stopped"]
    for run in resumed:
        starts = json.loads((folder.run(run) / "run.json").read_text())["starts"]
        assert starts[-1]["resumed_from_step"] >= 20
    for run in runs:
        assert losses(folder, run) == losses(whole[0], run), "to the bit, as if nothing had happened"
        assert not (folder.run(run) / "checkpoints").exists()
    third = submit(file)
    assert third.returncode == 0 and "0 runs to train, 4 finished already" in third.stdout


@pytest.mark.slow
def test_a_failed_run_holds_up_no_other_and_is_retried(corpus: Path, tmp_path: Path) -> None:
    file = write(corpus, tmp_path / "study", seeds=[1])
    folder, runs = opened(file)
    obstacle = folder.run(runs[0])
    obstacle.mkdir(parents=True)
    (obstacle / "something").write_text("else")
    first = submit(file)
    assert first.returncode == 1
    assert f"{runs[0].name} FAILED" in first.stdout and "not a run directory" in first.stdout
    assert [folder.state(run) for run in runs] == ["failed", "done"]
    failure = folder.failure(runs[0])
    assert failure is not None and failure["attempts"] == 1 and failure["exit_code"] == 2
    (obstacle / "something").unlink()
    second = submit(file, "description=again")
    assert second.returncode == 0 and "1 runs to train, 1 finished already" in second.stdout
    assert [folder.state(run) for run in runs] == ["done", "done"] and folder.failure(runs[0]) is None


@pytest.mark.slow
def test_the_report_of_real_runs(whole: tuple[Folder, list[Run]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, runs = whole
    file = folder.path.parent / f"{folder.path.name}.yaml"
    assert main(["report", str(file), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "index.html").read_text()
    assert f"{len(runs)} of {len(runs)}" in text and all(f"run-{run.id}" in text for run in runs)
    result = folder.run(runs[0]) / "result.json"
    kept = result.read_text()
    result.write_text("{")
    try:
        with pytest.raises(UserError, match=r"result\.json: damaged: not valid JSON"):
            main(["report", str(file), "--out", str(tmp_path)])
    finally:
        result.write_text(kept)


@pytest.mark.slow
def test_only_some_runs(corpus: Path, tmp_path: Path) -> None:
    file = write(corpus, tmp_path / "study")
    (tmp_path / "some.txt").write_text("nobody\n")
    with pytest.raises(UserError, match="no run of the study is called nobody"):
        main(["submit", str(file), "--local", "--only", str(tmp_path / "some.txt")])
    with pytest.raises(SystemExit, match="2"):
        main(["submit", str(file), "--local", "--jobs", "0"])
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_a_size_that_does_not_fit_here_is_refused(corpus: Path, tmp_path: Path) -> None:
    file = write(corpus, tmp_path / "study")
    with pytest.raises(UserError, match="sizes s need 2 ranks, here are 1"):
        main(["submit", str(file), "--local", "sizes.s.ranks=2"])


@pytest.mark.slow
def test_slots_are_given_once() -> None:
    slots = Slots(True, [0, 1, 2, 3])
    first, second = slots.take(2), slots.take(1)
    assert (first, second) == ([0, 1], [2]) and slots.take(2) is None
    slots.give_back(first or ())
    assert slots.take(3) == [0, 1, 3]


@pytest.mark.slow
def test_the_time_left_follows_what_was_measured(corpus: Path, tmp_path: Path) -> None:
    folder, runs = opened(write(corpus, tmp_path / "study"))
    progress = Progress(folder, runs, 256)
    assert progress.eta_s(runs, {}, 1) != progress.eta_s(runs, {}, 1)  # not a number: nothing is known yet
    progress.finished(runs[0], 10.0, TOKENS)
    assert progress.eta_s(runs[1:], {}, 1) == pytest.approx(30)
    assert progress.eta_s(runs[1:], {runs[1].id: STEPS // 2}, 2) == pytest.approx(12.5)


def _ask_parent_to_stop(folder: Folder, run: Run, devices: Any, keep: bool, parent: int) -> int:
    """A run that asks for Ctrl-C, and saves when it is asked to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    os.kill(parent, signal.SIGINT)
    signal.sigwait({signal.SIGTERM})
    return EXIT_STOPPED


def _insist(*arguments: Any) -> int:
    """One that does not leave, and asks for a second Ctrl-C."""
    _ask_parent_to_stop(*arguments)
    os.kill(arguments[-1], signal.SIGINT)
    while True:
        signal.pause()


@pytest.mark.parametrize("work", [_ask_parent_to_stop, _insist])
@pytest.mark.usefixtures("unheard")
def test_ctrl_c_lets_runs_save_and_a_second_one_ends_them(
    work: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "work", work)
    monkeypatch.setattr(worker, "import_once", lambda generates: None)
    file = write(corpus, tmp_path / "study")
    before = signal.getsignal(signal.SIGINT)
    assert main(["submit", str(file), "--local"]) == 75
    assert signal.getsignal(signal.SIGINT) == before
    printed = capsys.readouterr().out
    assert "asked to stop: running runs save and leave; Ctrl-C again ends them at once" in printed
    assert "finished runs are kept, others go on from their checkpoints; the same command goes on" in printed
    folder, runs = opened(file)
    assert {folder.state(run) for run in runs} == {"to do"}  # nothing failed
