"""What the rotary embedding of a model is given."""

from __future__ import annotations

import math

from megatron_synth.config.schema import ModelConfig
from megatron_synth_kernels.torch.rope import ScaledBase


def rotary_base(model: ModelConfig) -> float | ScaledBase:
    """The period base, with the scaling of its frequencies where the model has one."""
    scaling = model.rope_scaling
    if scaling is None:
        return model.rotary_base
    yarn = scaling.rope_type == "yarn"
    return ScaledBase(
        model.rotary_base,
        scaling.rope_type,
        scaling.factor,
        scaling.original_max_position_embeddings or 0,
        low=scaling.beta_slow if yarn else scaling.low_freq_factor,
        high=scaling.beta_fast if yarn else scaling.high_freq_factor,
        # Peng et al., 2023, equation 22
        magnitude=(scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1) if yarn else 1.0,
        whole_channels=scaling.truncate,
    )
