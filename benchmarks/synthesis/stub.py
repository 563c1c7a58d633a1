"""A server with the OpenAI API and no model: for tests of clients, and for measuring them. It can misbehave.

`python -m benchmarks.synthesis.stub --port 8000 --fault 500=0.1 --fault drop=0.05` answers with a text that is a function of
the prompt and the seed, except where a fault strikes: a share of the requests, drawn by the number of the request.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvloop

MODEL = "stub"
CANARY = "where it meets the road"
FAULTS = ("429", "500", "slow", "drop", "json", "truncated", "empty", "two", "model")
"""429 and 500: the status. slow: after `slow_s`. drop: the connection is closed. json: broken JSON. truncated: half a reply,
then the connection is closed. empty: an object without choices. two: two texts. model: another model's name."""
PASSAGE = re.compile(r"<(passage|keywords)>\n(.*)\n</\1>", re.DOTALL)
LINKS = ("Moreover,", "In addition,", "It follows that", "As is known,", "To be exact,", "Then")


@dataclass
class Behavior:
    """faults: shares by name. slow_s: of a slow answer. rate: answers a second at most; 0: no limit. key: asked for, if any."""

    faults: dict[str, float] = field(default_factory=dict)
    slow_s: float = 0.3
    rate: float = 0.0
    key: str | None = None
    model: str = MODEL
    context: int | None = 4096
    fixed: bool = False
    """Whether every answer is the same, so that the server costs little."""
    status: int | None = None
    """Of every answer, where it is set."""
    gate: Callable[[int], int | None] = lambda number: None
    """The status of the answer to the request of this number, from 1; None: it is answered; 0: nothing ever comes."""
    refuse: str | None = None
    """Prompts that hold this get the status 400."""
    finish: str | None = None
    """Why every answer ends, where it is set."""
    says: tuple[str, Callable[[str], str]] | None = None
    """What prompts that hold a string are answered with."""
    missing: bool = False
    """Whether it does not know its models, as a server that is starting."""


@dataclass
class Seen:
    """What the server has seen."""

    requests: int = 0
    answered: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    most: int = 0


class Stub(asyncio.Protocol):
    """One connection."""

    def __init__(self, behavior: Behavior, seen: Seen):
        self.behavior, self.seen = behavior, seen
        self._buffer = b""
        self._turn = 0.0

    def connection_made(self, transport: Any) -> None:
        """A client is there."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Bytes of one or several requests, or of a part of one."""
        self._buffer += data
        while True:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._buffer[:end]
            found = re.search(rb"(?i)content-length: *(\d+)", head)
            length = int(found[1]) if found else 0
            if len(self._buffer) < end + 4 + length:
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            self._handle(head, body)

    def _handle(self, head: bytes, body: bytes) -> None:
        method, path = head.split(b" ", 2)[:2]
        if method == b"GET":
            self._get(path)
            return
        behavior, seen = self.behavior, self.seen
        if behavior.key is not None and f"authorization: bearer {behavior.key}".encode() not in head.lower():
            self._send(401, {"error": {"message": "no such key"}})
            return
        seen.requests += 1
        seen.in_flight += 1
        seen.most = max(seen.most, seen.in_flight)
        status = behavior.status if behavior.status is not None else behavior.gate(seen.requests)
        if status is not None:
            self._done()
            if status:
                self._send(status, {"error": {"message": "always"}})
            return
        fault = _fault(behavior.faults, seen.requests)
        loop = asyncio.get_running_loop()
        delay = behavior.slow_s if fault == "slow" else 0.0
        if behavior.rate:
            seen.turn = max(getattr(seen, "turn", 0.0), time.perf_counter()) + 1 / behavior.rate  # type: ignore[attr-defined]
            delay += seen.turn - time.perf_counter()  # type: ignore[attr-defined]
        if delay > 0:
            loop.call_later(delay, self._answer, path, body, fault)
        else:
            self._answer(path, body, fault)

    def _done(self) -> None:
        self.seen.in_flight -= 1

    def _get(self, path: bytes) -> None:
        if path == b"/v1/models" and not self.behavior.missing:
            one = {"id": self.behavior.model, "object": "model", "max_model_len": self.behavior.context}
            self._send(200, {"object": "list", "data": [one]})
        elif path == b"/health":
            self._send(200, {})
        else:
            self._send(404, {})

    def _answer(self, path: bytes, body: bytes, fault: str | None) -> None:
        self._done()
        if fault == "drop":
            self._transport.close()
        elif fault in ("429", "500"):
            self._send(int(fault), {"error": {"message": "now and then"}}, b"retry-after: 0.05\r\n" if fault == "429" else b"")
        elif fault == "empty":
            self._send(200, {"choices": []})
        else:
            chat = path.endswith(b"chat/completions")
            reply = _FIXED[chat] if self.behavior.fixed else json.dumps(self._reply(json.loads(body), chat, fault)).encode()
            if self.behavior.refuse and self.behavior.refuse.encode() in body:
                self._send(400, {"error": {"message": "not this one"}})
                return
            if fault == "json":
                reply = reply[: len(reply) // 2]
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(reply)
            if fault == "truncated":
                self._transport.write(head + reply[: len(reply) // 2])
                self._transport.close()
                return
            self._transport.write(head + reply)

    def _reply(self, asked: dict[str, Any], chat: bool, fault: str | None) -> dict[str, Any]:
        prompt = asked["messages"][-1]["content"] if chat else asked["prompt"]
        says = self.behavior.says
        text = (
            says[1](prompt) if says and says[0] in prompt and CANARY not in prompt else answer_to(prompt, asked.get("seed", 0))
        )
        words = text.split(" ")
        finish = self.behavior.finish or ("length" if len(words) > asked["max_tokens"] else "stop")
        text = " ".join(words[: asked["max_tokens"]])
        choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": min(len(words), asked["max_tokens"])}
        choices = [{"index": at, "finish_reason": finish, **choice} for at in range(2 if fault == "two" else 1)]
        return {"choices": choices, "usage": usage, "model": "another" if fault == "model" else asked["model"]}

    def _send(self, status: int, body: dict[str, Any], more: bytes = b"") -> None:
        content = json.dumps(body).encode()
        self._transport.write(
            b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n%scontent-length: %d\r\n\r\n" % (status, more, len(content))
            + content
        )


def _fault(shares: dict[str, float], number: int) -> str | None:
    draw = int.from_bytes(hashlib.blake2b(str(number).encode(), digest_size=4).digest(), "big") / 2**32
    for name, share in shares.items():
        if draw < share:
            return name
        draw -= share
    return None


def answer_to(prompt: str, seed: int) -> str:
    """A text about what the prompt holds: its sentences in another order, with other words between them."""
    found = PASSAGE.search(prompt)
    text = found[2] if found else prompt
    generator = random.Random(hashlib.blake2b(f"{seed} {prompt}".encode(), digest_size=8).hexdigest())
    pieces = [piece.strip() for piece in re.split(r"[.\n]+", text) if piece.strip()] or ["nothing"]
    generator.shuffle(pieces)
    question = "Question: What is told here?\nAnswer: " if "Write questions" in prompt else ""
    return question + " ".join(f"{generator.choice(LINKS)} {piece}." for piece in pieces)


_USAGE = {"prompt_tokens": 300, "completion_tokens": 40}
_FIXED = {
    True: json.dumps(
        {"choices": [{"finish_reason": "stop", "message": {"content": "some words of a text " * 10}}], "usage": _USAGE}
    ).encode(),
    False: json.dumps({"choices": [{"finish_reason": "stop", "text": "some words of a text " * 10}], "usage": _USAGE}).encode(),
}


class RunningStub:
    """A stub in a thread of this process. A context: it answers within."""

    def __init__(self, port: int = 0, **behavior: Any):
        self.behavior, self.seen = Behavior(**behavior), Seen()
        self._port = port
        self._ready = threading.Event()

    def __enter__(self) -> RunningStub:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(20)
        return self

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await self._loop.create_server(lambda: Stub(self.behavior, self.seen), "127.0.0.1", self._port)
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        if hasattr(server, "close_clients"):
            server.close_clients()

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._port}/v1"


def main(argv: list[str]) -> int:
    """Serve until a signal comes; the first line on standard output is the address."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synthesis.stub", description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--fault", action="append", default=[], metavar="NAME=SHARE", help=", ".join(FAULTS))
    parser.add_argument("--rate", type=float, default=0.0, help="answers a second at most")
    parser.add_argument("--core", type=int, help="run on this one alone")
    parser.add_argument("--fixed", action="store_true", help="always the same answer")
    arguments = parser.parse_args(argv)
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    faults = {name: float(share) for name, share in (one.split("=") for one in arguments.fault)}
    stub = RunningStub(arguments.port, faults=faults, rate=arguments.rate, fixed=arguments.fixed)

    async def serve() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: stub._stop.set())
        ready = asyncio.ensure_future(stub._serve())
        while not stub._ready.is_set():
            await asyncio.sleep(0.01)
        print(stub.url, flush=True)
        await ready

    uvloop.run(serve())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
