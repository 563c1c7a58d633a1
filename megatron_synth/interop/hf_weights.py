"""Weights between megatron-core's GPT model and Hugging Face's Llama and its relatives, without either library.

Both sides compute the same function: RMSNorm, rotate-half RoPE, grouped-query attention, SwiGLU. They differ in names, which
are in the table of `model/architecture.py`, and in how two matrices, and the bias of the first, are stored:

- `linear_qkv.weight` [(A + 2 G) D, H] holds, for each of the G query groups, its A / G query heads, then its key
  head, then its value head; Hugging Face has `q_proj` [A D, H], `k_proj` and `v_proj` [G D, H], heads in that order.
- `linear_fc1.weight` [2 F, H] is `gate_proj` [F, H] above `up_proj` [F, H].

Padding of the vocabulary. Our embedding and output layer have V' = `padded_vocab_size(V)` rows. Those beyond V are no tokens:
the loss gives them no probability, and nothing depends on them. So `to_hf_state` leaves them out and `hf_config` writes V as
`vocab_size`; `from_hf_state` adds rows of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import ModelConfig
from megatron_synth.model.architecture import Weight, weights

if TYPE_CHECKING:
    from torch import Tensor

HF_EMBEDDING = "model.embed_tokens.weight"
HF_OUTPUT = "lm_head.weight"
_LAST_NORM = "decoder.final_layernorm.weight"


def _check(state: Mapping[str, Tensor], shapes: dict[str, tuple[int, ...]], vocabulary: set[str]) -> None:
    """UserError unless `state` has exactly these tensors; those of `vocabulary` may have any one number of rows."""
    problems = [f"{name} is missing" for name in sorted(shapes.keys() - state.keys())]
    problems += [f"{name} is not part of the model" for name in sorted(state.keys() - shapes.keys())]
    problems += [
        f"{name} is {list(state[name].shape)}, expected {list(shape)}"
        for name, shape in shapes.items()
        if name in state and name not in vocabulary and tuple(state[name].shape) != shape
    ]
    tables = {name: tuple(state[name].shape) for name in sorted(vocabulary) if name in state}
    rows = {shape[0] for shape in tables.values()}
    if len(rows) > 1 or any(len(shape) != 2 or shape[1] != shapes[name][1] for name, shape in tables.items()):
        width = shapes[next(iter(tables))][1]
        found = ", ".join(f"{name} {list(shape)}" for name, shape in tables.items())
        problems.append(f"expected [vocabulary, {width}] for both ends of the model, found {found}")
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError("the weights do not fit the model's settings:\n  " + "\n  ".join(problems[:8]) + more)


def _places(model: ModelConfig, vocab_size: int | None = None) -> Iterator[tuple[str, list[str], Weight]]:
    """Every tensor of the model: our name, Hugging Face's names of what it is made of, and its row of the table."""
    for weight in weights(model, vocab_size):
        for layer, name in enumerate(weight.names(model.num_layers)):
            yield name, weight.hf_names(layer), weight


def _split(tensor: Tensor, weight: Weight) -> list[Tensor]:
    """Hugging Face's tensors of one of ours, each in memory of its own."""
    import torch

    parts = [tensor]
    if len(weight.hf) > 1:
        rest = weight.shape[1:]
        split = tensor.reshape(weight.blocks, -1, *rest).split([rows for _, rows in weight.hf], dim=1)
        parts = [part.reshape(-1, *rest) for part in split]
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def _join(parts: list[Tensor], weight: Weight) -> Tensor:
    """One of our tensors from Hugging Face's."""
    import torch

    if len(weight.hf) == 1:
        return parts[0].clone()
    rest = weight.shape[1:]
    return torch.cat([part.reshape(weight.blocks, -1, *rest) for part in parts], dim=1).reshape(-1, *rest)


def to_hf_state(state: Mapping[str, Tensor], model: ModelConfig, vocab_size: int) -> dict[str, Tensor]:
    """Hugging Face Llama's weights from ours (full tensors, our names); every tensor has its own memory.

    The first `vocab_size` rows of the vocabulary are tokens; its padding is left out. UserError names tensors that are missing,
    unknown or misshapen.
    """
    places = list(_places(model, vocab_size))
    _check(state, {name: weight.shape for name, _, weight in places}, set())
    hf: dict[str, Tensor] = {}
    for name, theirs, weight in places:
        tensor = state[name][:vocab_size] if weight.has_vocabulary else state[name]
        if name == _LAST_NORM:  # which has logits divided, where Hugging Face's models cannot
            tensor = tensor / model.mup_factor
        hf.update(zip(theirs, _split(tensor, weight), strict=True))
    return hf


def from_hf_state(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Our weights (full tensors) from Hugging Face Llama's.

    The vocabulary is padded as `model` asks, see the module's docstring. UserError names tensors that are missing,
    unknown or misshapen. An `lm_head` beside tied embeddings must equal them.
    """
    import torch

    state = {name: tensor for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}
    if model.share_embeddings_and_output_weights and HF_OUTPUT in state:
        head = state.pop(HF_OUTPUT)
        if HF_EMBEDDING in state and not torch.equal(head, state[HF_EMBEDDING]):
            raise UserError(
                f"{HF_OUTPUT} differs from {HF_EMBEDDING}, but the settings tie them; set tie_word_embeddings false"
            )
    places = list(_places(model))
    shapes = {
        name: (rows * weight.blocks, *weight.shape[1:])
        for _, theirs, weight in places
        for name, (_, rows) in zip(theirs, weight.hf, strict=True)
    }
    _check(state, shapes, {name for _, theirs, weight in places if weight.has_vocabulary for name in theirs})
    ours = {name: _join([state[theirs] for theirs in parts], weight) for name, parts, weight in places}
    for name, _, weight in places:
        if weight.has_vocabulary:
            ours[name] = _pad_rows(ours[name], model)
    return ours


def _pad_rows(table: Tensor, model: ModelConfig) -> Tensor:
    """[V, H] -> [V', H]; the new rows are zeros."""
    import torch

    rows, width = table.shape
    missing = model.padded_vocab_size(rows) - rows
    return torch.cat([table, table.new_zeros((missing, width))]) if missing else table
