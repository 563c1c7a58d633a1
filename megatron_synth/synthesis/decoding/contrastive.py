"""Contrastive decoding (arXiv 2210.15097; for training data: 2510.08245): what a good model says and a bad one does not.

A token's weight is log p_good - lambda log p_bad, among the tokens that the good model finds plausible: those with at least
alpha times the probability of its best one. The next token is drawn from the softmax of the weights. The bad model is a smaller
one or an earlier checkpoint. With lambda 0 it is plain sampling from the good model, and the bad one is not asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_synth.config.errors import UserError
from megatron_synth.synthesis.decoding.model import CausalModel, draw, padded, uniforms


@dataclass(frozen=True)
class Continuation:
    """What follows a prefix. finish_reason: `stop` where the model ended the text, `length` at the limit."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str


def continue_texts(
    good: CausalModel,
    bad: CausalModel,
    prefixes: Sequence[tuple[str, str]],
    *,
    max_tokens: int,
    strength: float = 1.0,
    alpha: float = 0.1,
    seed: int = 0,
    batch_size: int = 8,
) -> list[Continuation]:
    """Continue prefixes, in the order in which they come.

    Args:
        good: the model that is listened to.
        bad: the model whose habits are subtracted; of the same tokenizer.
        prefixes: (key, text); the key decides the draws together with the seed, and must be different for each text.
        max_tokens: of a continuation.
        strength: lambda, at least 0.
        alpha: share of the best token's probability that makes a token plausible, from above 0 to 1.
        seed: of the draws.
        batch_size: prefixes that are continued at a time.

    Raises:
        UserError: the tokenizers differ, a number is out of its range, or a prefix has no token or does not fit in the context.
    """
    if not (strength >= 0 and 0 < alpha <= 1 and max_tokens >= 1):
        raise UserError(
            f"contrastive decoding: expected lambda of at least 0, alpha above 0 and at most 1 and max_tokens of at least 1, "
            f"got {strength}, {alpha} and {max_tokens}"
        )
    if strength > 0 and good.tokenizer.get_vocab() != bad.tokenizer.get_vocab():
        raise UserError(f"{bad.folder}: another vocabulary than {good.folder}: their probabilities are of different tokens")
    context = min(good.context, bad.context) if strength > 0 else good.context
    rows = [good.encode(text) for _, text in prefixes]
    for (key, _), row in zip(prefixes, rows, strict=True):
        if not 1 <= len(row) <= context - max_tokens:
            raise UserError(
                f"prefix {key!r}: {len(row)} tokens; with {max_tokens} to be written it may have 1 to {context - max_tokens}"
            )
    order = sorted(range(len(rows)), key=lambda number: (-len(rows[number]), number))
    found: dict[int, Continuation] = {}
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        keys = [prefixes[number][0] for number in batch]
        new = _continued(good, bad, [rows[number] for number in batch], keys, max_tokens, strength, alpha, seed)
        found.update(zip(batch, new, strict=True))
    return [found[number] for number in range(len(rows))]


def contrast(log_good: torch.Tensor, log_bad: torch.Tensor | None, strength: float, alpha: float) -> torch.Tensor:
    """The weights of the next token [N, V], -inf where it is not plausible; log_good itself without a bad model.

    Args:
        log_good: log probabilities [N, V].
        log_bad: of the bad model; None with strength 0.
        strength: lambda.
        alpha: share of the best probability that is plausible.
    """
    if log_bad is None:
        return log_good
    least = log_good.max(dim=-1, keepdim=True).values + torch.log(torch.tensor(alpha, dtype=log_good.dtype))
    return (log_good - strength * log_bad).masked_fill(log_good < least, -torch.inf)


def _continued(
    good: CausalModel,
    bad: CausalModel,
    rows: Sequence[Sequence[int]],
    keys: Sequence[str],
    max_tokens: int,
    strength: float,
    alpha: float,
    seed: int,
) -> Iterator[Continuation]:
    draws = torch.stack([torch.from_numpy(uniforms(seed, key, max_tokens)) for key in keys]).to(good.device)
    good_stream = _Stream(good, rows)
    bad_stream = _Stream(bad, rows) if strength > 0 else None
    stops = torch.tensor(sorted(good.stops), dtype=torch.int64, device=good.device)
    size = len(good.tokenizer)  # vocabularies are padded to different sizes
    written = torch.zeros(len(rows), 0, dtype=torch.int64, device=good.device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=good.device)
    for step in range(max_tokens):
        log_bad = None if bad_stream is None else bad_stream.log_p()[:, :size].to(good.device)
        weights = contrast(good_stream.log_p()[:, :size], log_bad, strength, alpha)
        tokens = draw(weights, draws[:, step])
        written = torch.cat([written, tokens[:, None]], dim=1)
        ended |= torch.isin(tokens, stops)
        if bool(ended.all()) or step + 1 == max_tokens:
            break
        for stream in (good_stream, bad_stream):
            if stream is not None:
                stream.add(tokens)
    for row in written.tolist():
        end = next((at for at, token in enumerate(row) if token in good.stops), None)
        yield Continuation(good.decode(row[:end]), tuple(row[:end]), "length" if end is None else "stop")


class _Stream:
    """A model that reads a batch of prefixes, and then one token of each at a time, with its keys and values kept."""

    def __init__(self, model: CausalModel, rows: Sequence[Sequence[int]]):
        self._model = model
        tokens, self._mask = padded(rows, model.device, left=True)
        # whole prefixes times the vocabulary would fill the memory; nearly all models can leave that out
        last_alone = "logits_to_keep" in inspect.signature(model.model.forward).parameters
        self._options = {"logits_to_keep": 1} if last_alone else {}
        self._cache: Any = None
        self._read(tokens, (self._mask.cumsum(dim=-1) - 1).clamp(min=0))

    def add(self, tokens: torch.Tensor) -> None:
        """Read the next token of each text, int64 [N]."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        self._read(tokens.to(self._model.device)[:, None], self._mask.sum(dim=-1, keepdim=True) - 1)

    def log_p(self) -> torch.Tensor:
        """Log probabilities of the next token, float32 [N, V]."""
        logits: torch.Tensor = self._logits
        return logits.float().log_softmax(dim=-1)

    def _read(self, tokens: torch.Tensor, positions: torch.Tensor) -> None:
        with torch.inference_mode():
            answer = self._model.model(
                input_ids=tokens,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                **self._options,
            )
        self._cache, self._logits = answer.past_key_values, answer.logits[:, -1]
