"""transformers in this process: nothing to install or start, on CPU or GPU.

What holds. Each request has a seed of its own, and rows of a batch do not see each other, so that a text depends on its
neighbors by rounding alone: a batch of another shape adds in another order, and a token whose uniform number lies within that
rounding of a border comes out otherwise. So requests are always batched alike: request n is in batch n // batch_size, also in
a run that goes on, which makes a batch that was not finished whole again. The same file on the same machine gives the same
bytes, however often it was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.config.synthesis import EngineConfig, SamplingConfig
from megatron_synth.synthesis.answers.parts import REFUSED, Answer
from megatron_synth.synthesis.engines.base import Capabilities, Sink
from megatron_synth.synthesis.engines.drawing import SeededDraw
from megatron_synth.synthesis.requests import Prompt, Request


class Embedded:
    """A model of transformers."""

    def __init__(self, model: str, revision: str | None, engine: EngineConfig, sampling: SamplingConfig, stop: Sequence[str]):
        self.group = engine.batch_size
        self._name, self._revision, self._engine = model, revision, engine
        self._sampling, self._stop = sampling, tuple(stop)
        self._model: Any = None
        self._tokenizer: Any = None

    def check(self) -> Capabilities:
        """Load the model.

        Raises:
            UserError: it cannot be loaded, or has no tokenizer.
        """
        self._load()
        context = getattr(self._model.config, "max_position_embeddings", None)
        return Capabilities(context, self._tokenizer.chat_template is not None)

    def _load(self) -> None:
        if self._model is not None:
            return
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UserError(
                f"engine.name: transformers is not installed ({error}); pip install 'megatron-synth[synthesis]'"
            ) from None
        device = self._engine.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        where: dict[str, Any] = {"revision": self._revision} if self._revision else {}
        if Path(self._name).is_dir():
            where["local_files_only"] = True
        try:
            # code that a model brings along is not run
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(self._name, trust_remote_code=False, **where)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                self._name, dtype=self._engine.dtype, trust_remote_code=False, **where
            )
            self._model = model.to(device).eval()
        except Exception as error:  # the library has no common base for missing files, formats and the network
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"generator.model: cannot load {self._name!r}: {reason}; check the folder or name") from None
        self._tokenizer.padding_side = "left"
        if self._tokenizer.eos_token_id is None:
            raise UserError(
                f"generator.model: {self._name!r} has no token that ends a text; set eos_token in its tokenizer_config.json"
            )
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token_id = self._tokenizer.eos_token_id

    @property
    def parameters(self) -> int:
        """Of the loaded model."""
        self._load()
        return sum(weight.numel() for weight in self._model.parameters())

    def run(self, requests: Iterator[Request], sink: Sink, max_tokens: int) -> None:
        """Answer requests batch by batch; a batch's answers are kept together."""
        self._load()
        while batch := list(islice(requests, self.group)):
            sink(self._answer(batch, max_tokens))

    def _answer(self, batch: list[Request], max_tokens: int) -> list[tuple[Request, Answer]]:
        import torch
        from transformers import LogitsProcessorList

        start = time.perf_counter()
        device, tokenizer = self._model.device, self._tokenizer
        prompts = [self._tokens(request.prompt) for request in batch]
        longest = max(map(len, prompts))
        context = getattr(self._model.config, "max_position_embeddings", None)
        if context is not None and longest + max_tokens > context:
            kept = []
            for request, prompt in zip(batch, prompts, strict=True):
                if len(prompt) + max_tokens > context:
                    told = f"the prompt has {len(prompt)} tokens and the answer {max_tokens}, the model's context is {context}"
                    kept.append((request, Answer(told, REFUSED, len(prompt), 0)))
            rest = [request for request, prompt in zip(batch, prompts, strict=True) if len(prompt) + max_tokens <= context]
            return kept + (self._answer(rest, max_tokens) if rest else [])
        pad, ends = tokenizer.pad_token_id, self._ends()
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        sampling = self._sampling
        draw = SeededDraw(
            [request.seed for request in batch], max_tokens, sampling.temperature, sampling.top_p, sampling.top_k, device
        )
        stopping = {"stop_strings": list(self._stop), "tokenizer": tokenizer} if self._stop else {}
        with torch.inference_mode():
            found = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([draw]),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=max_tokens,
                pad_token_id=pad,
                eos_token_id=ends,
                **stopping,
            )
        made = found[:, longest:].tolist()
        seconds = (time.perf_counter() - start) / len(batch)
        answers = [self._text(row, ends, max_tokens) for row in made]
        return [
            (request, Answer(text, finish, len(prompt), count, 0, seconds))
            for request, prompt, (text, finish, count) in zip(batch, prompts, answers, strict=True)
        ]

    def _text(self, row: list[int], ends: list[int], max_tokens: int) -> tuple[str, str, int]:
        """Text, why it ends, and tokens, of what was generated."""
        end = next((at for at, token in enumerate(row) if token in ends), None)
        count = len(row) if end is None else end + 1
        # with several rows `generate` pads those that have stopped; where a stop string stood it stops without an end token
        tokens = row if end is None else row[:end]
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        places = [place for place in (text.find(mark) for mark in self._stop) if place >= 0]
        if places:
            return text[: min(places)], "stop", count
        return text, "stop" if end is not None or count < max_tokens else "length", count

    def _ends(self) -> list[int]:
        """Tokens that end a text, the model's own and the tokenizer's."""
        own = self._model.generation_config.eos_token_id
        found = {self._tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])}
        return sorted(found)

    def _tokens(self, prompt: Prompt) -> list[int]:
        if prompt.tokens:
            return list(prompt.tokens)
        if prompt.messages:
            messages = [{"role": role, "content": content} for role, content in prompt.messages]
            ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            ids = self._tokenizer(prompt.text)["input_ids"]
        found: list[int] = list(ids)
        return found

    def facts(self) -> dict[str, Any]:
        """Name, versions, device and type of the weights."""
        import torch
        import transformers

        self._load()
        return {
            "engine": "transformers",
            "version": transformers.__version__,
            "torch": torch.__version__,
            "device": self._model.device.type,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "batch_size": self.group,
        }

    def close(self) -> None:
        """Let the weights go."""
        self._model = self._tokenizer = None
