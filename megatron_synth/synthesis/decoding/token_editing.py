"""Token editing (ToEdit, arXiv 2412.14689): human text in which a prior model draws anew the tokens that it is sure of.

A token whose probability given the human text before it is at least a threshold p, 0.99 in the paper, is replaced by a draw
from the same distribution; all others stay. It takes one forward pass, as the context is the human text and not the edited one.
With p above 1 nothing is edited. What most often comes out is the same token again: the share that changed is told as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_synth.config.errors import UserError
from megatron_synth.synthesis.decoding.model import CausalModel, draw, padded, uniforms


@dataclass(frozen=True)
class Edited:
    """A text after editing.

    text: the text; the very one that came in where no token changed.
    tokens: of the text that came in, without special ones.
    drawn: tokens that were drawn anew, as their probability was at least p.
    changed: those of them that became another token.
    """

    text: str
    tokens: int
    drawn: int
    changed: int


@dataclass(frozen=True)
class _Chunk:
    """Tokens [begin, begin + len(tokens)) of a text; the first of them has no context and stays."""

    text: int
    begin: int
    tokens: list[int]


def edit(
    prior: CausalModel,
    texts: Sequence[tuple[str, str]],
    *,
    p: float = 0.99,
    top_k: int | None = None,
    seed: int = 0,
    batch_tokens: int = 4096,
    chunk_tokens: int = 1024,
) -> list[Edited]:
    """Edit texts, in the order in which they come.

    Args:
        prior: the model.
        texts: (key, text); the key decides the draws together with the seed, and must be different for each text.
        p: probability from which on a token is drawn anew, above 0.
        top_k: draw among this many likeliest tokens alone; None: among all.
        seed: of the draws.
        batch_tokens: tokens of a forward pass, padding included; it holds as many rows of the vocabulary in memory, 0.8 GB for
            4096 tokens of a vocabulary of 49,000. Sums of another batch may round otherwise, which moves a probability at p.
        chunk_tokens: texts are cut into chunks of this many tokens, or of the model's context if that is shorter.

    Raises:
        UserError: p is not above 0, top_k is below 1, or a chunk is below two tokens or longer than a batch.
    """
    size = min(chunk_tokens, prior.context)
    if not p > 0:
        raise UserError(f"p: expected a probability above 0 (above 1 edits nothing), got {p}")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k: expected at least 1, got {top_k}")
    if not 2 <= size <= batch_tokens:
        raise UserError(f"chunk_tokens: expected 2 to {batch_tokens}, the tokens of a batch, got {size}")
    rows = [prior.encode(text) for _, text in texts]
    after = [list(row) for row in rows]
    drawn = [0] * len(rows)
    chunks = [
        _Chunk(number, begin, row[begin : begin + size])
        for number, row in enumerate(rows)
        for begin in range(0, len(row), size)
    ]
    chunks = [chunk for chunk in chunks if len(chunk.tokens) > 1]
    draws = [uniforms(seed, key, len(row)) for (key, _), row in zip(texts, rows, strict=True)]
    for batch in _batches(chunks, batch_tokens):
        for chunk, (places, tokens) in zip(batch, _drawn(prior, batch, draws, p, top_k), strict=True):
            drawn[chunk.text] += len(places)
            for place, token in zip(places, tokens, strict=True):
                after[chunk.text][chunk.begin + place] = token
    special = prior.special.cpu()
    found = []
    for (_, text), before, new, count in zip(texts, rows, after, drawn, strict=True):
        changed = sum(one != other for one, other in zip(before, new, strict=True))
        whole = sum(not special[token] for token in before)
        found.append(Edited(prior.decode(new) if changed else text, whole, count, changed))
    return found


def token_probabilities(prior: CausalModel, rows: Sequence[Sequence[int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each row of T tokens, in one forward pass: the distributions that its tokens 2..T come from, and theirs in it.

    Yields log probabilities float32 [T - 1, V] and those of the tokens [T - 1], on the model's device.
    """
    tokens, mask = padded(rows, prior.device, left=False)
    with torch.inference_mode():
        logits = prior.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        for number, row in enumerate(rows):
            log_p = logits[number, : len(row) - 1].float().log_softmax(dim=-1)
            yield log_p, log_p.gather(1, tokens[number, 1 : len(row), None]).squeeze(1)


def _drawn(
    prior: CausalModel, batch: Sequence[_Chunk], draws: Sequence[np.ndarray], p: float, top_k: int | None
) -> Iterator[tuple[list[int], list[int]]]:
    """Of each chunk: the places of tokens that are drawn anew, and what was drawn."""
    for chunk, (log_p, of_tokens) in zip(batch, token_probabilities(prior, [one.tokens for one in batch]), strict=True):
        text = ~prior.special[torch.tensor(chunk.tokens[1:], device=prior.device)]
        at = torch.nonzero((of_tokens.exp() >= p) & text).squeeze(1)
        if not at.numel():
            yield [], []
            continue
        weights = log_p[at].masked_fill(prior.special, -torch.inf)
        if top_k is not None and top_k < weights.shape[-1]:
            weights = weights.masked_fill(weights < weights.topk(top_k).values[:, -1:], -torch.inf)
        places = (at + 1).tolist()
        uniform = torch.from_numpy(draws[chunk.text][[chunk.begin + place for place in places]]).to(prior.device)
        yield places, draw(weights, uniform).tolist()


def _batches(chunks: Sequence[_Chunk], tokens: int) -> Iterator[Sequence[_Chunk]]:
    """Chunks of like length together, so that little is padded, up to `tokens` in all."""
    order = sorted(chunks, key=lambda chunk: (-len(chunk.tokens), chunk.text, chunk.begin))
    begin = 0
    while begin < len(order):
        count = tokens // len(order[begin].tokens)
        yield order[begin : begin + count]
        begin += count
