"""A few requests before the many: whether the engine does what a synthesis counts on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.core.log import show
from megatron_synth.synthesis.answers.parts import REFUSED, Answer
from megatron_synth.synthesis.documents.chunks import Chunk
from megatron_synth.synthesis.documents.parents import Parent
from megatron_synth.synthesis.engines.base import Capabilities, Engine
from megatron_synth.synthesis.requests import Request, Wording

TEXT = "The river rises in the hills, and a mill stands where it meets the road."
TOKENS = 12
CONCURRENT = 4


def check_chat(wording: Wording, found: Capabilities) -> None:
    """Refuse a chat with a model that has no template for one.

    Raises:
        UserError: it has none.
    """
    if wording.api == "chat" and found.chat is False:
        raise UserError(
            "generator.api: the model has no chat template, so it is a base model; set generator.api to completions, or take a "
            "model that follows instructions"
        )


def check_engine(engine: Engine, wording: Wording) -> dict[str, Any]:
    """Ask the engine: one token, the same seed twice, and several prompts at once beside one by one.

    Returns what it can, for the record: whether the same seed gives the same text, alone and among others.

    Raises:
        UserError: it cannot do without what it lacks.
    """
    one = _request(wording, 0)
    (answer,) = _ask(engine, [one], 1)
    if answer.finish == REFUSED:
        raise UserError(
            f"engine: refuses the first request: {answer.text}; see that it takes a seed, stop strings and {wording.api}"
        )
    if answer.finish != "length":
        raise UserError(
            f"engine: an answer of one token ends with {answer.finish!r}, expected 'length': texts that are cut could not "
            f"be told from whole ones"
        )
    if answer.tokens_out is None:
        show("note: the server tells no numbers of tokens (`usage`); the record will not have them", error=True)
    again = [_ask(engine, [one], TOKENS)[0].text for _ in range(2)]
    many = [_request(wording, number) for number in range(CONCURRENT)]
    alone = [_ask(engine, [request], TOKENS)[0].text for request in many]
    together = [one.text for one in _ask(engine, many, TOKENS)]
    facts = {"same_seed_same_text": again[0] == again[1], "same_text_among_others": alone == together}
    if not facts["same_seed_same_text"]:
        show("note: the same seed gives another text: the corpus cannot be made again from its file alone", error=True)
    elif not facts["same_text_among_others"]:
        show(
            "note: a text depends on what else the engine does at the time; answers that are kept stay as they are", error=True
        )
    return facts


def _ask(engine: Engine, asked: Sequence[Request], max_tokens: int) -> list[Answer]:
    """Answers in the order of the requests.

    Raises:
        UserError: there are none.
    """
    found: dict[str, Answer] = {}
    engine.run(iter(asked), lambda pairs: found.update({request.key: answer for request, answer in pairs}), max_tokens)
    if len(found) < len(asked):
        raise UserError("engine: does not answer the first requests; see its log")
    return [found[request.key] for request in asked]


def _request(wording: Wording, number: int) -> Request:
    """A request that is in no synthesis."""
    text = f"{TEXT} It is {number + 2} miles long."
    chunk = Chunk((Parent(f"canary-{number}", number, "canary", text),), text, 0, 1, 20)
    materials = {"text": (text,), "keywords": ("river", "mill", f"road {number}"), "concepts": ("river, mill", text)}
    material = materials[wording.template.made_from]
    key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return Request(key, number, chunk, 0, material, wording.prompt(material), 1000 + number)
