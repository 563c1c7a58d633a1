"""One server as the client sees it: how many requests it may have, and whether it is there."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from megatron_synth.synthesis.engines.http import Address

LONGEST_PAUSE_S = 30.0
FIRST_PAUSE_S = 0.5
HALVE_EVERY_S = 1.0


@dataclass
class Server:
    """State of one server.

    address: with /v1 at its end. most: requests in flight at most. breaker: failures in a row after which it gets none. queue:
    requests that may wait in its own queue.
    """

    address: Address
    most: int
    breaker: int
    queue: int
    limit: int = 0
    in_flight: int = 0
    failures: int = 0
    answered: int = 0
    last_failure: str = ""
    down: bool = False
    failing_since: float | None = None
    """When it first failed after its last answer."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    _halved: float = 0.0
    _since_limit: int = 0
    _pause: float = FIRST_PAUSE_S

    def __post_init__(self) -> None:
        self.limit = self.most

    @property
    def url(self) -> str:
        """The address in letters."""
        return self.address.url

    @property
    def root(self) -> Address:
        """The address without /v1: /metrics and /health are there."""
        return Address(self.address.url.removesuffix("/v1"), self.address.key)

    def may_send(self, worker: int) -> bool:
        """Whether the worker of that number has a turn: they take turns by number, so that a limit needs no lock."""
        return not self.down and worker < self.limit

    def succeeded(self) -> None:
        """An answer came."""
        self.failures, self.failing_since = 0, None
        self.answered += 1
        self._pause = FIRST_PAUSE_S
        self._since_limit += 1
        if self._since_limit >= self.limit and self.limit < self.most:
            self._set_limit(self.limit + 1)

    def failed(self, reason: str) -> None:
        """No answer came; after several in a row it gets no more requests."""
        self.failures += 1
        self.last_failure = reason
        if self.failing_since is None:
            self.failing_since = time.monotonic()
        if self.failures >= self.breaker:
            self.down = True

    def busy(self) -> None:
        """It asked for fewer requests."""
        now = time.monotonic()
        if now - self._halved >= HALVE_EVERY_S:
            self._halved = now
            self._set_limit(max(1, self.limit // 2))

    def told(self, waiting: int) -> None:
        """It told how many requests wait in its queue: a few keep it busy, more only grow old there."""
        if waiting > self.queue:
            self._set_limit(max(1, self.in_flight - (waiting - self.queue)))
        elif waiting == 0 and self.in_flight >= self.limit:
            self._set_limit(min(self.most, self.limit + max(1, self.limit // 4)))

    def up(self) -> None:
        """A probe was answered."""
        self.down, self.failures = False, 0
        self.wake()

    def pause(self) -> float:
        """Seconds until the next probe, longer each time."""
        found, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE_S)
        return found

    def wake(self) -> None:
        """Let workers look again whether they have a turn."""
        self.changed.set()
        self.changed = asyncio.Event()

    def _set_limit(self, limit: int) -> None:
        grown = limit > self.limit
        self.limit, self._since_limit = limit, 0
        if grown:
            self.wake()
