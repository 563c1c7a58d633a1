"""A causal language model of a Hugging Face folder, for kinds of synthetic text that need its probabilities.

`convert to-hf` makes such a folder of a run. The model runs in this process, by transformers, on a CPU or a GPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_synth.config.errors import UserError


@dataclass(frozen=True)
class CausalModel:
    """A model with its tokenizer.

    context: tokens of the longest sequence.
    stops: ids that end a text.
    special: ids that stand for no text, bool [vocabulary], on the model's device; they are never drawn in the middle of a text.
    """

    folder: Path
    model: Any
    tokenizer: Any
    context: int
    stops: frozenset[int]
    special: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with the token in front that the tokenizer begins texts with, if it has one.

        What spells a special token in the text is read letter by letter: a document cannot end itself.
        """
        ids: list[int] = self.tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
        while ids and ids[-1] in self.stops:  # tokenizers that close texts: the model shall go on
            ids.pop()
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def load(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> CausalModel:
    """Read a model and its tokenizer from a folder; nothing is fetched, and no code of the folder is run.

    Raises:
        UserError: the folder holds no causal model of transformers, no tokenizer, or weights that are no safetensors.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        raise UserError("transformers is not installed; `pip install 'megatron-synth[synthesis]'`") from None
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no config.json; expected a folder of Hugging Face's, as `megatron-synth convert to-hf` writes"
        )
    disable_progress_bar()
    try:
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **options).to(device).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{folder}: cannot be read as a causal language model with its tokenizer: {reason}") from None
    size = model.get_output_embeddings().weight.shape[0]
    if len(tokenizer) > size:
        raise UserError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {size}; they do not belong together")
    special = torch.zeros(size, dtype=torch.bool, device=device)
    special[[one for one in tokenizer.all_special_ids if one < size]] = True
    special[len(tokenizer) :] = True  # padding of the vocabulary
    return CausalModel(folder, model, tokenizer, _context(model.config, tokenizer), _stops(model, tokenizer), special)


def _context(config: Any, tokenizer: Any) -> int:
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    limits.append(tokenizer.model_max_length)  # a huge number where nothing is known
    return int(min(limit for limit in limits if limit))


def _stops(model: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for value in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(found)


def uniforms(seed: int, key: str, count: int) -> np.ndarray:
    """Random numbers in [0, 1) of one text, float64 [count]: a function of seed and key, whatever else is in the batch."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(count)


def draw(log_weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw from softmax(log_weights [N, V]) by inversion with uniform float64 [N]; int64 [N]. -inf is never drawn."""
    weights = log_weights.double().softmax(dim=-1)
    ends = weights.cumsum(dim=-1)
    at = torch.searchsorted(ends, (uniform * ends[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    last = weights.shape[-1] - 1 - weights.flip(-1).ne(0).to(torch.int8).argmax(dim=-1)  # rounding must not lead beyond it
    return torch.minimum(at, last)


def padded(rows: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens as one tensor int64 [N, longest] and what is text in it, 0 or 1, of the same shape."""
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        tokens[number, place] = torch.tensor(list(row), dtype=torch.int64)
        mask[number, place] = 1
    return tokens.to(device), mask.to(device)
