"""Weights to Hugging Face and back: bit-exact, and the same function as LlamaForCausalLM."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import ModelConfig
from megatron_synth.interop.hf_folder import read_hf, write_hf
from megatron_synth.interop.hf_settings import hf_config, model_config_from_hf
from megatron_synth.interop.hf_weights import from_hf_state, to_hf_state
from megatron_synth.model.architecture import weights

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
VOCAB = 250  # padded to 256


def model_config(groups: int | None = 2, tied: bool = False, **more: Any) -> ModelConfig:
    return ModelConfig(
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=8,
        num_query_groups=groups,
        make_vocab_size_divisible_by=64,
        share_embeddings_and_output_weights=tied,
        rotary_base=500.0,
        norm_epsilon=1e-5,
        **more,
    )


def random_state(model: ModelConfig, rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        name: (rows, *weight.shape[1:]) if weight.has_vocabulary else weight.shape
        for weight in weights(model)
        for name in weight.names(model.num_layers)
    }
    return {
        name: (torch.randn(shape, generator=generator) * 0.3 + (1.0 if len(shape) == 1 else 0.0)).to(dtype)
        for name, shape in shapes.items()
    }


def reference_logits(state: dict[str, Tensor], model: ModelConfig, tokens: Tensor) -> Tensor:
    """Our layout's forward pass in plain torch; tokens [B, S] -> logits [B, S, V']."""
    batch, length = tokens.shape
    heads, groups, channels = model.num_attention_heads, model.query_groups, model.head_dim
    queries = heads // groups

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.norm_epsilon) * state[name]

    frequency = model.rotary_base ** (-torch.arange(0, channels, 2).float() / channels)
    angle = torch.outer(torch.arange(length).float(), frequency)
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    def rotate(x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    x = state[EMBEDDING][tokens]
    for i in range(model.num_layers):
        layer = f"decoder.layers.{i}."
        mixed = norm(x, layer + "input_layernorm.weight") @ state[layer + "self_attention.linear_qkv.weight"].T
        mixed = mixed.view(batch, length, groups, queries + 2, channels)
        outputs = []
        for group in range(groups):
            key = rotate(mixed[:, :, group, queries])
            value = mixed[:, :, group, queries + 1]
            for head in range(queries):
                query = rotate(mixed[:, :, group, head])
                outputs.append(F.scaled_dot_product_attention(query, key, value, is_causal=True))
        x = x + torch.cat(outputs, -1) @ state[layer + "self_attention.linear_proj.weight"].T
        hidden = norm(x, layer + "pre_mlp_layernorm.weight") @ state[layer + "mlp.linear_fc1.weight"].T
        gate, up = hidden.chunk(2, -1)
        x = x + (F.silu(gate) * up) @ state[layer + "mlp.linear_fc2.weight"].T
    output = state.get(OUTPUT, state[EMBEDDING])
    return norm(x, "decoder.final_layernorm.weight") @ output.T


def assert_equal_states(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert sorted(left) == sorted(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("groups", [None, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_exact(groups: int | None, tied: bool, dtype: torch.dtype) -> None:
    model = model_config(groups, tied)
    state = random_state(model, model.padded_vocab_size(VOCAB), dtype=dtype)
    hf = to_hf_state(state, model, VOCAB)
    assert ("lm_head.weight" in hf) is not tied
    assert len({tensor.untyped_storage().data_ptr() for tensor in hf.values()}) == len(hf)
    tables = {name for name in state if name in (EMBEDDING, OUTPUT)}
    assert hf["model.embed_tokens.weight"].shape == (VOCAB, 32)
    for name in tables:  # padding has no meaning, and is not kept
        state[name][VOCAB:] = 0.0
    assert_equal_states(state, from_hf_state(hf, model))


@pytest.mark.parametrize(("groups", "tied"), [(None, False), (2, False), (2, True)])
def test_llama_for_causal_lm_computes_the_same_logits(groups: int | None, tied: bool, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = model_config(groups, tied)
    state = random_state(model, model.padded_vocab_size(VOCAB))
    write_hf(tmp_path / "hf", to_hf_state(state, model, VOCAB), hf_config(model, VOCAB, 64, "fp32", eos_token_id=0))
    llama, report = LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert llama.dtype == torch.float32 and llama.config.vocab_size == VOCAB
    tokens = torch.randint(VOCAB, (2, 29), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, ours = llama(tokens).logits, reference_logits(state, model, tokens)[..., :VOCAB]
    assert ours.std() > 0.5  # a comparison of something
    assert (theirs - ours).abs().max() < 1e-5 * max(1.0, ours.abs().max().item())


def test_a_model_saved_by_transformers_is_read(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 777.0},
            initializer_range=0.2,
        )
    )
    llama.save_pretrained(tmp_path / "theirs")
    hf, config = read_hf(tmp_path / "theirs")
    model = model_config_from_hf(config)
    assert (model.rotary_base, model.query_groups, model.vocab_size) == (777.0, 2, 97)
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        difference = reference_logits(from_hf_state(hf, model), model, tokens)[..., :97] - llama(tokens).logits
    assert difference.abs().max() < 1e-5


def test_settings_survive_the_round_trip() -> None:
    model = model_config(tied=True, vocab_size=VOCAB)
    back = model_config_from_hf(hf_config(model, VOCAB, 64, "bf16"))
    assert back == model.model_copy(update={"make_vocab_size_divisible_by": 128, "hf_family": "llama"})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("multiple", [1, 7, 64, 128])
def test_an_export_does_not_depend_on_the_padding(tied: bool, multiple: int) -> None:
    exact = model_config(tied=tied, vocab_size=VOCAB).model_copy(update={"make_vocab_size_divisible_by": 1})
    hf = to_hf_state(random_state(exact, VOCAB), exact, VOCAB)
    padded = exact.model_copy(update={"make_vocab_size_divisible_by": multiple})
    state = from_hf_state(hf, padded)
    assert state[EMBEDDING].shape == (padded.padded_vocab_size(VOCAB), 32)
    assert not state[EMBEDDING][VOCAB:].any()
    assert_equal_states(hf, to_hf_state(state, padded, VOCAB))
    assert hf_config(padded, VOCAB, 64, "fp32") == hf_config(exact, VOCAB, 64, "fp32")


def test_weights_are_sharded_above_the_limit_and_read_back(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = model_config()
    hf = to_hf_state(random_state(model, 256), model, VOCAB)
    config = hf_config(model, VOCAB, 64, "fp32")
    write_hf(tmp_path / "hf", hf, config, max_shard_bytes=20_000)
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) > 3 and files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    state, read_config = read_hf(tmp_path / "hf")
    assert_equal_states(hf, state)
    assert read_config == config
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert_equal_states(hf, {name: loaded[name] for name in hf})
    files[1].unlink()
    with pytest.raises(UserError, match=f"{files[1].name}.*missing"):
        read_hf(tmp_path / "hf")


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", "[]", "expected a mapping of settings"),
        ("config.json", "[" * 100_000, "not valid JSON"),
        ("model.safetensors.index.json", "{}", "has no weight_map"),
        ("model.safetensors.index.json", "[1]", "has no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../secret.safetensors"}}', "expected a plain name"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "/etc/passwd"}}', "expected a plain name"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}', "expected the name of a file"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}', "b.safetensors: named by"),
    ],
)
def test_a_folder_of_a_stranger_names_files_of_its_own(file: str, content: str, says: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (tmp_path / "secret.safetensors").write_text("x")
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=says):
        read_hf(folder)


def test_tokenizer_goes_along(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer

    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = model_config()
    config = hf_config(model, VOCAB, 64, "fp32", eos_token_id=2)
    write_hf(tmp_path / "hf", to_hf_state(random_state(model, 256), model, VOCAB), config, tmp_path / "tokenizer.json")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded.eos_token_id == 2 and loaded.eos_token == "<|end|>" and loaded.model_max_length == 64
    assert json.loads((tmp_path / "hf/generation_config.json").read_text()) == {"eos_token_id": 2}


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path: Path) -> None:
    model = model_config()
    hf, config = to_hf_state(random_state(model, 256), model, VOCAB), hf_config(model, VOCAB, 64, "fp32")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        write_hf(tmp_path / "full", hf, config)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    shared = hf | {"lm_head.weight": hf["model.embed_tokens.weight"]}  # safetensors refuses shared memory
    with pytest.raises(RuntimeError):
        write_hf(tmp_path / "broken", shared, config)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_full_disk_is_an_error_of_the_system_that_names_the_file(tmp_path: Path) -> None:
    model = model_config()
    hf, config = to_hf_state(random_state(model, 256), model, VOCAB), hf_config(model, VOCAB, 64, "fp32")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as a full disk does, by another number
    try:
        with pytest.raises(OSError, match=r"File too large: .*/model\.safetensors"):
            write_hf(tmp_path / "out", hf, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_wrong_weights_are_named() -> None:
    model = model_config()
    state = random_state(model, 256)
    other = dict(state)
    other["decoder.layers.2.mlp.experts.weight"] = other.pop("decoder.layers.2.mlp.linear_fc2.weight")
    with pytest.raises(UserError, match=r"decoder\.layers\.2\.mlp\.linear_fc2\.weight is missing\n.*experts.* not part"):
        to_hf_state(other, model, VOCAB)
    hf = to_hf_state(state, model, VOCAB)
    hf["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(32, 32)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.k_proj\.weight is \[32, 32\], expected \[8, 32\]"):
        from_hf_state(hf, model)
    hf = to_hf_state(state, model, VOCAB)
    hf["lm_head.weight"] = hf["lm_head.weight"][:-1]
    with pytest.raises(UserError, match=r"both ends of the model.*lm_head\.weight \[249, 32\]"):
        from_hf_state(hf, model)
    tied = model_config(tied=True)
    with pytest.raises(UserError, match="the settings tie them"):
        from_hf_state(to_hf_state(state, model, VOCAB), tied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: expected one of llama, .*, found 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', found 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 8.0}}, "rope_parameters: expected .*found 'longrope'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.*dynamic"),
        ({"head_dim": "64"}, "head_dim: expected a positive whole number, found '64'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide"),
        ({"rms_norm_eps": None}, "rms_norm_eps: missing"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_we_cannot_represent_is_refused(change: dict[str, Any], message: str) -> None:
    config = hf_config(model_config(), VOCAB, 64, "fp32") | change
    with pytest.raises(UserError, match=message):
        model_config_from_hf(config)
