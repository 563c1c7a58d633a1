"""The real launcher, and real processes that import everything by themselves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from megatron_synth.cluster.status import status
from megatron_synth.train.checkpoint import files
from tests.dist.conftest import Run
from tests.support import ROOT, assert_same_losses, checkpoint_names, read_metrics


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return environment | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _start(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], env=_environment(), capture_output=True, text=True, timeout=240)


def _torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return _start(*launcher, "-m", "megatron_synth", "train", *arguments)


def test_torchrun_trains(config: Path, trained: Callable[..., Run], tmp_path: Path) -> None:
    run = tmp_path / "run"
    # the schedule depends on the number of steps, but not within the warm-up
    result = _torchrun(str(config), "train.steps=3", "--run-dir", str(run))
    assert result.returncode == 0, result.stderr
    assert "TP1 x PP1 x DP2, 2 ranks" in result.stdout and "done at step 3" in result.stdout
    assert result.stdout.count("done at step 3") == 1
    for noise in ("Warning", "WARNING:megatron", "Unknown MLP"):
        assert noise not in result.stderr, result.stderr
    reference = [dict(record) for record in trained("dp2").records[:3]]
    records = [{k: v for k, v in record.items() if not k.startswith("eval/")} for record in read_metrics(run)]
    assert_same_losses(records, reference, 0)
    assert checkpoint_names(run) == ["step_00000003"]
    assert json.loads((run / "run.json").read_text())["world_size"] == 2


def test_torchrun_shows_one_readable_error(config: Path, tmp_path: Path) -> None:
    result = _torchrun(str(config), "train.global_batch_size=6", "--run-dir", str(tmp_path / "run"))
    assert result.returncode == 1  # torchrun's own, whatever its ranks return
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 1
    assert "train.global_batch_size: 6 is not divisible by micro_batch_size 2 x 2" in result.stderr
    assert "megatron_synth/" not in result.stderr  # no traceback through our code
    assert not (tmp_path / "run").exists()


def test_a_single_process_needs_no_launcher(config: Path, trained: Callable[..., Run], tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = _start("-m", "megatron_synth", "train", str(config), "train.steps=3", "--run-dir", str(run))
    assert (result.returncode, result.stderr) == (0, "")
    records = [{k: v for k, v in record.items() if not k.startswith("eval/")} for record in read_metrics(run)]
    assert_same_losses(records, trained("single").records[:3], 0)


def test_the_launch_script_stops_and_resumes(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("optim.schedule=constant", "checkpoint.interval=null", "log.interval=1")
    script = [str(ROOT / "launch" / "local.sh"), "2", str(config), *settings, "--run-dir", str(run)]
    with subprocess.Popen(
        [*script, "train.steps=400", "data.sources.web.max_epochs=.inf", "data.sources.qa.max_epochs=.inf"],
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3/400"):
                process.send_signal(signal.SIGUSR1)
                break
        rest = process.stdout.read()
        assert process.wait(timeout=120) == 75, rest
    records = read_metrics(run)
    stopped = int(records[-1]["step"])
    assert 3 <= stopped < 400 and checkpoint_names(run) == [f"step_{stopped:08d}"]
    wrong = subprocess.run([*script, "train.global_batch_size=6"], env=_environment(), capture_output=True, text=True)
    assert wrong.returncode == 2 and "train.global_batch_size" in wrong.stderr
    endless = ("data.sources.web.max_epochs=.inf", "data.sources.qa.max_epochs=.inf")
    again = subprocess.run(
        [*script, f"train.steps={stopped + 2}", *endless], env=_environment(), capture_output=True, text=True, timeout=240
    )
    assert again.returncode == 0, again.stderr
    assert [record["step"] for record in read_metrics(run)] == list(range(1, stopped + 3))


def test_ranks_end_with_a_launcher_that_is_killed_and_the_next_start_takes_over(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("optim.schedule=constant", "checkpoint.interval=2", "log.interval=1", "eval.interval=null")
    settings += ("data.sources.web.max_epochs=.inf", "data.sources.qa.max_epochs=.inf")
    script = [str(ROOT / "launch" / "local.sh"), "2", str(config), *settings, "--run-dir", str(run)]
    with subprocess.Popen(
        [*script, "train.steps=100000"], env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 5/"):
                break
        (agent,) = [child for child in psutil.Process(process.pid).children() if "agent" in " ".join(child.cmdline())]
        ranks = agent.children()
        assert len(ranks) == 2
        second = _start("-m", "megatron_synth", "train", str(config), *settings, "--run-dir", str(run))
        assert second.returncode == 2 and "in use by `megatron-synth train` of " in second.stderr, second.stderr
        assert re.search(rf"pid ({'|'.join(str(rank.pid) for rank in ranks)}), since", second.stderr)
        agent.kill()
        rest = process.stdout.read()
        assert process.wait(timeout=120) == 70, rest
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive and "the launcher, and its ranks with it, ended by signal 9; the same command resumes" in rest
    assert status(run, {}).state == "killed"
    more = files.step_of(files.candidates(run)[0]) + 2
    again = _start("-m", "megatron_synth", "train", str(config), *settings, f"train.steps={more}", "--run-dir", str(run))
    assert again.returncode == 0, again.stderr
    assert "died without a word; its lock is taken over" in again.stderr
    assert "the start before this one died without a word" in (run / "events.log").read_text()
    assert status(run, {}).state == "done" and not (run / ".lock").exists()


_LISTENING = """
import os, pathlib, sys, torch
torch.distributed.init_process_group("gloo")
open_now = set()
for pid in (os.getpid(), os.getppid()):
    for link in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        try:
            open_now.add(os.readlink(link))
        except OSError:
            continue
for table in ("tcp", "tcp6"):
    for line in pathlib.Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in open_now:
            print("listens", fields[1].partition(":")[0])
print("secret", len(os.environ["MEGATRON_SYNTH_SECRET"]))
torch.distributed.destroy_process_group()
"""


def test_nothing_listens_on_a_network_on_one_machine(tmp_path: Path) -> None:
    (tmp_path / "look.py").write_text(_LISTENING)
    result = _start("-m", "megatron_synth.cluster.agent", "--local", "--nproc-per-node", "1", str(tmp_path / "look.py"))
    assert result.returncode == 0, result.stderr
    assert {line for line in result.stdout.splitlines() if line.startswith("listens")} == {"listens 0100007F"}, result.stdout
    assert "secret 64" in result.stdout
