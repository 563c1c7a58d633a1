"""The OpenAI API as bytes: what is sent, and what may come back. Nothing here knows of connections."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

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

    def body(self, request: Request, max_tokens: int) -> bytes:
        """What is posted. Documents are values of JSON, and cannot leave them."""
        sampling = self.sampling
        content: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed,
        }
        if sampling.top_k:
            content["top_k"] = sampling.top_k  # vLLM's and llama.cpp's; OpenAI's own has none
        if self.stop:
            content["stop"] = list(self.stop)
        if self.api == "chat":
            content["messages"] = [{"role": role, "content": text} for role, text in request.prompt.messages]
        else:
            content["prompt"] = request.prompt.text
        return json.dumps(content).encode()


def parse_answer(body: bytes, api: str, seconds: float) -> Answer:
    """The answer in a reply with status 200.

    Raises:
        BadAnswer: there is none in it.
    """
    try:
        reply = json.loads(body.decode("utf-8"))
        choice = reply["choices"][0]
        finish = choice.get("finish_reason")
        if api == "chat":
            text, refusal = choice["message"].get("content"), choice["message"].get("refusal")
        else:
            text, refusal = choice["text"], None
        usage = reply.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        tokens_in, tokens_out = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
        cached = _count(details.get("cached_tokens")) or 0
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadAnswer(f"{type(error).__name__}: {error}"[:SHOWN]) from None
    if isinstance(refusal, str) and not text:
        return Answer(refusal, REFUSED, tokens_in, tokens_out, cached, seconds)
    if not isinstance(text, str) or not isinstance(finish, str):
        raise BadAnswer("no text, or no reason why it ends")
    if finish == FILTERED:
        return Answer(text or FILTERED, REFUSED, tokens_in, tokens_out, cached, seconds)
    return Answer(text, finish[:40], tokens_in, tokens_out, cached, seconds)


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
