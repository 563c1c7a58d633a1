"""vLLM, started here: on the loopback, with a key of its own, watched, and started again when it dies."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from megatron_synth.config.errors import UserError
from megatron_synth.config.synthesis import EngineConfig
from megatron_synth.core.log import show
from megatron_synth.core.processes import end_with_parent
from megatron_synth.synthesis.engines.base import Capabilities, EngineGone, Sink
from megatron_synth.synthesis.engines.openai import HttpEngine
from megatron_synth.synthesis.engines.protocol import Shape

HOST = "127.0.0.1"
POLL_S = 0.5
GRACE_S = 20.0
KEY_VARIABLE = "VLLM_API_KEY"
SHOWN_LINES = 5
DEVICES = "CUDA_VISIBLE_DEVICES"


class VllmServer:
    """The process of a server. The key is in its environment, where other users cannot read it, and in no command line."""

    def __init__(self, model: str, revision: str | None, engine: EngineConfig, log: Path, key: str, number: int):
        """`number`: of this server among the copies; it says which GPUs are its own, and stands in the name of its log."""
        executable = shutil.which("vllm")
        if executable is None:
            raise UserError(
                "engine.name: vllm is not installed here (no `vllm` on the path); install it, or use another engine"
            )
        self.key, self._engine = key, engine
        self.log = log if number == 0 else log.with_stem(f"{log.stem}-{number}")
        self._devices = _devices(engine, number)
        self._port = _free_port()
        parallel = ("--tensor-parallel-size", str(engine.tensor_parallel_size))
        named = ("--revision", revision) if revision else ()
        where = ("--host", HOST, "--port", str(self._port))
        self._command = [executable, "serve", model, "--served-model-name", model, *where, *parallel, *named, *engine.arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._file: IO[bytes] | None = None
        self.starts = 0

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{HOST}:{self._port}/v1"

    def start(self) -> None:
        """Start it; `wait` then waits until it is healthy."""
        # others may not read it: nobody knows what a server of some version writes
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(descriptor, "ab")
        environment = {**os.environ, **self._devices, KEY_VARIABLE: self.key}
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # its own workers end with it, and a Ctrl-C is ours to handle
            preexec_fn=_end_with_us,
        )
        self.starts += 1
        self._deadline = time.monotonic() + self._engine.startup_s

    def wait(self) -> None:
        """Wait until it is healthy.

        Raises:
            UserError: it ends, or takes longer than `startup_s`.
        """
        assert self._process is not None
        while not self._is_healthy():
            code = self._process.poll()
            if code is not None:
                raise UserError(f"vllm: ended with {code} while starting; {self.log} says why, it ends with: {self._tail()}")
            if time.monotonic() > self._deadline:
                self.stop()
                raise UserError(
                    f"vllm: not ready after {self._engine.startup_s:.0f} s; see {self.log}, or raise engine.startup_s"
                )
            time.sleep(POLL_S)

    def revive(self) -> None:
        """Start it again if it has died.

        Raises:
            EngineGone: it has died too often, or does not start any more.
        """
        if self._process is not None and self._process.poll() is None:
            return
        code = None if self._process is None else self._process.returncode
        self.stop()  # what is left of its workers
        if self.starts > self._engine.restarts:
            raise EngineGone(f"vllm: died {self.starts} times, the last time with {code}; see {self.log}")
        show(f"vllm: died with {code}, starting it again ({self.starts} of {self._engine.restarts})", error=True)
        try:
            self.start()
            self.wait()
        except UserError as error:
            raise EngineGone(str(error)) from None

    def stop(self) -> None:
        """End it and its workers."""
        if self._process is not None:
            for number, wait in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(wait)
                    break
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._file is not None:
            self._file.close()
        self._process = self._file = None

    def _is_healthy(self) -> bool:
        request = urllib.request.Request(f"http://{HOST}:{self._port}/health")
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=2) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _tail(self) -> str:
        with suppress(OSError):
            lines = self.log.read_bytes()[-4096:].decode("utf-8", "replace").split("\n")
            return " | ".join([line.strip() for line in lines if line.strip()][-SHOWN_LINES:])
        return "nothing"


class Vllm:
    """The servers, and the client beside them."""

    group = 1

    def __init__(self, model: str, revision: str | None, engine: EngineConfig, shape: Shape, log: Path):
        key = secrets.token_hex(16)
        self._engine = engine
        self.servers = [VllmServer(model, revision, engine, log, key, number) for number in range(engine.copies)]
        self._client = HttpEngine(shape, engine, tuple(server.url for server in self.servers), key, self._revive)
        self._started = False
        self._reviving = threading.Lock()

    def _revive(self) -> None:
        with self._reviving:  # each server that is down asks, and all of them are looked at
            for server in self.servers:
                server.revive()

    def check(self) -> Capabilities:
        """Start the servers and ask them for their model."""
        if not self._started:
            show(f"vllm: starting, its log is {self.servers[0].log}", error=True)
            for server in self.servers:  # they load the model side by side
                server.start()
            for server in self.servers:
                server.wait()
            self._started = True
        return self._client.check()

    def run(self, requests: Any, sink: Sink, max_tokens: int) -> None:
        """As the client does."""
        self._client.run(requests, sink, max_tokens)

    def facts(self) -> dict[str, Any]:
        """As the client's, with the degree of tensor parallelism."""
        return {**self._client.facts(), "tensor_parallel_size": self._engine.tensor_parallel_size}

    def close(self) -> None:
        """Stop the servers."""
        for server in self.servers:
            server.stop()


def _devices(engine: EngineConfig, number: int) -> dict[str, str]:
    """The GPUs of a copy, for its environment: the next ones of those that are here. A single copy sees all."""
    if engine.copies == 1:
        return {}
    size = engine.tensor_parallel_size
    seen = os.environ.get(DEVICES, "").split(",")
    devices = seen if seen != [""] else [str(device) for device in range(engine.copies * size)]
    if len(devices) < engine.copies * size:
        raise UserError(
            f"engine.copies: {engine.copies} servers of {size} GPUs need {engine.copies * size}, {DEVICES} has {len(devices)}"
        )
    return {DEVICES: ",".join(devices[number * size : (number + 1) * size])}


def _end_with_us() -> None:
    """In the process of the server: it must not keep the GPU when this program is killed."""
    end_with_parent(signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        port: int = found.getsockname()[1]
    return port
