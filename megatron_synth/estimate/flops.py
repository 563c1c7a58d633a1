"""Parameters and FLOPs of a model, counted without building it.

One convention everywhere: FLOPs per token = 6 x (body + head parameters) + 12 x layers x query channels x sequence. That is
forward and backward, 2 FLOPs per multiply-add; full attention, not the causal half; the embedding look-up not counted;
recomputation not counted. (PaLM, Chowdhery et al. 2022, appendix B, with the head counted among the parameters.) In a layer
with a window a token counts twice the tokens that it sees, as without one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_synth.config.schema import ModelConfig
from megatron_synth.model.architecture import weights


@dataclass(frozen=True)
class Parameters:
    """Exact parameter counts by component, of the whole model. H hidden, F MLP, D head, A heads, G key/value heads."""

    embedding: int
    """Padded vocabulary x H."""
    attention: int
    """Query and output (2 H A D) and key and value (2 H G D) of all layers."""
    mlp: int
    """Gate, up and down, 3 H F, of all layers."""
    norms: int
    """Two per layer and the last one, H each."""
    head: int
    """Padded vocabulary x H; 0 when the output layer is tied to the embedding."""
    head_product: int
    """Size of the output layer's matrix product, which a tied model computes too."""

    @property
    def non_embedding(self) -> int:
        """The body: layers and last norm, neither the embedding nor the output layer."""
        return self.attention + self.mlp + self.norms

    @property
    def total(self) -> int:
        """All that is trained."""
        return self.embedding + self.non_embedding + self.head


def count_parameters(model: ModelConfig, vocab_size: int | None = None) -> Parameters:
    """Parameters of `model` with a vocabulary of `vocab_size` tokens before padding (default: model.vocab_size)."""
    vocab_size = vocab_size or model.vocab_size
    assert vocab_size is not None, "the vocabulary is not known before the data's tokenizer"
    counted: Counter[str] = Counter()
    for weight in weights(model, vocab_size):
        counted[weight.part] += weight.size() * (model.num_layers if weight.in_layers else 1)
    return Parameters(
        embedding=counted["embedding"],
        attention=counted["attention"],
        mlp=counted["mlp"],
        norms=counted["norm"],
        head=counted["head"],
        head_product=counted["head"] or counted["embedding"],
    )


def flops_per_token(model: ModelConfig, sequence_length: int, vocab_size: int | None = None) -> int:
    """FLOPs to train on one token, by the module's convention."""
    parameters = count_parameters(model, vocab_size)
    attention = 12 * model.num_attention_heads * model.head_dim * attended(model, sequence_length)
    return 6 * (parameters.non_embedding + parameters.head_product) + round(attention)


def attended(model: ModelConfig, sequence_length: int) -> float:
    """Tokens that a token is counted to attend to in a row of S, over all layers: S in each, or, with a window of W < S,
    2 W - W^2 / S.

    That is twice what it sees on average under the causal mask, W - W^2 / (2 S), which without a window is S / 2.
    """
    windows = (model.window_of(layer) for layer in range(model.num_layers))
    return sum(
        sequence_length if window is None or window >= sequence_length else 2 * window - window**2 / sequence_length
        for window in windows
    )
