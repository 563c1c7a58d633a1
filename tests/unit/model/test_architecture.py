"""The table of tensors against shapes, counts and names that were written down independently."""

from __future__ import annotations

import pytest

from megatron_synth.config.schema import ModelConfig
from megatron_synth.model.architecture import LAYERS, by_key, norm_keys, products, settings, weights
from tests.support import LLAMA3_8B

SMALL = ModelConfig(
    num_layers=3,
    hidden_size=96,
    ffn_hidden_size=160,
    num_attention_heads=6,
    num_query_groups=2,
    vocab_size=257,
    make_vocab_size_divisible_by=64,
)


def test_every_hugging_face_tensor_is_named_once_and_has_its_shape() -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        reference = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=320,
                hidden_size=96,
                intermediate_size=160,
                num_hidden_layers=3,
                num_attention_heads=6,
                num_key_value_heads=2,
                tie_word_embeddings=False,
            )
        )
    found: dict[str, tuple[int, ...]] = {}
    for weight in weights(SMALL):
        for layer in range(len(weight.names(3))):
            for name, (_, rows) in zip(weight.hf_names(layer), weight.hf, strict=True):
                assert name not in found
                found[name] = (rows * weight.blocks, *weight.shape[1:])
    assert found == {name: tuple(parameter.shape) for name, parameter in reference.named_parameters()}


def test_names_in_checkpoints_are_those_of_earlier_ones() -> None:
    assert {key: weight.saved_shape(3) for key, weight in by_key(SMALL).items()} == {
        "embedding.word_embeddings.weight": (320, 96),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (3, 96),
        "decoder.layers.self_attention.linear_qkv.weight": (3, 160, 96),
        "decoder.layers.self_attention.linear_proj.weight": (3, 96, 96),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (3, 96),
        "decoder.layers.mlp.linear_fc1.weight": (3, 320, 96),
        "decoder.layers.mlp.linear_fc2.weight": (3, 96, 160),
        "decoder.final_layernorm.weight": (96,),
        "output_layer.weight": (320, 96),
    }
    assert norm_keys(SMALL) == {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }


def test_a_tied_model_has_no_output_layer() -> None:
    tied = SMALL.model_copy(update={"share_embeddings_and_output_weights": True})
    assert [weight.part for weight in weights(tied) if weight.has_vocabulary] == ["embedding"]


def test_tensor_parallel_ranks_share_the_axis_that_the_table_names() -> None:
    # [outputs, inputs] of Llama-3 8B on one of 8 ranks: 32 heads and 8 key/value heads of 128 channels, 14336 MLP channels
    assert products(LLAMA3_8B, 8) == {
        "linear_qkv": ((4096 + 2 * 1024) // 8, 4096),
        "linear_proj": (4096, 4096 // 8),
        "linear_fc1": (2 * 14336 // 8, 4096),
        "linear_fc2": (4096, 14336 // 8),
    }


def test_vectors_neither_decay_nor_begin_at_random() -> None:
    for weight in weights(SMALL):
        assert weight.decays is (len(weight.shape) == 2), weight.name
        assert (weight.initial == "ones") is (len(weight.shape) == 1), weight.name
    writers = [weight.name for weight in weights(SMALL) if weight.initial == "residual"]
    assert writers == ["self_attention.linear_proj.weight", "mlp.linear_fc2.weight"]


def test_a_model_is_known_by_every_setting_that_its_weights_depend_on() -> None:
    before = settings(SMALL, 257)
    for change in (
        {"num_layers": 4},
        {"ffn_hidden_size": 192},
        {"num_query_groups": 6},
        {"rotary_base": 500_000.0},
        {"norm_epsilon": 1e-6},
        {"share_embeddings_and_output_weights": True},
    ):
        after = settings(SMALL.model_copy(update=change), 257)
        assert [key for key in before if before[key] != after[key]] == [f"model.{name}" for name in change]
    other = {"name": "other", "init_method_std": 0.01, "make_vocab_size_divisible_by": 128}
    assert settings(SMALL.model_copy(update=other), 257) == before
    assert settings(SMALL, 258) != before
    # as many key/value heads as query heads, said or not said, is one model
    assert settings(SMALL.model_copy(update={"num_query_groups": None}), 257)["model.num_query_groups"] == 6


def test_names_of_layers_are_counted_from_zero() -> None:
    (norm,) = [weight for weight in weights(SMALL) if weight.name == "input_layernorm.weight"]
    assert norm.names(2) == [f"{LAYERS}0.input_layernorm.weight", f"{LAYERS}1.input_layernorm.weight"]
    assert norm.hf_names(1) == ["model.layers.1.input_layernorm.weight"]
