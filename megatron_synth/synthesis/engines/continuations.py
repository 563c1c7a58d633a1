"""Texts with which a model goes on after prompts: what `generate` shows.

A prompt is text: what spells a special token in it is read letter by letter, as it is when documents are prepared, so that a
prompt cannot end itself. Its tokens are made here, once, so that every engine is given the same ones.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.config.synthesis import EngineConfig, SamplingConfig
from megatron_synth.synthesis.answers.parts import REFUSED, Answer
from megatron_synth.synthesis.documents.chunks import Chunk
from megatron_synth.synthesis.documents.escape import Escape
from megatron_synth.synthesis.engines.base import Capabilities, Engine, EngineGone
from megatron_synth.synthesis.requests import SEED_BITS, Prompt, Request, digest

USUAL_TOKENS = 128
"""Tokens of a text where nobody asks for another number and the context has room for them."""
LOG = "vllm.log"


@dataclass(frozen=True)
class Continuation:
    """A text that a model went on with.

    prompt: number of the prompt, from 0. sample: number of the text among those of its prompt, from 0. seed: its own; the same
    seed, prompt and sampling give the same text. finish: why it ends, `stop` or `length`. tokens: None where a server does not
    tell.
    """

    prompt: int
    sample: int
    seed: int
    text: str
    finish: str
    tokens: int | None


def continue_prompts(
    folder: Path,
    prompts: Sequence[str],
    *,
    samples: int,
    seed: int,
    sampling: SamplingConfig,
    max_tokens: int | None,
    engine: EngineConfig,
    stop: Sequence[str] = (),
    chat: bool = False,
) -> list[Continuation]:
    """Continue each prompt `samples` times; the texts of a prompt one after the other, in the order of the prompts.

    Args:
        folder: a model with its tokenizer in Hugging Face's format. Nothing is fetched, and no code of it is run.
        prompts: texts; an empty one stands for the beginning of a document.
        samples: texts of each prompt. Each has a seed of its own, made from `seed`, the prompt and the number of the sample.
        seed: of all.
        sampling: how tokens are drawn; its `max_tokens` is not used.
        max_tokens: of a text. Default: 128, or what the context leaves.
        engine: `transformers`, or `vllm`.
        stop: strings at which a text ends.
        chat: prompts are a user's messages to a model with a chat template.

    Raises:
        UserError: the model cannot be loaded, has no tokenizer or chat template, or a prompt does not fit into its context.
    """
    tokenizer = _tokenizer(folder)
    if chat and tokenizer.chat_template is None:
        raise UserError(f"--chat: {folder} has no chat template; leave --chat out to continue the prompts as text")
    asked = [_prompt(tokenizer, prompt, chat=chat) for prompt in prompts]
    logs = Path(tempfile.mkdtemp(prefix="megatron-synth-"))
    running = _engine(folder, engine, sampling, stop, logs, chat=chat)
    try:
        longest = _fitting(tokenizer, asked, running.check(), max_tokens)
        requests = [
            _request(prompt, number, sample, samples, seed, prompts[number])
            for number, prompt in enumerate(asked)
            for sample in range(samples)
        ]
        answers: dict[int, Answer] = {}
        running.run(iter(requests), lambda pairs: answers.update({one.order: answer for one, answer in pairs}), longest)
        shutil.rmtree(logs)  # of a server that failed the log stays
    except EngineGone as error:
        raise UserError(str(error)) from None
    finally:
        running.close()
    for order, answer in answers.items():
        if answer.finish == REFUSED:
            raise UserError(f"prompt {order // samples + 1}: {answer.text}")
    if len(answers) < len(requests):
        missing = next(one.order for one in requests if one.order not in answers)
        raise UserError(f"prompt {missing // samples + 1}: the engine gave no answer; the same command asks again")
    return [_continuation(request, answers[request.order], samples) for request in requests]


def _continuation(request: Request, answer: Answer, samples: int) -> Continuation:
    number = request.order // samples
    return Continuation(number, request.sample, request.seed, answer.text, answer.finish, answer.tokens_out)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no config.json; expected a run directory, a checkpoint, or a folder in Hugging Face's format"
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(
            f"{folder}: has no tokenizer, so that there is no text to make of tokens; put the tokenizer.json of its data there"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library has no common base for missing files and formats
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{folder}: its tokenizer cannot be read: {reason}") from None


def _prompt(tokenizer: Any, text: str, *, chat: bool) -> Prompt:
    if chat:  # a template's own marks are obeyed: those that the text spells are broken up
        return Prompt(messages=(("user", Escape(tokenizer.all_special_tokens)(text)),))
    tokens: list[int] = tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
    while tokens and tokens[-1] == tokenizer.eos_token_id:  # of tokenizers that close texts: the model shall go on
        tokens.pop()
    if not tokens:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise UserError("an empty prompt needs a tokenizer with a token that begins or ends a text; give a prompt")
        tokens = [first]
    return Prompt(text=text, tokens=tuple(tokens))


def _engine(
    folder: Path, engine: EngineConfig, sampling: SamplingConfig, stop: Sequence[str], logs: Path, *, chat: bool
) -> Engine:
    if engine.name == "vllm":
        from megatron_synth.synthesis.engines.protocol import Shape
        from megatron_synth.synthesis.engines.vllm import Vllm

        shape = Shape(str(folder), "chat" if chat else "completions", sampling, tuple(stop))
        return Vllm(str(folder), None, engine, shape, logs / LOG)
    from megatron_synth.synthesis.engines.embedded import Embedded

    return Embedded(str(folder), None, engine, sampling, stop)


def _fitting(tokenizer: Any, asked: Sequence[Prompt], able: Capabilities, max_tokens: int | None) -> int:
    """Tokens of a text at most; UserError if a prompt and the text do not fit into the context."""
    wanted = max_tokens or USUAL_TOKENS
    if able.context is None:
        return wanted
    sizes = [len(one.tokens) if not one.messages else _chat_size(tokenizer, one) for one in asked]
    needed = max_tokens or 1
    for number, size in enumerate(sizes, start=1):
        if size + needed > able.context:
            raise UserError(
                f"prompt {number}: has {size} tokens, and with {needed} more it does not fit into the model's context of "
                f"{able.context}; shorten it" + (", or lower --max-tokens" if needed > 1 else "")
            )
    return min(wanted, able.context - max(sizes))


def _chat_size(tokenizer: Any, prompt: Prompt) -> int:
    messages = [{"role": role, "content": content} for role, content in prompt.messages]
    return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def _request(prompt: Prompt, number: int, sample: int, samples: int, seed: int, text: str) -> Request:
    key = digest([seed, text, sample])
    own = int(key[-8:], 16) >> (32 - SEED_BITS)
    return Request(key, number * samples + sample, Chunk((), "", 0, 1, 0), sample, (), prompt, own)
