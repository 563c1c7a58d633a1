"""What the ranks run when `megatron_synth.cli.main` alone is not enough: the same, with faults put in from outside."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Piece = tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]


def rank() -> int:
    """Rank of this process."""
    return int(os.environ.get("RANK", 0))


def initial_weights(config_path: str, settings: list[str]) -> list[Piece]:
    """This rank's pieces of the untrained model: name, shape of the whole, place in it, values (in as many axes)."""
    from megatron_synth.config.load import load_file
    from megatron_synth.config.schema import Config
    from megatron_synth.data.loading.run_data import open_data
    from megatron_synth.model.run_plan import decide
    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import plan

    config = load_file(Config, config_path, settings)
    layout = plan(config, int(os.environ.get("WORLD_SIZE", 1)))
    pieces: list[Any] = []
    decided = decide(config, layout)
    with process_group(layout, config.train.seed):
        from megatron_synth.model.build import build_model
        from megatron_synth.model.init import parameter_shards

        for chunk in build_model(decided, open_data(config).vocab_size):
            for shard in parameter_shards(chunk):
                values = shard.data.detach().float().numpy()
                lead = (1,) * shard.prepend_axis_num
                pieces.append((shard.key, shard.global_shape, shard.global_offset, values.reshape(lead + values.shape)))
    return pieces


def differences(left: str, right: str) -> tuple[int, list[str]]:
    """Tensors of two checkpoints, weights and optimizer states: how many, and the names of those not bit-equal."""
    import torch
    from megatron.core import dist_checkpointing

    def flat(value: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {name: value}
        return {key: leaf for part, inner in value.items() for key, leaf in flat(inner, f"{name}/{part}").items()}

    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, torch.Tensor):
            return isinstance(y, torch.Tensor) and x.dtype == y.dtype and torch.equal(x, y)
        return bool(x == y)

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    a, b = (flat(dist_checkpointing.load_plain_tensors(path)) for path in (left, right))
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    return sum(isinstance(x, torch.Tensor) for x in a.values()), [name for name in sorted(a) if not equal(a[name], b[name])]


def train_with_signals(arguments: list[str], signals: Sequence[tuple[int, str, int]]) -> int:
    """Train; rank r gets each signal (r, when, number).

    `when` is "step N" (while it reads data), "batch N" (of all evaluations, before it) or "save".
    """
    from megatron_synth.cli import main as cli
    from megatron_synth.train.checkpoint.writer import CheckpointWriter
    from megatron_synth.train.loop import Trainer
    from megatron_synth.train.step import Pipeline

    def send(when: str) -> None:
        for target, moment, number in signals:
            if target == rank() and moment == when:
                os.kill(os.getpid(), number)

    steps = 0
    batches, begin = Trainer._batches, CheckpointWriter.begin

    def batches_with_signal(self: Any) -> Any:
        nonlocal steps
        steps += 1
        send(f"step {steps}")
        return batches(self)

    def begin_with_signal(*args: Any) -> None:
        send("save")
        begin(*args)

    evaluated = 0
    forward = Pipeline.forward

    def forward_with_signal(self: Any, *args: Any, backward: bool) -> Any:
        nonlocal evaluated
        if not backward:
            evaluated += 1
            send(f"batch {evaluated}")
        return forward(self, *args, backward=backward)

    Pipeline.forward = forward_with_signal  # type: ignore[assignment, method-assign]
    Trainer._batches = batches_with_signal  # type: ignore[assignment, method-assign]
    CheckpointWriter.begin = begin_with_signal  # type: ignore[assignment, method-assign]
    return cli.main(arguments)


def train_stopped_while_joining(arguments: list[str], port: int) -> int:
    """Train as rank 1 of 2, whose other rank never comes; asked to stop once the main thread waits for it in compiled code."""
    import sys
    import threading
    import time

    from megatron_synth.cli import main as cli

    os.environ |= {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    main = threading.main_thread().ident

    def ask() -> None:
        while "rendezvous.py" not in sys._current_frames()[main or 0].f_code.co_filename:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=ask, daemon=True).start()
    return cli.main(arguments)


def train_with_broken_evaluation(arguments: list[str], target: int, how: str) -> int:
    """Train; rank `target` fails in its first evaluation: "error", what a damaged shard raises, or "kill"."""
    from megatron_synth.cli import main as cli
    from megatron_synth.config.errors import RankError
    from megatron_synth.train import evaluate

    def broken(*args: Any) -> Any:
        if rank() == target:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RankError("val/shard-00000.bin, block 0: altered")
        return domain(*args)

    domain = evaluate._domain
    evaluate._domain = broken
    return cli.main(arguments)


def train_killed_in_save(arguments: list[str], moment: str, number: int, target: int) -> int:
    """Train; rank `target` kills itself in its save number `number`, just before what `moment` names.

    "torn shards": before the manifest, with the files of the shards cut in half, as after a loss of power.
    """
    from pathlib import Path

    from megatron_synth.cli import main as cli
    from megatron_synth.train.checkpoint import files, writer

    calls = 0

    def fatal(function: Callable[..., Any], counts: Callable[..., bool] = lambda *args: True) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if rank() == target and counts(*args):
                calls += 1
                if calls == number:
                    if moment == "torn shards":
                        for file in args[0].glob("*.distcp"):
                            os.truncate(file, file.stat().st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    Writer = writer.CheckpointWriter
    if moment == "shards":
        Writer._write_own = fatal(Writer._write_own)  # type: ignore[method-assign]
    elif moment in ("torn shards", "manifest.json"):
        files.write_manifest = fatal(files.write_manifest)
    elif moment == "trainer.json":
        counts = lambda path, _: path.name == moment  # noqa: E731
        files.write_hashed = fatal(files.write_hashed, counts)
    elif moment == "rename":
        Path.rename = fatal(Path.rename, lambda path, _: path.name.startswith("step_"))  # type: ignore[method-assign]
    elif moment == "latest":
        writer.write_atomic = fatal(writer.write_atomic)
    else:
        assert moment == "prune"
        Writer._prune = fatal(Writer._prune)  # type: ignore[method-assign]
    return cli.main(arguments)


def train_with_a_full_disk(arguments: list[str], saves: Sequence[int], target: int) -> int:
    """Train; during its saves of these numbers, rank `target` cannot write more than 100 kB to a file."""
    import resource

    from megatron_synth.cli import main as cli
    from megatron_synth.train.checkpoint.writer import CheckpointWriter

    number, write = 0, CheckpointWriter._write_own

    def limited(*args: Any, **kwargs: Any) -> Any:
        nonlocal number
        number += 1
        full = number in saves and rank() == target
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return write(*args, **kwargs)

    CheckpointWriter._write_own = limited  # type: ignore[method-assign]
    return cli.main(arguments)


def train_without_room_for_a_copy(arguments: list[str], saves: Sequence[int], target: int) -> int:
    """Train; for its saves of these numbers, rank `target` gets no memory of the host."""
    from megatron_synth.cli import main as cli
    from megatron_synth.train.checkpoint.writer import HostBuffer

    number, reserve = 0, HostBuffer.reserve

    def limited(self: Any, size: int) -> None:
        nonlocal number
        number += 1
        if number in saves and rank() == target:
            raise OSError("the host has no memory left")
        reserve(self, size)

    HostBuffer.reserve = limited  # type: ignore[method-assign]
    return cli.main(arguments)


def train_with_a_slow_disk(arguments: list[str], interval: int, steps: int) -> tuple[int, int]:
    """Train where the file of a save, every `interval` steps, is not written before the next step has begun.

    Returns:
        The exit code, and the steps that were begun while a file was written.
    """
    import threading

    from megatron_synth.cli import main as cli
    from megatron_synth.train.checkpoint.writer import CheckpointWriter
    from megatron_synth.train.loop import Trainer

    begun, saves, meanwhile = 0, 0, 0
    next_step = threading.Condition()
    write, batches = CheckpointWriter._write_own, Trainer._batches

    def slow(*args: Any, **kwargs: Any) -> Any:
        nonlocal saves
        saves += 1
        with next_step:  # after the last step none begins; and none while training waits for the file, which the count tells
            next_step.wait_for(lambda: begun > saves * interval or saves * interval == steps, timeout=10)
        return write(*args, **kwargs)

    def counted(self: Any) -> Any:
        nonlocal begun, meanwhile
        with next_step:
            meanwhile += self.writer.busy
            begun += 1
            next_step.notify_all()
        return batches(self)

    CheckpointWriter._write_own = slow  # type: ignore[method-assign]
    Trainer._batches = counted  # type: ignore[method-assign]
    return cli.main(arguments), meanwhile


def train_in_trouble(arguments: list[str], what: str, target: int, step: int) -> int:
    """Train; rank `target` is in trouble from step number `step` on, after it has read its data.

    what: "stop" and "kill" are signals to itself, "hang" a function that does not return, "raise" a bug.
    """
    import time

    from megatron_synth.cli import main as cli
    from megatron_synth.train.step import Stepper

    steps, forward = 0, Stepper.forward

    def troubled(self: Any, *args: Any, backward: bool, **kwargs: Any) -> Any:
        nonlocal steps
        steps += backward
        if rank() == target and backward and steps >= step:
            if what == "hang":
                time.sleep(600)
            elif what == "raise":
                raise ValueError("a bug")
            else:
                os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[what])
        return forward(self, *args, backward=backward, **kwargs)

    Stepper.forward = troubled  # type: ignore[method-assign]
    return cli.main(arguments)


def train_with_a_slow_rank(arguments: list[str], target: int) -> int:
    """Train, each rank on a node of its own; the clock says that a step took rank `target` 3000 s and any other 1000 s.

    So much that the seconds a busy machine really takes for the data, which come on top, do not count.
    """
    os.environ["SLURMD_NODENAME"] = f"node{rank()}"
    from megatron_synth.cli import main as cli
    from megatron_synth.train import step

    step._Clock.seconds = lambda self: 3000.0 if rank() == target else 1000.0  # type: ignore[method-assign]
    return cli.main(arguments)


def train_poisoned(arguments: list[str], what: str, target: int, steps: Sequence[int]) -> tuple[int, list[str]]:
    """Train with a NaN on rank `target` in the given steps: in its `loss`, or in one `gradient`.

    Returns:
        The exit code, and the digest of this rank's weights in each step's forward pass and after the last step.
    """
    import torch

    from megatron_synth.cli import main as cli
    from megatron_synth.train import step as step_module

    Stepper = step_module.Stepper
    forward, original_loss = Stepper.forward, step_module._loss
    digests: list[str] = []
    poisoned = False

    def digest(chunks: Any) -> str:
        value = hashlib.sha256()
        for chunk in chunks:
            for parameter in chunk.parameters():
                value.update(parameter.detach().float().numpy().tobytes())
        return value.hexdigest()

    def forward_poisoned(self: Any, *args: Any, backward: bool, **kwargs: Any) -> Any:
        nonlocal poisoned
        if not backward:
            return forward(self, *args, backward=backward, **kwargs)
        poisoned = rank() == target and len(digests) + 1 in steps
        result = forward(self, *args, backward=backward, **kwargs)
        digests.append(digest(self.chunks))  # now: with overlap_param_gather they were gathered in this forward pass
        if poisoned and what == "gradient":
            parameter = next(p for p in self.chunks[0].parameters() if p.ndim == 2)
            parameter.main_grad.view(-1)[3] = torch.nan
        poisoned = False
        kept.append(self)
        return result

    def loss_poisoned(losses: Any, **kwargs: Any) -> Any:
        if poisoned and what == "loss":
            losses = losses._replace(total=losses.total + torch.nan, per_token=losses.per_token * torch.nan)
        return original_loss(losses, **kwargs)

    kept: list[Any] = []
    Stepper.forward = forward_poisoned  # type: ignore[method-assign]
    step_module._loss = loss_poisoned
    code = cli.main(arguments)
    digests.append(digest(kept[-1].chunks))
    return code, digests


def train_on_a_full_disk(arguments: list[str], free: int) -> int:
    """Train where shutil.disk_usage reports `free` bytes."""
    import shutil

    from megatron_synth.cli import main as cli

    real = shutil.disk_usage
    shutil.disk_usage = lambda path: real(path)._replace(free=free)  # type: ignore[assignment]
    return cli.main(arguments)


# ---- jobs that test the pool itself


def place(*args: Any) -> tuple[dict[str, str | None], tuple[Any, ...]]:
    """What a job can see of its launch; prints on both streams."""
    import sys

    print(f"out {rank()}")
    print(f"err {rank()}", file=sys.stderr)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    return {name: os.environ.get(name) for name in names}, args


def misbehave(target: int, how: str) -> str:
    """Rank `target` raises, exits, hangs or dies; the others wait for it in vain."""
    import time

    if rank() == target:
        if how == "raise":
            raise ValueError("a fault in the job")
        if how == "exit":
            raise SystemExit(3)
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    return "fine"


def leave_a_mess() -> None:
    """Leave behind what a job must not hand on: environment, signal handlers, replaced names, a process group."""
    import warnings

    import torch

    from megatron_synth.train import loop

    os.environ["RANK"] = "7"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.simplefilter("error")
    loop.learning_rate = lambda *args: 0.0
    torch.manual_seed(99)
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def train_on_nodes(arguments: list[str], nodes: list[str]) -> int:
    """`megatron_synth.cli.main` as if each rank were on the node that `nodes` names for it."""
    from megatron_synth.cli.main import main

    os.environ["SLURMD_NODENAME"] = nodes[rank()]
    return main(arguments)


def read_what_megatron_writes(folder: str) -> list[str]:
    """Write a checkpoint by megatron-core's own means and read it by ours. Returns the names of tensors that differ."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import Layout

    with process_group(Layout.single(), 0):
        from megatron_synth.train.checkpoint import reading

        values = {f"layer.{number}.weight": torch.randn(4, 6 + number) for number in range(3)}
        state = {name: ShardedTensor.from_rank_offsets(name, value) for name, value in values.items()}
        Path(folder).mkdir()
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it starts a process
        dist_checkpointing.save({**state, "iteration": 3}, folder)
        wanted = reading.described(Path(folder))
        loaded = reading.load(wanted, Path(folder), "read", whole=False)
        assert loaded["iteration"] == 3 and set(wanted) == set(values)
        return [name for name, value in values.items() if not torch.equal(loaded[name], value)]


def with_small_files(words: list[str], size: int) -> int:
    """A verb while no file may grow beyond `size` bytes, which is what a full disk does, by another number."""
    import resource

    from megatron_synth.cli.main import main

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        return main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
