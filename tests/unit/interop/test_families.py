"""Settings of the families of models, against the classes of transformers, and what of them is refused."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_synth.config.errors import UserError
from megatron_synth.config.load import load_yaml
from megatron_synth.config.schema import ModelConfig
from megatron_synth.estimate.flops import count_parameters
from megatron_synth.interop.hf_settings import FAMILIES, family_of, hf_config, model_config_from_hf
from megatron_synth.model.rotary import rotary_base
from megatron_synth_kernels.torch.rope import rotary_tables
from tests.hf_models import MODELS, settings_of
from tests.support import ROOT

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, said in full": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
        "truncate": False,
    },
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 128,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_are_those_of_transformers(name: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_theta": 5e5, **SCALINGS[name]}
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 100}
    theirs = LlamaConfig(**sizes, max_position_embeddings=512, rope_parameters=dict(rope))
    expected = LlamaRotaryEmbedding(theirs)(torch.zeros(1, 512, 1), torch.arange(512)[None])
    model = model_config_from_hf(theirs.to_dict())
    found = rotary_tables(512, 64, rotary_base(model), torch.float32, torch.device("cpu"))
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[:, 0, 0], wanted[0], rtol=0, atol=2e-5)
    # and back: the same table from what we write
    again = LlamaConfig(**hf_config(model, 100, 512, "fp32"))
    for ours, wanted in zip(
        LlamaRotaryEmbedding(again)(torch.zeros(1, 512, 1), torch.arange(512)[None]), expected, strict=True
    ):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_settings_of_a_family_survive_the_round_trip(name: str) -> None:
    from transformers import AutoConfig

    theirs = settings_of(name).to_dict()
    model = model_config_from_hf(theirs)
    assert model.hf_family == theirs["model_type"] == family_of(model)
    written = hf_config(model, theirs["vocab_size"], theirs["max_position_embeddings"], "fp32")
    assert model_config_from_hf(written) == model
    loaded = AutoConfig.for_model(**written).to_dict()
    assert loaded["rope_parameters"].items() >= theirs["rope_parameters"].items()
    same = ("num_key_value_heads", "sliding_window", "layer_types", "head_dim", "rms_norm_eps")
    for key in same:
        assert loaded.get(key) == theirs.get(key) or (key == "head_dim" and model.kv_channels is None), key


def test_a_model_without_a_name_takes_the_first_family_that_has_it() -> None:
    for name in MODELS:
        model = model_config_from_hf(settings_of(name).to_dict()).model_copy(update={"hf_family": None})
        found = family_of(model)
        assert list(FAMILIES).index(found) <= list(FAMILIES).index(settings_of(name).model_type)
        assert FAMILIES[found].fixed == FAMILIES[settings_of(name).model_type].fixed


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3", {"attention_bias": True}, "attention_bias: expected None, found True"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types: expected full attention up to"),
        ("qwen2", {"sliding_window": -1, "use_sliding_window": True}, "sliding_window: expected a positive whole number"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: found 50.0, which is not known of llama"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv: found 8.0, which is not known of olmo2"),
        ("mistral", {"model_type": "mixtral"}, "model_type: expected one of llama, mistral, .*, found 'mixtral'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "theta_of": 3}},
            "rope_parameters.theta_of: not known",
        ),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "original_max_position_embeddings: missing"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": -1.0}}, "rope_parameters.factor"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters: expected settings by name"),
        ("qwen2", {"max_window_layers": "two"}, "max_window_layers: expected a whole number of 0 or more, found 'two'"),
        ("qwen2", {"num_hidden_layers": 10**30}, "layer_types: expected full attention"),
        ("llama", {"max_position_embeddings": -5}, "max_position_embeddings: expected a positive whole number, found -5"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false, found 'no'"),
        (
            "llama",
            {"rope_parameters": {**SCALINGS["yarn with mscale"], "mscale": "x"}},
            "rope_parameters.mscale: expected a number above 0, found 'x'",
        ),
        (
            "llama",
            {"rope_parameters": {**SCALINGS["yarn with mscale"], "factor": 10**400}},
            "rope_parameters.factor: expected a number above 0",
        ),
        ("llama", {"hidden_size": True}, "hidden_size: expected a positive whole number, found True"),
    ],
)
def test_what_a_family_cannot_say_is_refused_by_its_key(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_config_from_hf({**settings_of(name).to_dict(), **change})


_HOSTILE: tuple[Any, ...] = (None, True, False, 0, -1, 3, 10**30, 10**400, -1e308, 5e-324, math.nan, math.inf, "", "x", "yarn")
_HOSTILE += ("\x1b[2J\n", "\ud800", "9" * 5000, [], {}, [[]], {"": 0}, ["sliding_attention"] * 4, {"rope_type": []})


def _places(settings: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for key, value in list(settings.items()):
        yield settings, key
        if isinstance(value, dict):
            yield from _places(value)


@pytest.mark.parametrize("name", MODELS)
def test_any_value_of_any_setting_is_read_or_refused(name: str) -> None:
    settings = json.loads(json.dumps(settings_of(name).to_dict()))
    rope = settings["rope_parameters"] | {"mscale": 1.0, "mscale_all_dim": 1.0}
    settings |= {"rope_parameters": rope} if rope["rope_type"] == "yarn" else {}
    draw = random.Random(name)
    for number in range(sum(1 for _ in _places(settings))):
        for value in draw.sample(_HOSTILE, 6):
            changed = copy.deepcopy(settings)
            section, key = next(itertools.islice(_places(changed), number, None))
            section[key] = value
            try:
                model_config_from_hf(changed)
            except UserError as error:
                assert len(str(error)) < 4000


def test_a_model_that_no_class_has_is_not_exported() -> None:
    model = model_config_from_hf(settings_of("olmo2").to_dict())
    with pytest.raises(UserError, match=r"model\.hf_family: olmo2 cannot have model\.sliding_window: 8"):
        family_of(model.model_copy(update={"sliding_window": 8}))
    with pytest.raises(UserError, match="no class of transformers has all of this model"):
        family_of(model.model_copy(update={"hf_family": None, "add_qkv_bias": True}))


@pytest.mark.parametrize(
    "name", ["llama-3.1-8b", "llama-3.2-1b", "mistral-7b", "qwen2.5-1.5b", "qwen3-1.7b", "qwen3-8b", "olmo2-7b"]
)
def test_shipped_models_have_the_parameters_of_those_that_were_published(name: str) -> None:
    path = ROOT / "configs" / "model" / f"{name}.yaml"
    published = re.search(r"([0-9,]{9,}) parameters", path.read_text())
    assert published is not None
    model = ModelConfig(**load_yaml(path)["model"])
    assert count_parameters(model).total == int(published[1].replace(",", ""))
    assert family_of(model) == model.hf_family
