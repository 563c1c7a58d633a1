"""Questions with answers that are scored by their likelihood: (context, answer) pairs and multiple choice, as tokens.

Rows come from a .jsonl file, as they are or through a task file of lm-evaluation-harness (`answer_tasks.py`). A context and an
answer become tokens as in the harness: both together, cut where the context's tokens end, spaces at the end of the context
counted to the answer. So an answer's log-likelihood is the harness's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import AnswersConfig
from megatron_synth.core.files import read_regular
from megatron_synth.core.records import first_fault, parse_json
from megatron_synth.data.answer_tasks import Task
from megatron_synth.data.tokenizer import open_backend

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


@dataclass(frozen=True)
class Question:
    """A context and what may follow it, word for word, the delimiter included."""

    context: str
    answers: tuple[str, ...]
    right: int
    """Which of the answers is right."""


@dataclass(frozen=True, eq=False)
class Request:
    """Tokens whose likelihood is asked for: of those from `begin` on, each given all before it."""

    tokens: npt.NDArray[np.int64]
    """[T], at least one before `begin`."""
    begin: int


@dataclass(frozen=True, eq=False)
class AnswerDomain:
    """A domain of questions, ready to be scored: all answers of all questions, one after the other."""

    name: str
    requests: tuple[Request, ...]
    question: npt.NDArray[np.int64]
    """[R] number of the question that an answer belongs to, ascending."""
    is_right: npt.NDArray[np.bool_]
    """[R] one in each question."""
    sizes: npt.NDArray[np.int64]
    """[R] bytes of UTF-8 of an answer, the delimiter included."""


class _Row(BaseModel):
    """A line of a .jsonl file without a task: an answer, or choices and the number of the right one from 0."""

    model_config = ConfigDict(extra="ignore", strict=True)

    context: str
    answer: str | Annotated[int, Field(ge=0)]
    choices: list[str] | None = Field(None, min_length=2)

    @model_validator(mode="after")
    def _answer_is_one_of_them(self) -> _Row:
        if self.choices is None and not isinstance(self.answer, str):
            raise ValueError("answer is a number, but there are no choices")
        if self.choices is not None and not (isinstance(self.answer, int) and self.answer < len(self.choices)):
            raise ValueError(f"answer is not the number of one of the {len(self.choices)} choices, counted from 0")
        return self

    def question(self) -> Question:
        if self.choices is None:
            assert isinstance(self.answer, str)
            return Question(self.context, (self.answer,), 0)
        assert isinstance(self.answer, int)
        return Question(self.context, tuple(self.choices), self.answer)


def open_answers(
    name: str, config: AnswersConfig, tokenizer: Path | None, prefix: int | None, vocab_size: int, longest: int
) -> AnswerDomain:
    """Read a domain and make tokens of it.

    Args:
        name: of the domain.
        config: where it is.
        tokenizer: tokenizer.json; None: it is not known.
        prefix: the token that stands before an answer without a context: what ends a document. None: it is not known.
        vocab_size: ids must lie below.
        longest: tokens that the model sees at once (S): of a longer request the first are left out, as by the harness.

    Raises:
        UserError: a file is missing or damaged, or no tokenizer is known.
    """
    key = f"data.answers.{name}"
    if tokenizer is None or not tokenizer.is_file():
        raise UserError(f"{key}: needs a tokenizer.json to make tokens of text; set data.tokenizer")
    backend = open_backend(read_regular(tokenizer).decode("utf-8"), tokenizer)
    questions = list(read_questions(Path(config.path), Task.read(Path(config.task)) if config.task else None, config.limit))
    if not questions:
        raise UserError(f"{key}: {config.path}: no questions in it")
    answers = [(one.context, answer) for one in questions for answer in one.answers]
    try:
        requests = tuple(encode(backend, answers, prefix, longest))
    except ValueError as error:
        raise UserError(f"{key}: {config.path}: {error}") from None
    if max(int(request.tokens.max()) for request in requests) >= vocab_size:
        raise UserError(f"{key}: {tokenizer} makes ids that are not in the vocabulary of {vocab_size} tokens")
    counts = [len(one.answers) for one in questions]
    return AnswerDomain(
        name,
        requests,
        np.repeat(np.arange(len(questions)), counts),
        np.concatenate([np.arange(count) == one.right for one, count in zip(questions, counts, strict=True)]),
        np.array([len(answer.encode()) for _, answer in answers], np.int64),
    )


def read_questions(path: Path, task: Task | None = None, limit: int | None = None) -> Iterator[Question]:
    """The questions in a .jsonl file; with a task its rows are what the task's templates apply to.

    Raises:
        UserError: names file and line.
    """
    try:
        lines = read_regular(path).split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for number, line in rows[:limit]:
        try:
            row: Any = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError("expected a JSON object")
            found = _Row.model_validate(row).question() if task is None else Question(*task.question(row))
            if any(not answer for answer in found.answers):
                raise ValueError("an answer is empty")
        except ValidationError as error:
            raise UserError(f"{path}: line {number}: {first_fault(error)}") from None
        except ValueError as error:
            raise UserError(f"{path}: line {number}: {error}") from None
        yield found


def encode(backend: Backend, pairs: Sequence[tuple[str, str]], prefix: int | None, longest: int) -> Iterator[Request]:
    """Tokens of (context, answer) pairs, as lm-evaluation-harness makes them.

    Args:
        backend: the tokenizer; it adds no special tokens.
        pairs: as `Question` has them.
        prefix: stands before an answer without a context; None: such a pair is a ValueError.
        longest: at most so many tokens are seen at once.
    """
    split = []
    for context, answer in pairs:
        spaces = len(context) - len(context.rstrip())
        split.append((context[: len(context) - spaces], context[len(context) - spaces :] + answer))
    whole = backend.encode_batch([context + answer for context, answer in split], add_special_tokens=False)
    before = backend.encode_batch([context for context, _ in split], add_special_tokens=False)
    for (context, answer), all_tokens, context_tokens in zip(split, whole, before, strict=True):
        tokens, begin = list(all_tokens.ids), len(context_tokens.ids)
        if not begin:
            if prefix is None:
                raise ValueError("an answer without a context needs the token that ends a document, and no source names it")
            tokens, begin = [prefix, *tokens], 1
        if len(tokens) == begin:
            raise ValueError(f"the answer {answer[:40]!r} after {context[-40:]!r} has no token of its own")
        left_out = max(0, len(tokens) - (longest + 1))
        if begin - left_out < 1:
            begin = left_out + 1  # what stands first is given, not asked for
        yield Request(np.array(tokens[left_out:], np.int64), begin - left_out)
