"""config.json of Hugging Face's Llama and its relatives, from our settings and back.

A family is a class of transformers. What its config.json may say is in `FAMILIES`; anything else that a file says is refused
by its key, never dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from megatron_synth.config.errors import UserError
from megatron_synth.config.model import ModelConfig, RopeScaling
from megatron_synth.core.records import first_fault
from megatron_synth.train.checkpoint.companions import IDS

_OFF = (None, False)


@dataclass(frozen=True)
class Family:
    """What a class of transformers is, beside what all have."""

    architecture: str
    """Name of the class."""
    fixed: Mapping[str, Any]
    """Our settings that it always has."""
    keys: Mapping[str, Any]
    """Keys of its own, beside those of all families, with the class's defaults."""
    groups: int | None = None
    """Key/value heads where the file names none; None: as many as query heads."""
    window: Literal["none", "whole", "from a layer"] = "none"
    """How the file speaks of sliding windows."""


_PLAIN = {"add_qkv_bias": False, "qk_norm": "off", "norm_placement": "before"}
_FROM_A_LAYER = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _PLAIN, {"head_dim": None, "attention_bias": False, "mlp_bias": False}),
    "mistral": Family("MistralForCausalLM", _PLAIN, {"head_dim": None, "sliding_window": 4096}, groups=8, window="whole"),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _PLAIN | {"add_qkv_bias": True},
        {"head_dim": None, **_FROM_A_LAYER},
        groups=32,
        window="from a layer",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _PLAIN | {"qk_norm": "head"},
        {"head_dim": 128, "attention_bias": False, **_FROM_A_LAYER},
        groups=32,
        window="from a layer",
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        _PLAIN | {"qk_norm": "all_heads", "norm_placement": "after"},
        {"attention_bias": False},
    ),
}
"""By `model_type`. The first that has what a model has is the one that it is exported as."""

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
)
# field -> the values that our model can represent; a field that is absent has the first one
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": _OFF,
    "mlp_bias": _OFF,
    "attention_dropout": (0.0, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "is_decoder": (False, True, None),
    "add_cross_attention": _OFF,
    "tie_encoder_decoder": _OFF,
    "is_encoder_decoder": _OFF,
}
_TAKEN = {*_REQUIRED, "num_key_value_heads", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters"}
_LARGEST = 1e12
"""Of a number of a scaling that arithmetic is done with."""
_TAKEN |= {"initializer_range", "max_position_embeddings", *IDS}
_NO_PART = {"architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path"}
_NO_PART |= {"auto_map", "id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states", "return_dict"}
_NO_PART |= {"chunk_size_feed_forward", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation"}
"""What neither the weights' meaning nor their shapes depend on."""

_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"},
}


def family_of(model: ModelConfig) -> str:
    """The `model_type` that a model is exported as.

    Raises:
        UserError: no class of transformers has what the model has, or the one that `model.hf_family` names has it not.
    """
    candidates = list(FAMILIES) if model.hf_family is None else [model.hf_family]
    problems: list[str] = []
    for name in candidates:
        problems = list(_lacks(FAMILIES[name], model))
        if not problems:
            return name
    if model.hf_family is not None:
        raise UserError(f"model.hf_family: {model.hf_family} cannot have {problems[0]}; set it to null")
    has = ", ".join(f"{key}: {getattr(model, key)}" for key in (*_PLAIN, "sliding_window", "kv_channels"))
    raise UserError(f"no class of transformers has all of this model ({has}); it cannot be exported")


def _lacks(family: Family, model: ModelConfig) -> Iterator[str]:
    for key, value in family.fixed.items():
        if getattr(model, key) != value:
            yield f"model.{key}: {getattr(model, key)}"
    if "head_dim" not in family.keys and model.head_dim * model.num_attention_heads != model.hidden_size:
        yield f"model.kv_channels: {model.kv_channels}"
    if model.sliding_window is not None and family.window == "none":
        yield f"model.sliding_window: {model.sliding_window}"
    if model.sliding_window_first_layer and family.window != "from a layer":
        yield f"model.sliding_window_first_layer: {model.sliding_window_first_layer}"


def hf_config(
    model: ModelConfig,
    vocab_size: int,
    sequence_length: int,
    dtype: Literal["fp32", "bf16"],
    *,
    eos_token_id: int | list[int] | None = None,
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """The config.json of the exported model.

    vocab_size: tokens of the tokenizer (V), as many as the exported weights have rows for.
    sequence_length: longest text that the model is said to read, in tokens.
    eos_token_id: what ends a text; of a model that was not imported, the end-of-document token of the training data.
    UserError if no class of transformers has what the model has.
    """
    name = family_of(model)
    family = FAMILIES[name]
    rope = {"rope_theta": model.rotary_base, **_rope_of(model)}
    settings = {
        "architectures": [family.architecture],
        "model_type": name,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,  # read by transformers 4, which does not know rope_parameters
        "rope_parameters": rope,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "use_cache": True,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
    }
    if model.rope_scaling is not None:
        settings["rope_scaling"] = _rope_of(model)  # transformers 4 again
    for key in ("attention_bias", "mlp_bias"):
        if key in family.keys:
            settings[key] = False
    if "head_dim" in family.keys:
        settings["head_dim"] = model.head_dim
    if family.window == "whole":
        settings["sliding_window"] = model.sliding_window
    elif family.window == "from a layer":
        windowed = model.sliding_window is not None
        first = model.sliding_window_first_layer if windowed else model.num_layers
        settings["use_sliding_window"] = windowed
        settings["sliding_window"] = model.sliding_window
        settings["max_window_layers"] = first
        settings["layer_types"] = _layer_types(model.num_layers, first)
    return settings


def _layer_types(layers: int, first: int) -> list[str]:
    return ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]


def _rope_of(model: ModelConfig) -> dict[str, Any]:
    """What `rope_parameters` says beside the base."""
    scaling = model.rope_scaling
    if scaling is None:
        return {"rope_type": "default"}
    kept = _ROPE_KEYS[scaling.rope_type]
    return {"rope_type": scaling.rope_type} | {k: v for k, v in scaling if k in kept and v is not None}


def model_config_from_hf(config: Mapping[str, Any], name: str = "custom") -> ModelConfig:
    """Our settings from a config.json; UserError names each key that our model cannot represent."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"config.json: model_type: expected one of {', '.join(FAMILIES)}, found {kind!r:.80}")
    family = FAMILIES[kind]
    problems = [f"{field}: missing" for field in _REQUIRED if config.get(field) is None]
    problems += [
        f"{field}: expected {allowed[0]!r}, found {config[field]!r:.80}"
        for field, allowed in _ONLY.items()
        if field in config and config[field] not in allowed
    ]
    known = {*_TAKEN, *_NO_PART, *_ONLY, *family.keys}
    problems += [
        f"{field}: found {value!r:.80}, which is not known of {kind}"
        for field, value in config.items()
        if field not in known and value not in _OFF
    ]
    problems += _wrong_numbers(config)
    problems = problems or list(_heads(config, family))
    refusal = "config.json: not a model that we can represent\n  "
    if problems:
        raise UserError(refusal + "\n  ".join(problems))
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = _own_head_dim(config, family)
    try:
        rope = _rope_parameters(config)
        theta = rope.get("rope_theta", config.get("rope_theta"))
        window, first = _window(config, family)
        return ModelConfig(
            name=name,
            num_layers=config["num_hidden_layers"],
            hidden_size=width,
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=_groups(config, family),
            vocab_size=config["vocab_size"],
            share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
            rotary_base=10_000.0 if theta is None else theta,
            rope_scaling=_scaling(config, rope),
            kv_channels=None if head_dim is None or head_dim * heads == width else head_dim,
            sliding_window=window,
            sliding_window_first_layer=first,
            norm_epsilon=config["rms_norm_eps"],
            init_method_std=config.get("initializer_range") or 0.02,
            hf_family=kind,
            **family.fixed,
        )
    except ValidationError as error:  # which is a ValueError, too
        raise UserError(refusal + first_fault(error)) from None
    except ValueError as error:
        raise UserError(refusal + str(error)) from None


def _wrong_numbers(config: Mapping[str, Any]) -> Iterator[str]:
    for field in ("tie_word_embeddings", "use_sliding_window"):
        if config.get(field) not in (None, True, False):
            yield f"{field}: expected true or false, found {config[field]!r:.80}"
    for field in (*_REQUIRED[:-1], "num_key_value_heads", "head_dim", "max_position_embeddings"):
        value = config.get(field)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            yield f"{field}: expected a positive whole number, found {value!r:.80}"


def _groups(config: Mapping[str, Any], family: Family) -> int:
    return config.get("num_key_value_heads") or family.groups or config["num_attention_heads"]


def _own_head_dim(config: Mapping[str, Any], family: Family) -> int | None:
    """Channels of a head, where the family can say it and does; else they follow from the hidden size."""
    return (config.get("head_dim") or family.keys["head_dim"]) if "head_dim" in family.keys else None


def _heads(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    heads, width, groups = config["num_attention_heads"], config["hidden_size"], _groups(config, family)
    if width % heads and _own_head_dim(config, family) is None:
        yield f"num_attention_heads: {heads} does not divide hidden_size {width}"
    if heads % groups:
        yield f"num_key_value_heads: {groups} does not divide {heads} query heads"


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{key}: expected settings by name, found {value!r:.80}")
        found |= value or {}
    return found


def _scaling(config: Mapping[str, Any], rope: Mapping[str, Any]) -> RopeScaling | None:
    """Scaled frequencies, as `_rope_parameters` found them. ValueError says what cannot be represented."""
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise ValueError(f"{field}: expected {', '.join(_ROPE_KEYS)} rotary embeddings, found {kind!r:.80}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor: expected 1.0, rotary embeddings on all channels")
    about_all = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    values = {key: value for key, value in rope.items() if key not in about_all and value is not None}
    if kind == "default":
        return None
    if kind == "yarn":
        values.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
        mscale, of_all = values.pop("mscale", None), values.pop("mscale_all_dim", None)
        if mscale and of_all and "attention_factor" not in values:
            grown = math.log(max(_number(field, "factor", values.get("factor")), 1.0))
            of_one, of_all = _number(field, "mscale", mscale), _number(field, "mscale_all_dim", of_all)
            values["attention_factor"] = (0.1 * of_one * grown + 1) / (0.1 * of_all * grown + 1)
    unknown = sorted(set(values) - _ROPE_KEYS[kind])
    if unknown:
        raise ValueError(f"{field}.{unknown[0]}: not known of {kind}")
    missing = sorted({"factor", "original_max_position_embeddings"} & _ROPE_KEYS[kind] - set(values))
    if missing:
        raise ValueError(f"{field}.{missing[0]}: missing, and {kind} needs it")
    try:
        return RopeScaling(rope_type=kind, **values)
    except ValidationError as error:
        raise ValueError(f"{field}.{first_fault(error)}") from None


def _number(field: str, name: str, value: Any) -> float:
    """A number that arithmetic is done with. ValueError where it is none, or of a size that no model has."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
        raise ValueError(f"{field}.{name}: expected a number above 0, found {value!r:.80}")
    return float(value)


def _window(config: Mapping[str, Any], family: Family) -> tuple[int | None, int]:
    """The sliding window and the first layer that has it. ValueError says what cannot be represented."""
    if family.window == "none":
        return None, 0
    window = config.get("sliding_window", family.keys["sliding_window"])
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"sliding_window: expected a positive whole number, found {window!r:.80}")
    if family.window == "whole":
        return window, 0
    layers, first = config["num_hidden_layers"], config.get("max_window_layers", family.keys["max_window_layers"])
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ValueError(f"max_window_layers: expected a whole number of 0 or more, found {first!r:.80}")
    if not config.get("use_sliding_window", False) or window is None or first >= layers:
        window, first = None, layers
    types = config.get("layer_types")
    # the length first: a number of layers that none has makes a list that no memory holds
    if types is not None and not (isinstance(types, list) and len(types) == layers and types == _layer_types(layers, first)):
        raise ValueError(f"layer_types: expected full attention up to layer {first} and windows after it, found another order")
    return (None, 0) if window is None else (window, first)
