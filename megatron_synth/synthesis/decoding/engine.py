"""Token editing and contrastive decoding as an engine: requests, answers, filters and account are those of all kinds.

A request's material is edited or continued, and not its prompt: these kinds put no words around a text. A continuation is kept
behind its prefix, so that the document begins as the natural one does.

Tokens in are those that the models read, tokens out those that were drawn: of token editing, the tokens drawn anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_synth.config.synthesis import DecodingConfig, EngineConfig, SamplingConfig
from megatron_synth.core.log import show
from megatron_synth.synthesis.answers.parts import REFUSED, Answer
from megatron_synth.synthesis.engines.base import Capabilities, Sink
from megatron_synth.synthesis.requests import Request

if TYPE_CHECKING:
    from megatron_synth.synthesis.decoding.model import CausalModel


@dataclass
class _Totals:
    tokens: int = 0
    drawn: int = 0
    changed: int = 0


class DecodingEngine:
    """Models of transformers in this process.

    Args:
        model: the folder of the prior, or of the good model.
        against: the folder of the bad model, of contrastive decoding.
    """

    def __init__(
        self, model: str, against: str | None, decoding: DecodingConfig, engine: EngineConfig, sampling: SamplingConfig
    ):
        assert (against is not None) == (decoding.method == "contrastive")
        self.group = engine.batch_size
        self._folders = [Path(folder) for folder in (model, against) if folder is not None]
        self._decoding, self._engine, self._sampling = decoding, engine, sampling
        self._models: list[CausalModel] = []
        self._totals = _Totals()

    def check(self) -> Capabilities:
        """Load the models.

        Raises:
            UserError: one cannot be loaded.
        """
        self._load()
        return Capabilities(min(model.context for model in self._models), None)

    def _load(self) -> None:
        if self._models:
            return
        import torch

        from megatron_synth.synthesis.decoding.model import load

        device, dtype = self._engine.device, self._engine.dtype
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        weights = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        self._models = [load(folder, device, weights) for folder in self._folders]

    def run(self, requests: Iterator[Request], sink: Sink, max_tokens: int) -> None:
        """Answer requests batch by batch; a batch's answers are kept together."""
        self._load()
        answer = self._edited if self._decoding.method == "token-editing" else self._continued
        while batch := list(islice(requests, self.group)):
            start = time.perf_counter()
            found = answer(batch, max_tokens)
            seconds = (time.perf_counter() - start) / len(batch)
            sink([(request, _timed(one, seconds)) for request, one in zip(batch, found, strict=True)])
        if self._totals.tokens:
            drawn, changed = (100 * count / self._totals.tokens for count in (self._totals.drawn, self._totals.changed))
            show(f"token editing: {drawn:.2f} % of the tokens were drawn anew, {changed:.2f} % changed", error=True)

    def _edited(self, batch: Sequence[Request], max_tokens: int) -> list[Answer]:
        from megatron_synth.synthesis.decoding.token_editing import edit

        found = edit(self._models[0], _texts(batch), p=self._decoding.p, top_k=self._sampling.top_k or None)
        for one in found:
            self._totals.tokens += one.tokens
            self._totals.drawn += one.drawn
            self._totals.changed += one.changed
        return [Answer(one.text, "stop", one.tokens, one.drawn) for one in found]

    def _continued(self, batch: Sequence[Request], max_tokens: int) -> list[Answer]:
        from megatron_synth.synthesis.decoding.contrastive import continue_texts

        good, bad = self._models
        room = min(good.context, bad.context) - max_tokens
        lengths = [len(good.encode(request.material[0])) for request in batch]
        fits = [1 <= length <= room for length in lengths]
        asked = [text for text, fit in zip(_texts(batch), fits, strict=True) if fit]
        settings = self._decoding
        found = continue_texts(
            good, bad, asked, max_tokens=max_tokens, strength=settings.strength, alpha=settings.alpha, batch_size=self.group
        )
        made = iter(found)
        answers = []
        for request, length, fit in zip(batch, lengths, fits, strict=True):
            if not fit:
                answers.append(Answer(f"the prefix has {length} tokens, 1 to {room} fit", REFUSED, length, 0))
                continue
            one = next(made)
            count = len(one.tokens) + (one.finish_reason == "stop")
            answers.append(Answer(request.material[0] + one.text, one.finish_reason, length, count))
        return answers

    def facts(self) -> dict[str, Any]:
        """Method, versions, device and type of the weights."""
        import torch
        import transformers

        self._load()
        return {
            "engine": self._decoding.method,
            "version": transformers.__version__,
            "torch": torch.__version__,
            "device": self._models[0].device.type,
            "dtype": str(self._models[0].model.dtype).removeprefix("torch."),
            "batch_size": self.group,
        }

    def close(self) -> None:
        """Let the weights go."""
        self._models = []


def _texts(batch: Sequence[Request]) -> list[tuple[str, str]]:
    """The key decides the draws: it holds the seed of the run."""
    return [(request.key, request.material[0]) for request in batch]


def _timed(answer: Answer, seconds: float) -> Answer:
    return Answer(answer.text, answer.finish, answer.tokens_in, answer.tokens_out, answer.cached, seconds)
