"""Tiny models of transformers' classes with every feature on that a family has."""

from __future__ import annotations

from typing import Any

from tests.support import VOCAB_SIZE

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10_000.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "head_dim": 24,
        "rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 5e5},
    },
    "mistral": {"head_dim": 24, "sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
        "rope_parameters": _YARN,
    },
    "qwen3": {"head_dim": 24, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
    "olmo2": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}


def settings_of(name: str) -> Any:
    """The configuration of a tiny model, of transformers' class."""
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **{**_SIZES, **MODELS[name]})


def model_of(name: str, seed: int = 7) -> Any:
    """A tiny model with random weights; norms and biases are no ones and zeros."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(settings_of(name), attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model
