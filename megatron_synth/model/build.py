"""From the configuration to the model chunks of this rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_synth.config.schema import Config
from megatron_synth.model import kernels, ops
from megatron_synth.model.fp8.linear import fuse
from megatron_synth.model.fp8.recipe import Fp8Run
from megatron_synth.model.fp8.statistics import Statistics
from megatron_synth.model.init import initialize_weights
from megatron_synth.model.objective import Objective
from megatron_synth.model.run_plan import RunPlan
from megatron_synth.model.spec import Linears, block_spec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LlamaModel(GPTModel):
    """megatron-core's GPT with our loss at its end.

    Called with labels, the last stage returns `Losses`; `loss_mask` is then an `Objective`, or None for an evaluation.
    `packed_seq_params` are `Documents`, or None. Without labels it returns logits, those of the vocabulary's padding included.
    """

    fp8: Fp8Run | None = None
    """What this rank's FP8 layers share; None without layers of ours in FP8."""
    fp8_statistics: Statistics | None = None
    """What sees the tensors of this rank's FP8 layers; None without any."""
    see_output: Callable[[Tensor, Tensor], None] | None = None
    """Shown the hidden states before the output layer, [S, B, H], and that layer's weight [V, H], once its loss is made."""
    precision_text = ""
    """Which layers run in which format, where there is more than one."""

    def __init__(self, *, fused_loss: bool, tokens: int, logits_divisor: float = 1.0, **kwargs: Any):
        super().__init__(**kwargs)
        self.fused_loss, self.tokens, self.logits_divisor = fused_loss, tokens, logits_divisor

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None, loss_mask: Objective | None, **others: Any) -> Any:
        if self.post_process and self.logits_divisor != 1.0:
            hidden_states = hidden_states / self.logits_divisor
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=None, loss_mask=None, **others)
        layer = self.output_layer
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if not self.fused_loss:
            logits, _ = layer(hidden_states, weight=weight)
            losses = ops.loss_of_logits(logits, labels, loss_mask, self.tokens)
        else:
            # By the layer and not past it: hooks on it see to it that its weights have arrived.
            layer._forward_impl = partial(ops.output_and_loss, labels=labels, objective=loss_mask, vocab_size=self.tokens)
            try:
                losses, _ = layer(hidden_states, weight=weight)
            finally:
                del layer._forward_impl
        if self.see_output is not None:
            self.see_output(hidden_states, layer.weight if weight is None else weight)
        return losses


def transformer_config(plan: RunPlan) -> TransformerConfig:
    """megatron-core's view of the model, the layout and, for TransformerEngine's layers, FP8."""
    config, layout, on_gpu = plan.config, plan.layout, plan.device.type == "cuda"
    model = config.model
    dtype = DTYPES[config.precision.dtype]
    interleaved = layout.virtual > 1
    result = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        # makes megatron-core add up the gradients of norms that all tensor-parallel ranks have whole
        qk_layernorm=model.qk_norm == "head",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if interleaved else None,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        # With two stages the batched sends and receives of the default, overlap_p2p_comm=False, get mismatched in the
        # interleaved schedule and training goes on with wrong numbers.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # The default waits for the device after each batched exchange, for a fault that torch mended in 2022 (its pull request
        # 82450): the requests that are waited for now order this stream after NCCL's.
        batch_p2p_sync=False,
        # Saves memory under NCCL, where streams order the release after the send. Gloo sends from the released tensor.
        deallocate_pipeline_outputs=on_gpu,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        perform_initialization=False,  # see init.py
        use_cpu_initialization=not on_gpu,
        gradient_accumulation_fusion=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **(plan.fp8.mcore_options() if plan.fp8 else {}),
        **_recompute(config),
    )
    # Without it nothing fails, but the norm weights of tensor-parallel ranks drift apart.
    result.finalize_model_grads_func = finalize_model_grads
    return result


def _recompute(config: Config) -> dict[str, Any]:
    """megatron-core's part of `train.recompute`; the activation of the MLP is ours, see ops.SwiGLUMLP."""
    match config.train.recompute:
        case "selective":
            return {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
        case "full":
            return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        case _:
            return {}


def build_model(plan: RunPlan, vocab_size: int) -> list[LlamaModel]:
    """This rank's model chunks (one, or as many as virtual pipeline stages), with their initial weights.

    Args:
        plan: the run, the latest plan that this process has made. Its process groups are there.
        vocab_size: tokens in the tokenizer's vocabulary; the embedding is padded as the configuration says.
    """
    assert kernels.are_active(plan.kernels), "another plan has been made since"
    config, fp8 = plan.config, plan.fp8
    fp8_run = fp8.start() if fp8 else None

    def linears(layer: int) -> Linears:
        return fp8.linears(fp8_run, layer) if fp8 else Linears()

    mcore = transformer_config(plan)
    stages = plan.layout.virtual
    chunks = []
    for stage in range(stages):
        vp_stage = stage if stages > 1 else None
        chunk = LlamaModel(
            fused_loss=config.train.fused_loss,
            tokens=vocab_size,
            logits_divisor=config.model.mup_factor,
            config=mcore,
            transformer_layer_spec=block_spec(mcore, vp_stage, config.model, linears),
            vocab_size=config.model.padded_vocab_size(vocab_size),
            max_sequence_length=config.train.sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=config.model.share_embeddings_and_output_weights,
            position_embedding_type="none",  # rotary, inside the attention: ops.CoreAttention
            vp_stage=vp_stage,
        )
        if fp8 is not None and fp8.fused:
            for layer in chunk.decoder.layers:
                fuse(layer)
        if config.model.norm_placement == "before" and kernels.joins_additions_to_norms(plan.kernels):
            ops.join_additions_to_norms(chunk.decoder.layers, chunk.decoder.final_layernorm, mcore.recompute_granularity)
        chunk.fp8, chunk.precision_text = fp8_run, fp8.describe() if fp8 else ""
        chunks.append(chunk if mcore.use_cpu_initialization else chunk.cuda())
    if fp8_run is not None:
        fp8_run.seal()
    if fp8 is not None:
        statistics = fp8.watched(fp8_run, chunks)
        for chunk in chunks:
            chunk.fp8_statistics = statistics
    initialize_weights(chunks, config.model, vocab_size, seed=config.train.seed)
    return chunks
