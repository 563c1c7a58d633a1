"""The client's HTTP against servers that break its rules: bounded, told in words, and never a reply for another request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from megatron_synth.synthesis.engines import http
from megatron_synth.synthesis.engines.http import Address, Broken, Connection, NotConnected, Reply

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def asked(handler: Handler, questions: int = 1, timeout: float = 20.0) -> list[Reply | Broken]:
    """What comes of questions on one connection."""

    async def ask() -> list[Reply | Broken]:
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        connection, found = Connection(Address(f"http://127.0.0.1:{port}/v1")), list[Reply | Broken]()
        for _ in range(questions):
            try:
                found.append(await connection.ask(b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n", timeout))
            except Broken as broken:
                found.append(broken)
            await asyncio.sleep(0.01)
        connection.close()
        server.close()
        return found

    return asyncio.run(ask())


def saying(*parts: bytes, close: bool = False, endless: bytes = b"") -> Handler:
    """A server that says this to each question."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0)
                while endless:
                    writer.write(endless)
                    await writer.drain()
                if close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    return handle


@pytest.mark.parametrize(
    ("handler", "body"),
    [
        (saying(OK + b"ok"), b"ok"),
        (saying(OK[:9], OK[9:30], OK[30:], b"o", b"k"), b"ok"),
        (saying(b"HTTP/1.1 100 Continue\r\n\r\n", OK + b"ok"), b"ok"),
        (saying(b"HTTP/1.1 200 OK\r\n\r\nok", close=True), b"ok"),
        (saying(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\no\r\n", b"1\r\nk\r\n0\r\n\r\n"), b"ok"),
        (saying(b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", close=True), b"ok"),
    ],
)
def test_replies_of_all_shapes_are_read_twice_on_a_connection(handler, body):
    for found in asked(handler, 2):
        assert isinstance(found, Reply)
        assert (found.status, found.body) == (200, body)


@pytest.mark.parametrize(
    ("handler", "told"),
    [
        (saying(b"HTTP/1.1 200 OK\r\n", endless=b"x-more: 1\r\n" * 400), "a head of more than 65536 bytes"),
        (saying(b"HTTP/1.1 200 OK\r\nx-long: ", endless=b"1" * 4000), "a head of more than 65536 bytes"),
        (saying(endless=b"HTTP/1.1 100 Continue\r\n\r\n" * 40), "of more than"),
        (saying(b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n", endless=b"1" * 4000), "a reply of more than"),
        (saying(b"HTTP/1.1 200 OK\r\n\r\n", endless=b"1" * 4000), "a reply of more than"),
        (saying(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", endless=b"1\r\no\r\n" * 99), "a reply of more than"),
        (saying(OK + b"o", close=True), "the connection was closed"),
        (saying(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\no", close=True), "the connection was closed"),
        (saying(b"HTTP/1.1 200 OK\r\nx: ", close=True), "the connection was closed"),
        (saying(close=True), "the connection was closed"),
        (saying(b"SSH-2.0-OpenSSH_9.2\r\n"), "no HTTP"),
        (saying(b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n"), "no HTTP"),
        (saying(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"), "another protocol"),
        (saying(), "no answer within 1 s"),
    ],
)
def test_what_is_no_reply_ends_soon_and_is_told(handler, told, monkeypatch):
    monkeypatch.setattr(http, "MAX_REPLY_BYTES", 2**17)
    (found,) = asked(handler, timeout=1.0 if "within" in told else 60.0)
    assert isinstance(found, Broken)
    assert told in str(found)


def test_a_reply_that_nobody_asked_for_is_never_that_of_the_next_request():
    number = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal number
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                number += 1
                writer.write(OK + b"%d." % number + OK + b"!!")
                await writer.drain()
                await asyncio.sleep(0.005)
                writer.write(OK + b"??")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    assert [one.body for one in asked(handle, 4) if isinstance(one, Reply)] == [b"1.", b"2.", b"3.", b"4."]


def test_a_redirect_is_not_followed_and_the_key_is_not_shown():
    lines = (b"HTTP/1.1 302 Found", b"location: http://127.0.0.1:1/", b"retry-after: 7", b"content-length: 0", b"", b"")
    (found,) = asked(saying(b"\r\n".join(lines)))
    assert isinstance(found, Reply)
    assert (found.status, found.after) == (302, "7")
    address = Address("http://127.0.0.1:1/v1", "secret")
    assert "secret" not in repr(address)
    assert b"Authorization: Bearer secret\r\n" in address.head("GET", "/models")


def test_a_server_that_is_not_there_has_not_seen_the_request():
    async def ask() -> None:
        await Connection(Address("http://127.0.0.1:9/v1")).ask(b"", 5)

    with pytest.raises(NotConnected):
        asyncio.run(ask())


def test_a_connection_that_ends_as_it_is_made_is_none(monkeypatch):
    """A server that dies between the two: the request was not sent, so it can be sent again."""

    async def ask() -> None:
        loop = asyncio.get_running_loop()
        server = await asyncio.start_server(saying(OK, b"hi"), "127.0.0.1", 0)
        connect = loop.create_connection

        async def connect_and_lose(*args: object, **options: object) -> object:
            transport, wire = await connect(*args, **options)
            transport.abort()
            await asyncio.sleep(0)
            wire.connection_lost(None)
            return transport, wire

        monkeypatch.setattr(loop, "create_connection", connect_and_lose)
        connection = Connection(Address(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"))
        with pytest.raises(NotConnected, match="closed as it was made"):
            await connection.ask(b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n", 20.0)
        monkeypatch.undo()
        assert (await connection.ask(b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n", 20.0)).body == b"hi"
        server.close()

    asyncio.run(ask())
