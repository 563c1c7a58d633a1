"""What the run knows of an engine: it takes requests and gives answers, in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_synth.synthesis.answers.parts import Answer
from megatron_synth.synthesis.requests import Request

Sink = Callable[[Sequence[tuple[Request, Answer]]], None]
"""Keeps answers at once: what it was given is on disk, as far as the process is concerned, when it returns."""


class EngineGone(Exception):
    """No server answers any more. Nothing is lost: the same command goes on when one is there again."""


@dataclass(frozen=True)
class Capabilities:
    """What an engine says of its model.

    context: tokens of prompt and answer together; None where it does not tell. chat: whether there is a chat template; None
    where only a request can tell.
    """

    context: int | None
    chat: bool | None


class Engine(Protocol):
    """One way to have text generated."""

    group: int
    """Requests that must be given together for an answer to be the same to the last bit. They are given again together."""

    def check(self) -> Capabilities:
        """Whether it is there and has the model.

        Raises:
            UserError: it is not there, or lacks the model.
        """
        ...

    def run(self, requests: Iterator[Request], sink: Sink, max_tokens: int) -> None:
        """Answer requests; those that stay unanswered are not given to `sink`. max_tokens: of an answer.

        Raises:
            EngineGone: no server answers any more; what was answered before was given to `sink`.
            UserError: the configuration is at fault, such as a wrong key.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """What a manifest says of it: name, versions, device."""
        ...

    def close(self) -> None:
        """Stop what was started."""
        ...
