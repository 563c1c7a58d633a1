"""Servers with the OpenAI API: asynchronous, bounded by what they can take, patient with their failures.

Each request is answered at most once and never lost: it is in flight, waits for another attempt, has been given to the sink,
or stays unanswered after its last attempt. A server that fails several times in a row gets no requests until it answers a
probe. When all fail and none has answered a request for `patience_s`, the engine is gone. The key comes from the environment
and is struck out of whatever is shown.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.config.synthesis import EngineConfig
from megatron_synth.core.log import show
from megatron_synth.core.records import parse_json
from megatron_synth.synthesis.answers.parts import REFUSED, Answer
from megatron_synth.synthesis.engines.base import Capabilities, EngineGone, Sink, StopAsking
from megatron_synth.synthesis.engines.http import Address, Broken, Connection, NotConnected, Reply, get
from megatron_synth.synthesis.engines.protocol import (
    BUSY,
    FATAL,
    REFUSALS,
    BadAnswer,
    Shape,
    parse_answer,
    queue_of,
    said,
)
from megatron_synth.synthesis.engines.server import Server
from megatron_synth.synthesis.requests import Request

LONGEST_BACKOFF_S = 60.0
PROBE_TIMEOUT_S = 5.0
METRICS_EVERY_S = 1.0
SURE = 3
"""Replies in a row from which a server's own name of the model is taken."""
SHOWN_NAME = 80
"""Characters of the name of a model that a server has."""


@dataclass(order=True)
class Waiting:
    """A request that is to be sent again. at: not before this moment. attempts: how often it has failed."""

    at: float
    order: int
    request: Request = field(compare=False)
    attempts: int = field(compare=False)


class HttpEngine:
    """Requests over HTTP."""

    group = 1

    def __init__(
        self,
        shape: Shape,
        engine: EngineConfig,
        servers: tuple[str, ...],
        key: str | None,
        revive: Callable[[], None] | None = None,
    ):
        """`revive`: starts a server again that has died; called before each probe."""
        self._shape, self._settings, self._key, self._revive = shape, engine, key, revive
        self._addresses = tuple(Address(_with_version(server), key) for server in servers)
        self._answers_as: str | None = None
        self._other_names: list[str] = []
        """What the first replies called the model, as long as none has the name that was asked for."""

    def check(self) -> Capabilities:
        """All servers are there and have the model.

        Raises:
            UserError: one is not, or has not.
        """
        try:
            import httptools  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"engine.name: httptools is not installed ({error}); pip install 'megatron-synth[synthesis]'"
            ) from None
        contexts = asyncio.run(self._check_all())
        known = [context for context in contexts if context is not None]
        return Capabilities(min(known) if known else None, None)

    async def _check_all(self) -> list[int | None]:
        return [await self._check(address) for address in self._addresses]

    async def _check(self, address: Address) -> int | None:
        """The context of the model at a server, where it tells."""
        url = address.url
        reply, error = await self._get(address, "/models")
        if reply is None:
            raise UserError(f"engine.servers: {url}: no answer ({error}); start the server, or correct the address")
        status = reply.status
        if status in FATAL and status != 404:
            raise UserError(self._refused(url, status, reply.body))
        try:
            found = {one["id"]: _context(one) for one in parse_json(reply.body)["data"]} if status == 200 else None
        except (ValueError, LookupError, TypeError, AttributeError):
            found = None
        if found is None:
            raise UserError(
                f"engine.servers: {url}/models answers with status {status}, which is no OpenAI API; correct the address"
            )
        if self._shape.model not in found:
            names = ", ".join(f"{name!s:.{SHOWN_NAME}}" for name in list(found)[:5])
            raise UserError(
                f"generator.model: {url} has no model {self._shape.model!r}, it has {names or 'none'}; name one of these"
            )
        return found[self._shape.model]

    def _refused(self, url: str, status: int, body: bytes) -> str:
        variable = self._settings.key_variable
        fix = {404: "check generator.model and engine.servers"}.get(
            status, f"check the key in {variable}" if variable else "set engine.key_variable to the variable that holds the key"
        )
        return f"engine.servers: {url}: {FATAL[status]} (status {status}: {self._plain(said(body))}); {fix}"

    def _plain(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    def is_of_model(self, named: str | None) -> bool:
        """Whether a reply comes from the model that was asked, given what it calls it.

        A server may have a name of its own for it: one that comes in the first replies alone, and in several. Until then such
        a reply counts as another model's, and its request is asked again.
        """
        if named is None or named == self._shape.model:
            self._other_names = [""] * SURE if named is not None and self._answers_as is None else self._other_names
            return True
        if self._answers_as is None and len(self._other_names) < SURE:
            self._other_names = [*(name for name in self._other_names if name == named), named]
            if len(self._other_names) == SURE:
                self._answers_as = named
        return named == self._answers_as

    async def _get(self, address: Address, path: str) -> tuple[Reply | None, str]:
        """The reply; without one, what went wrong."""
        try:
            return await get(address, path, PROBE_TIMEOUT_S), ""
        except (NotConnected, Broken) as error:
            return None, self._plain(str(error))

    def run(self, requests: Iterator[Request], sink: Sink, max_tokens: int) -> None:
        """Answer requests; several at a time, in whatever order answers come."""
        try:
            import uvloop
        except ImportError:
            asyncio.run(_Run(self, requests, sink, max_tokens).go())
        else:
            uvloop.run(_Run(self, requests, sink, max_tokens).go())

    def facts(self) -> dict[str, Any]:
        """Which API, and what servers call the model; their addresses say nothing about the text."""
        found = {"engine": self._settings.name, "api": self._shape.api}
        return found if self._answers_as is None else {**found, "answers_as": self._answers_as}

    def close(self) -> None:
        """Nothing was started."""


class _Run:
    """One run of requests through the servers."""

    def __init__(self, engine: HttpEngine, requests: Iterator[Request], sink: Sink, max_tokens: int):
        self._engine, self._requests, self._sink, self._max_tokens = engine, requests, sink, max_tokens
        self._settings = engine._settings
        self._again: list[Waiting] = []
        self._in_flight = 0
        self._exhausted = self._stopping = self._full = False
        self._failure: BaseException | None = None
        self._done = asyncio.Event()
        self._came: list[tuple[Request, Answer]] = []

    async def go(self) -> None:
        """Until all is answered, or cannot be.

        Raises:
            EngineGone, UserError: as `Engine.run` says.
        """
        settings = self._settings
        self._servers = [
            Server(address, settings.concurrency, settings.breaker, settings.queue) for address in self._engine._addresses
        ]
        workers = [self._worker(server, number) for server in self._servers for number in range(settings.concurrency)]
        watchers = [self._watch(server) for server in self._servers]
        tasks = [asyncio.ensure_future(one) for one in (*workers, *watchers, self._patience())]
        try:
            await self._done.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._flush()
        if self._failure is not None:
            raise self._failure

    def _end(self, failure: BaseException | None = None) -> None:
        if self._failure is None:
            self._failure = failure
        self._done.set()

    def _next(self) -> Waiting | None:
        """The next request to send: one that waits for another attempt, or a new one."""
        if self._again and self._again[0].at <= time.monotonic():
            return heapq.heappop(self._again)
        if not self._exhausted:
            try:
                request = next(self._requests, None)
            except StopAsking:
                self._stopping, self._again, request = True, [], None
            if request is not None:
                return Waiting(0.0, request.order, request, 0)
            self._exhausted = True
        return None

    async def _worker(self, server: Server, number: int) -> None:
        connection = Connection(server.address)
        head = server.address.head("POST", self._engine._shape.path)
        try:
            while not self._done.is_set():
                if not server.may_send(number):
                    await server.changed.wait()
                    continue
                waiting = self._next()
                if waiting is None:
                    if not self._again and not self._in_flight:
                        self._end()
                        return
                    await self._rest()
                    continue
                server.in_flight += 1
                self._in_flight += 1
                try:
                    await self._send(server, connection, head, waiting)
                finally:
                    server.in_flight -= 1
                    self._in_flight -= 1
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a fault of the sink, such as a full disk, or of the requests: told by the run
            self._end(error)
        finally:
            connection.close()

    async def _rest(self) -> None:
        """Until the next request may be sent again, or others are done."""
        due = self._again[0].at - time.monotonic() if self._again else 0.05
        await asyncio.sleep(min(max(due, 0.005), 0.25))

    async def _send(self, server: Server, connection: Connection, head: bytes, waiting: Waiting) -> None:
        engine, request = self._engine, waiting.request
        start = time.perf_counter()
        body = engine._shape.body(request, self._max_tokens)
        try:
            reply = await connection.ask(b"%b%d\r\n\r\n%b" % (head, len(body), body), self._settings.timeout_s)
        except NotConnected as error:
            server.failed(f"no connection: {error}")
            self._later(waiting, counts=False)  # it never saw the request
            return
        except Broken as error:
            server.failed(str(error))
            self._later(waiting)
            return
        status, body, after = reply.status, reply.body, reply.after
        if status == 200:
            try:
                answer, model = parse_answer(body, engine._shape.api, time.perf_counter() - start)
                if not engine.is_of_model(model):
                    raise BadAnswer(f"of the model {model!r:.80}")
            except BadAnswer as error:
                server.failed(f"an answer that is none: {engine._plain(str(error))}")
                self._later(waiting)
                return
            server.succeeded()
            self._keep(request, answer)
        elif status in REFUSALS:
            server.succeeded()
            told = f"status {status}: {engine._plain(said(body))}"
            self._keep(request, Answer(told, REFUSED, None, None, 0, time.perf_counter() - start))
        elif status in FATAL:
            self._end(UserError(engine._refused(server.url, status, body)))
        elif status in BUSY:
            server.busy()
            self._later(waiting, counts=False, after=_seconds(after))
        else:
            server.failed(f"status {status}: {engine._plain(said(body))}")
            self._later(waiting, after=_seconds(after))

    def _keep(self, request: Request, answer: Answer) -> None:
        """Give an answer to the sink, together with those that came at the same moment."""
        if not self._came:
            asyncio.get_running_loop().call_soon(self._flush)
        self._came.append((request, answer))

    def _flush(self) -> None:
        came, self._came = self._came, []
        if came and not self._full:
            try:
                self._sink(came)
            except BaseException as error:  # such as a full disk: told by the run, with what was kept until then
                self._full = True
                self._end(error)

    def _later(self, waiting: Waiting, counts: bool = True, after: float | None = None) -> None:
        """Send it again after a pause, unless its attempts are used up."""
        attempts = waiting.attempts + counts
        if attempts >= self._settings.attempts or self._stopping:
            return  # it stays unanswered
        backoff = min(self._settings.backoff_s * 2 ** min(attempts, 30), LONGEST_BACKOFF_S)
        # spread by the seed, so that requests that failed together do not come back together
        backoff *= 0.5 + (waiting.request.seed % 1024) / 1024
        pause = backoff if after is None else max(after, backoff)
        heapq.heappush(self._again, Waiting(time.monotonic() + pause, waiting.order, waiting.request, attempts))

    async def _watch(self, server: Server) -> None:
        """Probe a server that is down, and read the queue of one that is up."""
        tells = True
        while not self._done.is_set():
            if server.down:
                await asyncio.sleep(server.pause())
                if self._engine._revive is not None:
                    try:
                        await asyncio.to_thread(self._engine._revive)
                    except (UserError, EngineGone) as failure:
                        self._end(failure)
                        return
                reply, _ = await self._engine._get(server.address, "/models")
                if reply is not None and reply.status == 200:
                    server.up()
                continue
            await asyncio.sleep(METRICS_EVERY_S)
            if tells:
                reply, _ = await self._engine._get(server.root, "/metrics")
                told = reply is not None and reply.status == 200
                queue = queue_of(reply.body.decode("utf-8", "replace")) if told and reply is not None else None
                tells = reply is None or queue is not None
                if queue is not None:
                    server.told(queue[1])

    async def _patience(self) -> None:
        """End the run when no server has been there for long."""
        told = False
        while not self._done.is_set():
            await asyncio.sleep(min(0.25, self._settings.patience_s / 4))
            failing = [server.failing_since for server in self._servers]
            if None in failing:
                told = False
                continue
            waited = time.monotonic() - max(since for since in failing if since is not None)
            reasons = "; ".join(f"{server.url}: {server.last_failure}" for server in self._servers)
            if not told and all(server.down for server in self._servers):
                told = True
                show(f"no server answers, waiting up to {self._settings.patience_s:.0f} s ({reasons})", error=True)
            if waited >= self._settings.patience_s:
                self._end(EngineGone(f"no server has answered for {self._settings.patience_s:.0f} s ({reasons})"))
                return


def _context(model: dict[str, Any]) -> int | None:
    """The context of a model in a list of models, where it is told: by vLLM, or by llama.cpp's server."""
    meta = model.get("meta")
    for value in (model.get("max_model_len"), meta.get("n_ctx") if isinstance(meta, dict) else None):
        if isinstance(value, int) and value > 0:
            return value
    return None


def _seconds(retry_after: str | None) -> float | None:
    """The number in a Retry-After header; None for none, for a date, and for what would stop the run."""
    with suppress(ValueError):
        if retry_after is not None and 0 <= (seconds := float(retry_after)) <= LONGEST_BACKOFF_S:
            return seconds
    return None


def _with_version(server: str) -> str:
    url = server.rstrip("/")
    return url if url.endswith("/v1") else url + "/v1"


def key_of(engine: EngineConfig) -> str | None:
    """The key that the environment holds.

    Raises:
        UserError: it is to hold one and does not.
    """
    if engine.key_variable is None:
        return None
    key = os.environ.get(engine.key_variable, "").strip()
    if not key:
        raise UserError(
            f"engine.key_variable: the environment has no {engine.key_variable}; export it, a key stands in no file"
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(f"engine.key_variable: {engine.key_variable} holds no key that a header can carry")
    return key
