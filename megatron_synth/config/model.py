"""The `model` section of a training configuration. Each field's docstring is its description."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_synth.config.section import NonNegativeInt, PositiveInt, Section


class RopeScaling(Section):
    """Scaled frequencies of the rotary embedding, by the names of Hugging Face's config.json."""

    rope_type: Literal["linear", "llama3", "yarn"]
    """linear divides every frequency; llama3 (Llama 3.1 and later) and yarn divide the low ones."""
    factor: Annotated[float, Field(ge=1, le=1e6)]
    """What frequencies are divided by: as a rule the new context length over the old."""
    original_max_position_embeddings: PositiveInt | None = None
    """Context length that the model was first trained with. Required by llama3 and yarn."""
    low_freq_factor: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """llama3: periods of original_max_position_embeddings / this and more are scaled in full."""
    high_freq_factor: Annotated[float, Field(gt=0, le=1e6)] = 4.0
    """llama3: periods of original_max_position_embeddings / this and less are not scaled."""
    beta_fast: Annotated[float, Field(gt=0, le=1e6)] = 32.0
    """yarn: channels of so many turns within the original context and more are not scaled."""
    beta_slow: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """yarn: channels of so many turns within the original context and less are scaled in full."""
    attention_factor: Annotated[float, Field(gt=0, le=1e3)] | None = None
    """yarn: factor of cos and sin. Default: 0.1 ln(factor) + 1."""
    truncate: bool = True
    """yarn: whole channels at the ends of the passage."""


class ModelConfig(Section):
    """A decoder-only model of the Llama kind: RoPE, RMSNorm, SwiGLU, with the variations of its relatives."""

    name: str = "custom"
    """Name shown in the run header and in tables."""
    num_layers: Annotated[int, Field(ge=1, le=10_000)]
    """Transformer layers (L)."""
    hidden_size: Annotated[int, Field(ge=1, le=2**20)]
    """Width of the residual stream (H)."""
    ffn_hidden_size: Annotated[int, Field(ge=1, le=2**22)]
    """Width of the SwiGLU MLP (F)."""
    num_attention_heads: Annotated[int, Field(ge=1, le=2**16)]
    """Query heads (A)."""
    num_query_groups: PositiveInt | None = None
    """Key/value heads (G); fewer than query heads gives grouped-query attention. Default: as many as query heads."""
    vocab_size: PositiveInt | None = None
    """Tokens in the vocabulary (V). Default: that of the data's tokenizer."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """The embedding is padded to a multiple of this, in every layout. Rows of padding have no probability and no gradient."""
    share_embeddings_and_output_weights: bool = False
    """Tie the output layer to the embedding."""
    rotary_base: Annotated[float, Field(gt=0)] = 10_000.0
    """Base period of the rotary position embedding."""
    rope_scaling: RopeScaling | None = None
    """Scaled frequencies, for texts longer than those of the first training. Default: none."""
    kv_channels: Annotated[int, Field(ge=2, le=2**12)] | None = None
    """Channels of one head (D). Default: hidden_size / num_attention_heads."""
    add_qkv_bias: bool = False
    """Biases on queries, keys and values, as in Qwen 2 and 2.5."""
    qk_norm: Literal["off", "head", "all_heads"] = "off"
    """RMSNorm of queries and keys before they are rotated: each head by itself with one weight for all heads, as in Qwen 3, or
    over all heads at once, as in OLMo 2."""
    norm_placement: Literal["before", "after"] = "before"
    """Where the norms of a layer are: before attention and MLP, or, as in OLMo 2, on what they add to the residual stream."""
    sliding_window: PositiveInt | None = None
    """Tokens that a token sees, itself included, as in Mistral 7B 0.1. Default: all before it."""
    sliding_window_first_layer: NonNegativeInt = 0
    """The first layer, from 0, that has the window; those before it see everything, as in Qwen 2."""
    hf_family: Literal["llama", "mistral", "qwen2", "qwen3", "olmo2"] | None = None
    """Hugging Face's class that `convert to-hf` writes. Default: the first of these that has what the model has."""
    norm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    """Epsilon of RMSNorm."""
    init_method_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights; those that write to the residual stream get it / sqrt(2 L)."""

    mup_base_hidden_size: PositiveInt | None = None
    """Maximal-update parametrization (arXiv 2203.03466): learning rate, weight decay and initial weights are those of a model
    of this width, and carry to this model's: with m = hidden_size / mup_base_hidden_size, matrices of the layers begin with
    1 / sqrt(m) of their standard deviation and get lr / m and m x weight decay, logits are divided by m. Widths differ by
    their number of heads, of one size. Default: off."""

    @property
    def mup_factor(self) -> float:
        """m of `mup_base_hidden_size`; 1 without it."""
        return self.hidden_size / self.mup_base_hidden_size if self.mup_base_hidden_size else 1.0

    @property
    def query_groups(self) -> int:
        """Key/value heads, after the default."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Channels of one head (D)."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    def window_of(self, layer: int) -> int | None:
        """Tokens that a token sees in a layer, counted from 0; None: all before it."""
        return self.sliding_window if layer >= self.sliding_window_first_layer else None

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the embedding for a vocabulary of `vocab_size` tokens."""
        multiple = self.make_vocab_size_divisible_by
        return (vocab_size + multiple - 1) // multiple * multiple
