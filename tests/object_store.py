"""S3 on loopback: moto's server, and before it a proxy that injects what goes wrong between a program and a bucket."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

BUCKET = "corpora"
SECRET = "do-not-show-this-secret"


@dataclass
class Reply:
    """What the proxy answers in the server's place. cut: bytes of the body after which the connection ends."""

    status: int = 200
    code: str = ""
    text: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    forward: bool = False
    cut: int | None = None
    short: int | None = None
    """Bytes of the body that are sent as if they were all."""


Rule = Callable[[str, str], Reply | None]
"""From method and path what to answer; None: what the server answers."""


class Store:
    """A server of S3 with one bucket, and the requests that it has had."""

    def __init__(self, backend: tuple[str, int]):
        self.backend, self.rule, self.requests = backend, None, []
        self._lock = threading.Lock()
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def _serve(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                with store._lock:
                    store.requests.append((self.command, self.path))
                    reply = store.rule(self.command, self.path) if store.rule is not None else None
                if reply is not None and reply.delay_s:
                    time.sleep(reply.delay_s)
                if reply is not None and not reply.forward:
                    error = f"<Error><Code>{reply.code}</Code><Message>{reply.text or reply.code}</Message></Error>"
                    self._answer(reply.status, reply.headers, b"" if self.command == "HEAD" else error.encode(), None)
                    return
                connection = http.client.HTTPConnection(*store.backend)
                headers = {key: value for key, value in self.headers.items() if key.lower() not in ("connection",)}
                connection.request(self.command, self.path, body or None, headers)
                answer = connection.getresponse()
                data, found = answer.read(), dict(answer.getheaders())
                connection.close()
                if self.command == "HEAD":
                    found["X-Length"] = found.get("Content-Length", "0")
                if reply is not None and reply.short is not None:
                    data = data[: reply.short]
                self._answer(answer.status, found | (reply.headers if reply else {}), data, reply.cut if reply else None)

            def _answer(self, status: int, headers: dict[str, str], data: bytes, cut: int | None) -> None:
                lower = {key.lower(): key for key in headers}
                self.send_response_only(status)
                if "date" not in lower:
                    self.send_header("Date", self.date_time_string())
                for key, value in headers.items():
                    if key.lower() not in ("content-length", "transfer-encoding", "connection", "x-length"):
                        self.send_header(key, value)
                self.send_header("Content-Length", headers.get("X-Length") or str(len(data)))
                self.end_headers()
                try:
                    self.wfile.write(data if cut is None else data[:cut])
                except OSError:
                    return
                if cut is not None:
                    self.wfile.flush()
                    self.close_connection = True

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """Clients that are gone are part of the tests."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the proxy."""
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def failing(self, rule: Rule) -> Iterator[list[tuple[str, str]]]:
        """Within, requests are answered by `rule`; gives those that came."""
        self.requests.clear()
        self.rule = rule
        try:
            yield self.requests
        finally:
            self.rule = None

    def environment(self) -> dict[str, str]:
        """What tells a program where the store is, and who asks."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "AKIATESTTEST",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def first(times: int, reply: Reply, *, method: str = "GET", within: str = "") -> Rule:
    """Answer the first so many requests of a method, whose path has `within` in it, with `reply`."""
    left = [times]

    def rule(asked: str, path: str) -> Reply | None:
        if asked == method and within in path and left[0] > 0:
            left[0] -= 1
            return reply
        return None

    return rule


@contextmanager
def running(patch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The server with an empty bucket, in the environment of this process and its children; skips where it is not installed."""
    reason = "pip install -e '.[test]' brings the server of S3 that this needs"
    for module in ("s3fs", "moto.server", "flask_cors"):
        pytest.importorskip(module, reason=reason)
    import logging

    import moto.server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    store = Store(server.get_host_and_port())
    try:
        for name, value in store.environment().items():
            patch.setenv(name, value)
        import fsspec

        files = fsspec.filesystem("s3", use_listings_cache=False)
        if not files.exists(BUCKET):  # servers of one process share what they hold
            files.mkdir(BUCKET)
        yield store
    finally:
        store.stop()
        server.stop()
