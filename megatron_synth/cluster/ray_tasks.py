"""`prepare --ray`: splits and shards as tasks of a Ray cluster; Ray places them, and again where a node dies.

What was started here reads the input's list of splits, keeps the journal, and trains the tokenizer, as on one machine; tasks do
what worker processes of this machine would do (data/preparing/workers.py), and write into the output's folder, which all nodes
must see under the same name. A task that dies before it is told of in the journal is done again and writes the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import platform
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import megatron_synth
from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.core.log import counted, show
from megatron_synth.data.preparing.output import Unfinished
from megatron_synth.data.preparing.pipeline import Prepared
from megatron_synth.data.preparing.prepare import input_files, prepare
from megatron_synth.data.preparing.workers import Result, Task
from megatron_synth.data.tokenizer import Tokenizer

RETRIES = 20
"""How often Ray does a task again whose process or node died."""
TASKS_PER_CORE = 4  # in flight: while a lost node is found out, the others go on with these
_CONNECT_S, _LOOK_S, _REFRESH_S, _STOP_S = 10.0, 120.0, 5.0, 60.0
_LIBRARIES = ("numpy", "pyarrow", "tokenizers", "xxhash")
"""What decides the bytes beside this package."""


def prepare_on_ray(config: PrepareConfig, address: str, *, force: bool = False) -> list[Prepared] | None:
    """`prepare` by the nodes of the Ray cluster at `address`, HOST:PORT or `auto`; this machine is one of them.

    Raises:
        UserError: there is no such cluster, its nodes do not see the folders or have other versions, or what `prepare` raises.
    """
    with _connected(address) as ray:
        _check_nodes(ray, config)
        return prepare(config, force=force, start=lambda tokenizer, folder: RayPool(ray, tokenizer, folder))


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """The package `ray`, connected."""
    _check_address(address)
    if importlib.util.find_spec("ray") is None:
        raise UserError("--ray: needs the package ray; pip install 'megatron-synth[ray]' here and on each node")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray will do from some version on; else it warns
    import ray
    import ray.util.scheduling_strategies

    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError and others of its own
        raise UserError(
            f"--ray {address}: {' '.join(str(error).split())}\nrun this on a node of the cluster, with the same ray and Python"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():  # ray puts a handler of its own there
            signal.signal(signal.SIGTERM, before)
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse, within seconds, what no cluster is at; Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(
            f"--ray: expected HOST:PORT of a Ray cluster's head, such as 10.0.0.1:6379, or auto; found {address!r:.100}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except OSError as error:
        raise UserError(
            f"--ray {address}: nobody answers there ({error.strerror or error}); `ray start --head` begins a cluster, and "
            "says its address"
        ) from error


@dataclass(frozen=True)
class Versions:
    """What must be the same everywhere for the same bytes."""

    program: str
    code: str
    """Digest of this package's files."""
    python: str
    libraries: tuple[tuple[str, str], ...]

    def difference(self, other: Versions) -> str | None:
        """In words, what `other` has otherwise; None if nothing."""
        if self == other:
            return None
        ours = {"megatron-synth": self.program, "Python": self.python, **dict(self.libraries)}
        theirs = {"megatron-synth": other.program, "Python": other.python, **dict(other.libraries)}
        for name, version in ours.items():
            if theirs[name] != version:
                return f"{name} {theirs[name]}, here it is {version}"
        return f"other code of megatron-synth {self.program}"


@cache
def versions() -> Versions:
    """Those of this process."""
    total = hashlib.sha256()
    package = Path(megatron_synth.__file__).parent
    for path in sorted(package.rglob("*.py")):
        total.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    libraries = tuple((name, metadata.version(name)) for name in _LIBRARIES)
    return Versions(megatron_synth.__version__, total.hexdigest()[:16], platform.python_version(), libraries)


def _check_nodes(ray: Any, config: PrepareConfig) -> None:
    """Look from each node at the folders and versions, before any long work; says how many nodes there are.

    Raises:
        UserError: a node does not see a folder or a file, or has other versions.
    """
    on_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not nodes:
        raise UserError("--ray: no node of the cluster has a processor to give; `ray start --address` adds one")
    output = Path(config.output).absolute()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        mark = tempfile.NamedTemporaryFile(dir=output.parent, prefix=f".{output.name}.ray-")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"output: {output.parent}: {error.strerror or error}") from error
    files = input_files(config)
    with mark:
        looks = []
        for node in nodes:
            where = on_node(node["NodeID"], soft=False)
            look = ray.remote(_look).options(num_cpus=0, max_retries=0, scheduling_strategy=where)
            looks.append(look.remote(Path.cwd(), Path(mark.name), files))
        for node, future in zip(nodes, looks, strict=True):
            name = f"--ray: node {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            try:
                found, missing = ray.get(future, timeout=_LOOK_S)
            except ray.exceptions.GetTimeoutError:
                raise UserError(f"{name} did nothing in {_LOOK_S:.0f} s; look at it with `ray status`, or stop it") from None
            except ray.exceptions.RayError as error:
                last = str(error).strip().splitlines()[-1:]
                raise UserError(
                    f"{name} cannot run this program ({''.join(last)}); install the same megatron-synth there, in the Python "
                    "that `ray start` is of"
                ) from error
            difference = versions().difference(found)
            if difference is not None:
                raise UserError(f"{name} has {difference}; install the same everywhere, or stop this node")
            if missing is not None:
                raise UserError(
                    f"{name} does not see {missing}; the output and the text must be on a file system that all nodes share "
                    "under the same name (text may be in a bucket)"
                )
    cores = int(sum(node["Resources"]["CPU"] for node in nodes))
    show(f"Ray: {counted(len(nodes), 'node')}, {counted(cores, 'processor')}", error=True)


def _look(folder: Path, mark: Path, files: list[Path]) -> tuple[Versions, Path | None]:
    """What a node has: its versions, and the first of the files that it does not see. `mark` is new, beside the output."""
    if not folder.is_dir():
        return versions(), folder
    os.chdir(folder)
    if not mark.exists():
        return versions(), mark.parent
    return versions(), next((path for path in files if not path.exists()), None)


@dataclass(frozen=True)
class _Setup:
    """What a process of a node needs to know once. content: of the tokenizer, in Ray's store."""

    name: str
    versions: Versions
    working: Path
    output: Path
    content: Any
    eod: str


class RayPool:
    """Runs the tasks of a preparation on Ray. Its results come in the order of the tasks."""

    def __init__(self, ray: Any, tokenizer: Tokenizer, folder: Path):
        """folder: that tasks write to."""
        self._ray = ray
        # in a list, it is not fetched for each task
        content = [ray.put(tokenizer.content)]
        self._setup = ray.put(_Setup(tokenizer.fingerprint, versions(), Path.cwd(), folder.absolute(), content, tokenizer.eod))
        self._task = ray.remote(_work).options(num_cpus=1, max_retries=RETRIES, retry_exceptions=False)
        self._looked, self._places = -_REFRESH_S, 1

    def run(
        self, function: Callable[[Tokenizer, Task], Result], tasks: Iterable[Task]
    ) -> Generator[tuple[Task, Result], None, None]:
        """(task, function(tokenizer, task)) of each task, in their order.

        Raises:
            Unfinished: a task died again and again, or the cluster is gone.
        """
        waiting: deque[tuple[Task, Any]] = deque()
        try:
            for task in tasks:
                waiting.append((task, self._task.remote(self._setup, function, task)))
                while len(waiting) >= self._most():
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        finally:
            self._stop([future for _, future in waiting])

    def close(self) -> None:
        """Nothing is left to stop."""

    def _next(self, waiting: deque[tuple[Task, Any]]) -> tuple[Task, Any]:
        task, future = waiting[0]
        try:
            result = self._ray.get(future)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.RayError as error:
            words = " ".join(str(error).split())[:1000]
            raise Unfinished(
                f"--ray: a task was lost {RETRIES + 1} times, or the cluster is: {type(error).__name__}: {words}\nwhat is done "
                "is kept, and the same command goes on; a task that is killed for want of memory needs nodes with more of it "
                "for each processor"
            ) from error
        waiting.popleft()
        return task, result

    def _most(self) -> int:
        """Tasks in flight. Nodes come and go."""
        now = time.monotonic()
        if now - self._looked > _REFRESH_S:
            self._places, self._looked = max(1, int(self._ray.cluster_resources().get("CPU", 0))), now
        return self._places * TASKS_PER_CORE

    def _stop(self, futures: list[Any]) -> None:
        """What runs still writes to the folder, which the caller may remove."""
        if not futures or not self._ray.is_initialized():
            return
        with contextlib.suppress(self._ray.exceptions.RayError):
            for future in futures:
                self._ray.cancel(future, force=True)
            self._ray.wait(futures, num_returns=len(futures), timeout=_STOP_S)


_tokenizers: dict[str, Tokenizer] = {}


def _work(setup: _Setup, function: Callable[[Tokenizer, Any], Any], task: Any) -> Any:
    """A task, in a process of a node. The first one looks again: the node may have come later than the others."""
    if setup.name not in _tokenizers:
        import ray

        difference = setup.versions.difference(versions())
        if difference is not None:
            raise UserError(f"--ray: node {socket.gethostname()} has {difference}; stop it, and start again")
        for folder in (setup.working, setup.output):
            if not folder.is_dir():
                raise UserError(f"--ray: node {socket.gethostname()} does not see {folder}; stop it, and start again")
        os.chdir(setup.working)  # paths of the settings begin there
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one processor
        _tokenizers[setup.name] = Tokenizer(ray.get(setup.content[0]), setup.eod)
    return function(_tokenizers[setup.name], task)
