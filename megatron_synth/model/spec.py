"""Which module stands at which place of megatron-core's GPT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_synth.config.schema import ModelConfig
from megatron_synth.model.architecture import norm_keys
from megatron_synth.model.ops import CoreAttention, RMSNorm, SwiGLUMLP


@dataclass(frozen=True)
class Linears:
    """What makes the linear layers of a transformer layer."""

    linear_qkv: Any = ColumnParallelLinear
    linear_proj: Any = RowParallelLinear
    linear_fc1: Any = ColumnParallelLinear
    linear_fc2: Any = RowParallelLinear


def layer_spec(model: ModelConfig, linears: Linears) -> ModuleSpec:
    """One pre-norm transformer layer: x + Attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x))."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linears.linear_qkv,
                    core_attention=ModuleSpec(module=CoreAttention, params={"rotary_base": model.rotary_base}),
                    linear_proj=linears.linear_proj,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=SwiGLUMLP,
                submodules=MLPSubmodules(linear_fc1=linears.linear_fc1, linear_fc2=linears.linear_fc2),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=norm_keys(model),
        ),
    )


def block_spec(
    config: TransformerConfig, vp_stage: int | None, model: ModelConfig, linears: Callable[[int], Linears]
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (and model chunk), and the norm after the last one.

    Args:
        config: megatron-core's, of the model and the layout.
        vp_stage: model chunk, None if there is one.
        model: ours.
        linears: of a layer, by its number in the whole model, from 0.
    """
    first = get_transformer_layer_offset(config, vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    layers = [layer_spec(model, linears(first + place)) for place in range(count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
