"""One run, or one corpus, in a process of its own, forked from one that has imported the engine.

Many small runs would otherwise spend their time on imports. A run that needs several ranks is started by torchrun.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_synth.config.errors import EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from megatron_synth.config.load import shipped, to_yaml
from megatron_synth.config.schema import Config
from megatron_synth.core.files import write_atomic
from megatron_synth.core.log import show
from megatron_synth.core.processes import end_with_parent
from megatron_synth.study.execute.folder import Folder, Job, write_result
from megatron_synth.study.plan.corpora import Corpus
from megatron_synth.study.plan.runs import Run
from megatron_synth.study.plan.study_file import Study

EXIT_FAILED = 1
EXIT_TAKEN = 76
"""Another process works at this job."""
_cuda_is_used = False
"""Whether an import has initialized CUDA, so that a forked process cannot use it."""


def import_once(*, generates: bool = False) -> None:
    """Import what every run needs, without touching a GPU: a process that has used one cannot be forked.

    generates: also what the embedded engine needs, where it is installed.

    Where an import uses one all the same, as that of an optional library may, runs get processes of their own.
    """
    global _cuda_is_used
    # torch then counts devices through the driver's library, and does not initialize CUDA
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.pop("RANK", None)  # a launcher's environment would be taken for that of the runs
    import torch

    from megatron_synth.parallel import engine

    engine.load()
    import megatron_synth.model.build
    import megatron_synth.parallel.wrap
    import megatron_synth.train.checkpoint.resume
    import megatron_synth.train.evaluate
    import megatron_synth.train.loop  # noqa: F401

    if generates:
        with contextlib.suppress(ImportError):  # other engines need none of it, and the embedded one says what it lacks
            from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LogitsProcessorList  # noqa: F401
    _cuda_is_used = bool(torch.cuda.is_initialized())


def work(folder: Folder, run: Run, devices: Sequence[int], keep_checkpoints: bool, parent: int) -> int:
    """Train `run` to its end, or to a stop request, and write its result. The body of a forked process.

    devices: GPUs to use; empty on a CPU. parent: the process whose end, however it comes, asks this one to stop.
    Returns the exit code.
    """

    def train() -> int:
        code = _train(folder, run)
        if code == EXIT_OK and not keep_checkpoints:
            folder.drop_checkpoints(run)
        return code

    return _do(folder, run, devices, parent, train)


def make(study: Study, folder: Folder, corpus: Corpus, devices: Sequence[int], parent: int) -> int:
    """Make `corpus` to its end, or to a stop request. The body of a forked process; as `work`."""
    from megatron_synth.study.execute.making import make as made

    return _do(folder, corpus, devices, parent, lambda: made(study, folder, corpus))


def _do(folder: Folder, job: Job, devices: Sequence[int], parent: int, body: Callable[[], int]) -> int:
    """Do a job under its lock, and note how it fails."""
    _stop_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent turns Ctrl-C into a stop request
    _redirect(folder.log(job))
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
    with folder.lock(job) as mine:
        if not mine:
            return EXIT_TAKEN
        if folder.is_done(job):  # by another process, just now
            return EXIT_OK
        try:
            code = body()
        except UserError as error:
            show(f"error: {error}", error=True)
            code, message = EXIT_USER_ERROR, str(error)
        except Exception as error:  # whatever it is, the study goes on with its other runs
            traceback.print_exc()
            sys.stderr.flush()
            code, message = EXIT_FAILED, f"{type(error).__name__}: {error}"
        else:
            message = f"exit code {code}"
        if code not in (EXIT_OK, EXIT_STOPPED):
            folder.record_failure(job, code, message)
        return code


def _train(folder: Folder, run: Run) -> int:
    from megatron_synth.data.loading.run_data import open_data
    from megatron_synth.train.checkpoint import branch

    config = branch.resolved(folder.begins(run), folder.run(run))
    data = open_data(config, staged=True)
    if run.ranks == 1 and not _cuda_is_used:
        from megatron_synth.parallel.plan import plan
        from megatron_synth.train.loop import train

        code = train(config, plan(config, 1), data, folder.run(run))
    else:
        code = _torchrun(folder, run, config)
    if code == EXIT_OK:
        write_result(folder, run, data.vocab_size, data.digest)
    return code


def _torchrun(folder: Folder, run: Run, config: Config) -> int:
    """Train in processes started again, through the launch script, which passes signals on."""
    file = folder.path / "state" / f"{run.id}.yaml"
    write_atomic(file, to_yaml(config))
    command = [str(shipped("launch") / "local.sh"), str(run.ranks), str(file), "--run-dir", str(folder.run(run))]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    process = subprocess.Popen(["bash", *command], env={**os.environ, "PATH": path})
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: process.terminate())
    code = process.wait()
    return code if code >= 0 else EXIT_FAILED


def _stop_with(parent: int) -> None:
    """Stop when the parent ends, also when it is killed."""
    end_with_parent(signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the request
        os._exit(EXIT_STOPPED)


def _redirect(log: Path) -> None:
    """Append what this process prints to its log."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
