"""Which module stands at which place of megatron-core's GPT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
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
from megatron_synth.model.ops import CoreAttention, JoinedSelfAttention, RMSNorm, SwiGLUMLP
from megatron_synth.model.rotary import rotary_base
from megatron_synth.model.variations import AddNormalized, NormOfAllHeads


@dataclass(frozen=True)
class Linears:
    """What makes the linear layers of a transformer layer."""

    linear_qkv: Any = ColumnParallelLinear
    linear_proj: Any = RowParallelLinear
    linear_fc1: Any = ColumnParallelLinear
    linear_fc2: Any = RowParallelLinear


def layer_spec(config: TransformerConfig, model: ModelConfig, layer: int, linears: Linears) -> ModuleSpec:
    """One transformer layer: x + Attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)).

    With the norms after: x + RMSNorm(Attention(x)), then x + RMSNorm(SwiGLU(x)).

    Args:
        config: megatron-core's, of the model and the layout.
        model: ours.
        layer: number of the layer in the whole model, from 0.
        linears: what makes its linear layers.
    """
    before = model.norm_placement == "before"
    norm = RMSNorm if before else IdentityOp
    add = get_bias_dropout_add if before else ModuleSpec(module=AddNormalized, params={"config": config})
    attention = {
        "rotary_base": rotary_base(model),
        "window": model.window_of(layer),
        # what a norm made may be kept for its backward pass
        "overwrite": model.qk_norm == "off",
    }
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=JoinedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linears.linear_qkv,
                    core_attention=ModuleSpec(module=CoreAttention, params=attention),
                    linear_proj=linears.linear_proj,
                    q_layernorm=_query_key_norm(model, model.num_attention_heads),
                    k_layernorm=_query_key_norm(model, model.query_groups),
                ),
            ),
            self_attn_bda=add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=SwiGLUMLP,
                submodules=MLPSubmodules(linear_fc1=linears.linear_fc1, linear_fc2=linears.linear_fc2),
            ),
            mlp_bda=add,
            sharded_state_dict_keys_map=norm_keys(model),
        ),
    )


def _query_key_norm(model: ModelConfig, heads: int) -> Any:
    """What megatron-core makes with the channels of a head, `heads` of which there are on all ranks."""
    match model.qk_norm:
        case "head":
            return RMSNorm
        case "all_heads":
            return ModuleSpec(module=NormOfAllHeads, params={"heads": heads})
        case _:
            return None


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
    layers = [layer_spec(config, model, layer, linears(layer)) for layer in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
