"""The architecture: one table of the model's tensors. Pure Python, so that estimates need no torch.

What is known of a tensor is in its row: name, shape, the axis that tensor-parallel ranks share, initial values, weight decay,
its name in checkpoints, and its name or names at Hugging Face. Derived from these rows are initial values, counts of parameters
and FLOPs, the memory model, the checks of checkpoints, the exchange with Hugging Face, sizes of FP8 products and kernels, and
the parameter groups of the optimizer. `initialize_weights` checks the table against every model that is built.

A new tensor is a row here, its module in `spec.py`, and its field in `ModelConfig`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from megatron_synth.config.schema import ModelConfig

Part = Literal["embedding", "attention", "mlp", "norm", "head"]
Initial = Literal["ones", "zeros", "normal", "residual"]

LAYERS = "decoder.layers."
"""What megatron-core's names of the tensors of all layers begin with."""
HF_LAYERS = "model.layers."
"""What Hugging Face's names of them begin with."""


@dataclass(frozen=True)
class Dimensions:
    """The sizes that shapes are made of, of the whole model."""

    hidden: int
    """Width of the residual stream (H)."""
    queries: int
    """Channels of all query heads (A D)."""
    keys: int
    """Channels of all key heads, and of all value heads (G D)."""
    groups: int
    """Key/value heads (G)."""
    ffn: int
    """Width of the MLP (F)."""

    @classmethod
    def of(cls, model: ModelConfig) -> Dimensions:
        """The sizes that a configuration asks for."""
        channels, groups = model.head_dim, model.query_groups
        return cls(model.hidden_size, model.num_attention_heads * channels, groups * channels, groups, model.ffn_hidden_size)


@dataclass(frozen=True)
class Weight:
    """One tensor of the model, or one of every layer."""

    name: str
    """megatron-core's name; of a tensor of the layers, the name within its layer."""
    shape: tuple[int, ...]
    """Of the whole tensor, unsharded."""
    part: Part
    """The component that it is counted to."""
    hf: tuple[tuple[str, int], ...]
    """Hugging Face's tensors that it is made of, each with its number of rows in one of the `blocks`; names as in `name`."""
    axis: int | None = None
    """The axis that tensor-parallel ranks share; None: each rank has the whole."""
    initial: Initial = "normal"
    """ones, zeros, N(0, std^2), or N(0, std^2 / (2 layers)) for what writes to the residual stream."""
    decays: bool = True
    """Whether weight decay applies."""
    in_layers: bool = True
    """Whether every layer has one."""
    blocks: int = 1
    """The rows are so many equal blocks, and each holds its rows of every tensor in `hf`."""
    saved_as: str = ""
    """Its name in checkpoints, where that is not `name`."""

    @property
    def key(self) -> str:
        """Its name in checkpoints, where the tensors of all layers are one with the layers as its first axis."""
        return (LAYERS if self.in_layers else "") + (self.saved_as or self.name)

    @property
    def has_vocabulary(self) -> bool:
        """Whether its rows are the tokens of the vocabulary, and padding."""
        return self.part in ("embedding", "head")

    @property
    def is_product(self) -> bool:
        """Whether it is the matrix of a product within a layer: what FP8 can take."""
        return self.in_layers and len(self.shape) == 2

    def saved_shape(self, layers: int) -> tuple[int, ...]:
        """Shape in a checkpoint of a model of so many layers."""
        return (layers, *self.shape) if self.in_layers else self.shape

    def names(self, layers: int) -> list[str]:
        """megatron-core's full names of it in a model of so many layers."""
        return [f"{LAYERS}{layer}.{self.name}" for layer in range(layers)] if self.in_layers else [self.name]

    def hf_names(self, layer: int) -> list[str]:
        """Hugging Face's full names of what it is made of, in a layer."""
        return [f"{HF_LAYERS}{layer}.{name}" if self.in_layers else name for name, _ in self.hf]

    def size(self, tensor: int = 1) -> int:
        """Elements on one of `tensor` tensor-parallel ranks."""
        return math.prod(self.shape) // (1 if self.axis is None else tensor)


def _norm(name: str, hf: str, size: int, *, axis: int | None = None, in_layers: bool = True, saved_as: str = "") -> Weight:
    return Weight(
        name, (size,), "norm", ((hf, size),), axis, initial="ones", decays=False, in_layers=in_layers, saved_as=saved_as
    )


# In checkpoints the norms before attention and MLP have the names that TransformerEngine's fused norm + linear gives them, as
# in megatron-core's own specs, so that a checkpoint does not depend on the backend that wrote it.


def _attention(model: ModelConfig, d: Dimensions) -> list[Weight]:
    """The tensors of a layer's attention, its norms among them."""
    rows, shares = d.queries + 2 * d.keys, (d.queries // d.groups, d.keys // d.groups, d.keys // d.groups)
    letters = tuple(zip("qkv", shares, strict=True))
    matrices = tuple((f"self_attn.{letter}_proj.weight", share) for letter, share in letters)
    biases = tuple((f"self_attn.{letter}_proj.bias", share) for letter, share in letters)
    qkv, proj = "self_attention.linear_qkv", "self_attention.linear_proj"
    found = [Weight(f"{qkv}.weight", (rows, d.hidden), "attention", matrices, 0, blocks=d.groups)]
    if model.add_qkv_bias:
        found.append(Weight(f"{qkv}.bias", (rows,), "attention", biases, 0, "zeros", decays=False, blocks=d.groups))
    if model.qk_norm != "off":
        # over all heads it has a weight for every channel, which tensor-parallel ranks share as they share the heads
        whole = model.qk_norm == "all_heads"
        for letter, channels in (("q", d.queries), ("k", d.keys)):
            name, hf = f"self_attention.{letter}_layernorm.weight", f"self_attn.{letter}_norm.weight"
            found.append(_norm(name, hf, channels if whole else model.head_dim, axis=0 if whole else None))
    output = (("self_attn.o_proj.weight", d.hidden),)
    found.append(Weight(f"{proj}.weight", (d.hidden, d.queries), "attention", output, 1, "residual"))
    if model.norm_placement == "before":
        return [
            _norm("input_layernorm.weight", "input_layernorm.weight", d.hidden, saved_as=f"{qkv}.layer_norm_weight"),
            *found,
        ]
    after = _norm(
        "self_attn_bda.norm.weight", "post_attention_layernorm.weight", d.hidden, saved_as="post_self_attn_layernorm.weight"
    )
    return [*found, after]


def _mlp(model: ModelConfig, d: Dimensions) -> list[Weight]:
    """The tensors of a layer's MLP, its norm among them."""
    gate_and_up = (("mlp.gate_proj.weight", d.ffn), ("mlp.up_proj.weight", d.ffn))
    found = [
        Weight("mlp.linear_fc1.weight", (2 * d.ffn, d.hidden), "mlp", gate_and_up, 0),
        Weight("mlp.linear_fc2.weight", (d.hidden, d.ffn), "mlp", (("mlp.down_proj.weight", d.hidden),), 1, "residual"),
    ]
    if model.norm_placement == "before":
        saved_as = "mlp.linear_fc1.layer_norm_weight"
        return [_norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", d.hidden, saved_as=saved_as), *found]
    after = _norm("mlp_bda.norm.weight", "post_feedforward_layernorm.weight", d.hidden, saved_as="post_mlp_layernorm.weight")
    return [*found, after]


@lru_cache(maxsize=256)
def weights(model: ModelConfig, vocab_size: int | None = None) -> tuple[Weight, ...]:
    """The table.

    Args:
        model: the configuration.
        vocab_size: tokens of the vocabulary before padding. Default: the configuration's. Where neither is known, what has
            rows for tokens has none.
    """
    d = Dimensions.of(model)
    rows = model.padded_vocab_size(vocab_size or model.vocab_size or 0)

    def table(name: str, hf: str, part: Part) -> Weight:
        return Weight(name, (rows, d.hidden), part, ((hf, rows),), 0, in_layers=False)

    found = [
        table("embedding.word_embeddings.weight", "model.embed_tokens.weight", "embedding"),
        *_attention(model, d),
        *_mlp(model, d),
        _norm("decoder.final_layernorm.weight", "model.norm.weight", d.hidden, in_layers=False),
    ]
    if not model.share_embeddings_and_output_weights:
        found.append(table("output_layer.weight", "lm_head.weight", "head"))
    return tuple(found)


def by_key(model: ModelConfig, vocab_size: int | None = None) -> dict[str, Weight]:
    """The table by names in checkpoints."""
    return {weight.key: weight for weight in weights(model, vocab_size)}


def norm_keys(model: ModelConfig) -> dict[str, str]:
    """What megatron-core's sharded_state_dict_keys_map is given: module of a layer -> what checkpoints call its tensors."""
    ending = "weight"
    renamed = {weight.name: weight.saved_as for weight in weights(model) if weight.saved_as}
    return {name.removesuffix(ending): saved_as.removesuffix(ending) for name, saved_as in renamed.items()}


def products(model: ModelConfig, tensor: int = 1) -> dict[str, tuple[int, int]]:
    """Output and input channels of each product of a layer on one of `tensor` ranks, by module: `linear_qkv` and so on."""
    found = {}
    for weight in weights(model):
        if weight.is_product:
            outputs, inputs = (size // tensor if axis == weight.axis else size for axis, size in enumerate(weight.shape))
            found[weight.name.split(".")[-2]] = (outputs, inputs)
    return found


_NO_PART = {"name", "hf_family", "vocab_size", "make_vocab_size_divisible_by", "init_method_std"}
"""Settings that the meaning of the weights does not depend on; rows that pad the vocabulary have none."""


def settings(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """What the meaning of the weights depends on, by the names that a user knows."""
    found = {f"model.{name}": value for name, value in model if name not in _NO_PART}
    found["model.num_query_groups"] = model.query_groups
    found["model.kv_channels"] = model.head_dim
    found["the vocabulary"] = vocab_size
    return found
