"""HTTP/1.1 as the client of a synthesis needs it: a connection per worker, one request on it at a time.

llhttp, the parser of Node.js, reads what servers send (`httptools`). What is around it is as little as possible, since it is
paid for with each of thousands of requests a second (docs/decisions/synthesis.md). A server is not trusted: heads, bodies and
all that comes without an end are bounded, a second reply to one request closes the connection, no redirect is followed, and
nothing is taken from the environment, such as proxies and passwords.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

MAX_REPLY_BYTES = 2**26
MAX_HEAD_BYTES = 2**16
CONNECT_S = 30.0
USER_AGENT = "megatron-synth"


class NotConnected(Exception):
    """There is no connection: the server has not seen the request."""


class Broken(Exception):
    """No whole reply came: the connection has ended, the time is over, or what came is no HTTP."""


@dataclass(frozen=True)
class Reply:
    """after: the header Retry-After, if there is one."""

    status: int
    body: bytes
    after: str | None


@dataclass(frozen=True)
class Address:
    """Where requests go. url: http:// or https://, without a user and without a query. key: sent as a bearer token."""

    url: str
    key: str | None = field(default=None, repr=False)

    @cached_property
    def host(self) -> str:
        """Name or number."""
        return urlsplit(self.url).hostname or ""

    @cached_property
    def port(self) -> int:
        """Of the address, or of its scheme."""
        return urlsplit(self.url).port or (443 if self.is_https else 80)

    @property
    def is_https(self) -> bool:
        """Whether it is encrypted."""
        return self.url.startswith("https://")

    def head(self, method: str, path: str) -> bytes:
        """The beginning of requests, up to where a POST has its length. path: below the address."""
        parts = urlsplit(self.url)
        lines = [
            f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1",
            f"Host: {parts.netloc}",
            f"User-Agent: {USER_AGENT}",
            "Accept: application/json",
        ]
        if self.key is not None:
            lines.append(f"Authorization: Bearer {self.key}")
        if method == "POST":
            lines.append("Content-Type: application/json")
        assert all(line.isprintable() for line in lines)
        return "\r\n".join(lines).encode("ascii") + (b"\r\nContent-Length: " if method == "POST" else b"\r\n\r\n")


class Connection:
    """Requests to an address one after the other, on a connection that is made anew when it was lost."""

    def __init__(self, address: Address):
        self._address = address
        self._wire: _Wire | None = None

    async def ask(self, request: bytes, timeout: float) -> Reply:
        """Send a request, head and body, and wait for its reply. timeout: seconds for both.

        Raises:
            NotConnected, Broken: as they say.
        """
        if self._wire is None or not self._wire.is_open:
            self._wire = await self._connect(min(timeout, CONNECT_S))
        return await self._wire.ask(request, timeout)

    async def _connect(self, timeout: float) -> _Wire:
        address = self._address
        secure = ssl.create_default_context() if address.is_https else None
        try:
            made = asyncio.get_running_loop().create_connection(_Wire, address.host, address.port, ssl=secure)
            _, wire = await asyncio.wait_for(made, timeout)
        except TimeoutError:
            raise NotConnected(f"no connection within {timeout:g} s") from None
        except (OSError, ssl.SSLError, UnicodeError) as error:
            raise NotConnected(str(error) or type(error).__name__) from None
        if not wire.is_open:  # lost between its beginning and now, by a server that is ending
            raise NotConnected("the connection was closed as it was made")
        return wire

    def close(self) -> None:
        """Close it; another one is made when it is needed."""
        if self._wire is not None:
            self._wire.close()


class _Wire(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

        self._loop = asyncio.get_running_loop()
        self._new_parser, self._no_http, self._upgrade = HttpResponseParser, HttpParserError, HttpParserUpgrade
        self._transport: Any = None
        self._waiter: asyncio.Future[Reply] | None = None

    @property
    def is_open(self) -> bool:
        """Whether a request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes, timeout: float) -> Reply:
        """As `Connection.ask`, which has seen that it is open."""
        assert self._waiter is None, "one request at a time"
        self._begin()
        waiter: asyncio.Future[Reply] = self._loop.create_future()
        self._waiter = waiter
        timer = self._loop.call_later(timeout, self._fail, f"no answer within {timeout:g} s")
        self._transport.write(request)
        try:
            return await waiter
        finally:
            timer.cancel()
            self._waiter = None
            if waiter.cancelled():
                self.close()  # the reply may still come, and would be taken for that of the next request

    def close(self) -> None:
        """Close it."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    # ---- what the loop calls

    def connection_made(self, transport: Any) -> None:
        """It is there."""
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        """It has ended, which ends a body that has no length."""
        self._transport = None
        if self._waiter is not None and not self._waiter.done() and self._is_open_ended and error is None:
            self._complete()
        self._fail(f"the connection was closed{f' ({error})' if error else ''}")

    def data_received(self, data: bytes) -> None:
        """Bytes of a reply. Those that belong to none end the connection."""
        if self._waiter is None or self._waiter.done():
            self.close()
            return
        self._bytes += len(data)
        if self._bytes > (MAX_REPLY_BYTES if self._has_head else MAX_HEAD_BYTES + len(data)):
            part = "a reply" if self._has_head else "a head"
            self._fail(f"{part} of more than {MAX_REPLY_BYTES if self._has_head else MAX_HEAD_BYTES} bytes")
            return
        try:
            self._parser.feed_data(data)
        except self._upgrade:
            self._fail("it wants to speak another protocol than HTTP/1.1")
        except self._no_http as error:
            self._fail(f"what came is no HTTP: {type(error).__name__}")

    # ---- what the parser calls

    def _begin(self) -> None:
        self._parser: Any = self._new_parser(self)
        self._body: list[bytes] = []
        self._bytes = 0
        self._has_head = self._has_length = self._is_whole = False
        self._status = 0
        self._after: str | None = None

    @property
    def _is_open_ended(self) -> bool:
        return self._has_head and not self._has_length and not self._is_whole

    def on_message_begin(self) -> None:
        """A reply begins: the first, or a second one that nobody has asked for."""
        if self._is_whole:
            self.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A line of the head."""
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._has_length = True
        elif name == b"retry-after":
            self._after = value.decode("ascii", "replace")[:40]

    def on_headers_complete(self) -> None:
        """The body follows."""
        self._status, self._has_head = self._parser.get_status_code(), True

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """A whole reply is there."""
        if 100 <= self._status < 200:  # it says that the reply will come
            self._has_head = self._has_length = False
            return
        if self._is_whole:
            return
        self._complete()
        if not self._parser.should_keep_alive() and self._transport is not None:
            self._transport.close()
            self._transport = None

    def _complete(self) -> None:
        self._is_whole = True
        if self._waiter is not None and not self._waiter.done():
            body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
            self._waiter.set_result(Reply(self._status, body, self._after))

    def _fail(self, reason: str) -> None:
        self.close()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(Broken(reason))


async def get(address: Address, path: str, timeout: float) -> Reply:
    """One GET, on a connection of its own.

    Raises:
        NotConnected, Broken: there is no reply.
    """
    connection = Connection(address)
    try:
        return await connection.ask(address.head("GET", path), timeout)
    finally:
        connection.close()
