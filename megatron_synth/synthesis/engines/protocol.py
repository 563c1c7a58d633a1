"""The OpenAI API as bytes: what is sent, and what may come back. Nothing here knows of connections."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from megatron_synth.config.synthesis import SamplingConfig
from megatron_synth.core.records import parse_json
from megatron_synth.synthesis.answers.parts import REFUSED, Answer
from megatron_synth.synthesis.requests import Request

PATHS = {"chat": "/chat/completions", "completions": "/completions"}
REFUSALS = frozenset({400, 413, 422})
"""Statuses that say that this request will never be answered."""
FATAL = {401: "the key is refused", 403: "the key may not use it", 404: "there is no such model or address"}
"""Statuses that say that no request will be."""
BUSY = frozenset({408, 425, 429})
"""Statuses that ask to come again later."""
FILTERED = "content_filter"
SHOWN = 300


class BadAnswer(Exception):
    """A reply that is none: broken JSON, or without what it must have."""


@dataclass(frozen=True)
class Shape:
    """What all requests of a run share.

    model: the name that the server gives it. api: chat or completions. stop: strings that end an answer.
    """

    model: str
    api: str
    sampling: SamplingConfig
    stop: tuple[str, ...]

    @property
    def path(self) -> str:
        """Of the address, below /v1."""
        return PATHS[self.api]

    @cached_property
    def _constant(self) -> dict[str, Any]:
        sampling = self.sampling
        content: dict[str, Any] = {"model": self.model, "temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.top_k:
            content["top_k"] = sampling.top_k  # vLLM's and llama.cpp's; OpenAI's own has none
        if self.stop:
            content["stop"] = list(self.stop)
        return content

    def body(self, request: Request, max_tokens: int) -> bytes:
        """What is posted. Documents are values of JSON, and cannot leave them."""
        content = {**self._constant, "max_tokens": max_tokens, "seed": request.seed}
        if self.api == "chat":
            content["messages"] = [{"role": role, "content": text} for role, text in request.prompt.messages]
        else:
            content["prompt"] = list(request.prompt.tokens) or request.prompt.text
        try:
            return _encode(content)
        except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can carry
            return json.dumps(content).encode()


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    text: str | None = None
    message: _Message | None = None


class _Reply(msgspec.Struct):
    choices: list[_Choice]
    usage: Any = None
    model: str | None = None


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Reply).decode


def parse_answer(body: bytes, api: str, seconds: float) -> tuple[Answer, str | None]:
    """The answer in a reply with status 200, and the model that it names, if it does.

    Raises:
        BadAnswer: there is none in it, or more than the one that was asked for.
    """
    try:
        reply = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadAnswer(f"{type(error).__name__}: {error}"[:SHOWN]) from None
    if len(reply.choices) != 1:
        raise BadAnswer(f"{len(reply.choices)} texts, expected one")
    (choice,) = reply.choices
    if api == "chat":
        text, refusal = (None, None) if choice.message is None else (choice.message.content, choice.message.refusal)
    else:
        text, refusal = choice.text, None
    usage = reply.usage if isinstance(reply.usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    tokens_in, tokens_out = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    cached = (_count(details.get("cached_tokens")) or 0) if isinstance(details, dict) else 0
    finish = choice.finish_reason
    if refusal and not text:
        text, finish = refusal, REFUSED
    elif finish == FILTERED:
        text, finish = text or FILTERED, REFUSED
    if text is None or finish is None:
        raise BadAnswer("no text, or no reason why it ends")
    return Answer(text, finish[:40], tokens_in, tokens_out, cached, seconds), reply.model


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40 else None


def said(body: bytes) -> str:
    """What a server says about an error, in one short line."""
    try:
        reply = parse_json(body)
        error = reply.get("error", reply) if isinstance(reply, dict) else reply
        text = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        text = body.decode("utf-8", "replace")
    return " ".join(str(text).split())[:SHOWN]


def queue_of(metrics: str) -> tuple[int, int] | None:
    """Requests that run and that wait, from vLLM's /metrics; None where they are not told."""
    found = {"running": 0.0, "waiting": 0.0}
    seen = False
    for line in metrics.splitlines():
        for name in found:
            if line.startswith((f"vllm:num_requests_{name}{{", f"vllm:num_requests_{name} ")):
                try:
                    found[name] += float(line.rsplit(None, 1)[1])
                except (ValueError, IndexError):
                    continue
                seen = True
    if not seen or not all(0 <= value < 2**31 for value in found.values()):
        return None
    return int(found["running"]), int(found["waiting"])
