"""Requests: what the generator is asked, each with a key and a seed of its own.

A key is a digest of all that decides an answer: the generator, the template, the parents, the chunk, the sampling and the
seed. What has been answered under a key is never asked again, and a request that differs in anything has another key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_synth.config.synthesis import SamplingConfig
from megatron_synth.synthesis.answers.index import KeySet
from megatron_synth.synthesis.documents.chunks import Chunk
from megatron_synth.synthesis.documents.escape import Escape
from megatron_synth.synthesis.kinds.keywords import Keywords
from megatron_synth.synthesis.kinds.template import Template

SEED_BITS = 31
"""Servers take seeds of 32 bits at least, and some take them as signed."""

Api = Literal["chat", "completions"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is sent: messages of a chat, or a text to continue."""

    messages: tuple[tuple[str, str], ...] = ()
    """(role, content)."""
    text: str = ""
    tokens: tuple[int, ...] = ()
    """Of `text`, where they are known: they are sent in its place."""

    def characters(self) -> str:
        """All of it in one string, to count by."""
        return self.text or "\n".join(content for _, content in self.messages)


@dataclass(frozen=True, slots=True)
class Request:
    """One text to be written.

    order: its place among all requests. sample: its number among those of the same chunk, from 0. material: the texts that
    the prompt was made from, as they stand in it but for marks.
    """

    key: str
    order: int
    chunk: Chunk
    sample: int
    material: tuple[str, ...]
    prompt: Prompt
    seed: int


class Wording:
    """Makes prompts of chunks."""

    def __init__(self, template: Template, api: Api, special: Iterable[str] = (), keywords: Keywords | None = None):
        assert (keywords is not None) == (template.made_from == "keywords")
        self.template, self.api = template, api
        self._escape = Escape((*special, *template.reserved))
        self._keywords = keywords

    def material(self, chunk: Chunk, seed: int) -> tuple[str, ...]:
        """The texts that a chunk's prompt is made from: its own, those of its walk, or keywords, none where it has none.

        seed: of the draw of keywords.
        """
        if self.template.made_from == "concepts":
            return chunk.walk
        if self._keywords is None:
            return (chunk.text,)
        return self._keywords.draw(chunk.text, self.template.keywords, seed)

    def prompt(self, material: tuple[str, ...]) -> Prompt:
        """What is asked."""
        escaped = [self._escape(text) for text in material]
        slots: dict[str, dict[str, str | Sequence[str]]] = {
            "text": {"text": escaped[0]},
            "keywords": {"keywords": escaped},
            "concepts": {"concepts": escaped[0], "passages": escaped[1:]},
        }
        return self.worded(self.template.render(slots[self.template.made_from]))

    def worded(self, user: str) -> Prompt:
        """The user's message with the constant part before it."""
        template = self.template
        if self.api == "chat":
            system = (("system", template.system),) if template.system else ()
            return Prompt(messages=(*system, ("user", user)))
        parts = (template.system, user, template.answer.rstrip())
        return Prompt(text="\n\n".join(part for part in parts if part))


def constant_part(template: Template) -> str:
    """What all prompts of a template begin with: the system's part, and the user's up to the first slot."""
    user = template.prompt.partition("{{")[0].partition("{%")[0]
    return f"{template.system}\n\n{user}" if template.system else user


@dataclass
class Asking:
    """What became of chunks on their way to requests."""

    chunks: int = 0
    repeated: int = 0
    """Requests that are equal to one before: the same text stands in the parents more than once."""
    without_keywords: int = 0


def requests(
    chunks: Iterable[Chunk],
    wording: Wording,
    identity: Mapping[str, Any],
    sampling: SamplingConfig,
    seed: int,
    per_parent: int,
    asking: Asking,
) -> Iterator[Request]:
    """All requests in order, no key twice.

    identity: what is known of the generator. seed: of the whole run.
    """
    constant = digest([dict(identity), wording.template.digest, wording.api, sampling.model_dump(mode="json"), seed])
    known = KeySet()
    order = 0
    for chunk in chunks:
        asking.chunks += 1
        for sample in range(per_parent):
            parents = [parent.id for parent in chunk.parents]
            about = digest([constant, parents, chunk.number, sample])
            material = wording.material(chunk, int(about[:15], 16))
            if not material:
                asking.without_keywords += 1
                continue
            prompt = wording.prompt(material)
            key = digest([about, prompt.messages, prompt.text])
            if not known.is_new(key):
                asking.repeated += 1
                continue
            # the seed follows from the key, so that no two requests share one for another reason than chance
            yield Request(key, order, chunk, sample, material, prompt, int(key[-8:], 16) >> (32 - SEED_BITS))
            order += 1


def digest(value: Any) -> str:
    """32 hexadecimal digits of a value as JSON."""
    text = json.dumps(value, separators=(",", ":"), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
