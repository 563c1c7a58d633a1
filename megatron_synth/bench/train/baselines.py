"""What the engine is measured against: two plain single-device training loops of the same model.

Both get the engine's initial weights, the same micro-batches and the same labels, and do the same work per step:
gradients accumulated over the micro-batches, clipped by global norm, AdamW with weight decay on matrices only. Each is
in its best ordinary eager form: scaled_dot_product_attention, `AdamW(fused=True)`, `zero_grad(set_to_none=True)`, the
mean cross-entropy taken at once over [B S, V] logits, nothing read back from the device between steps.

With `precision.dtype: bf16` their weights, gradients and moments are all bf16, as in most scripts. The engine keeps
master weights, gradients and moments in fp32: the baselines move less memory, and lose small updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_synth.bench.train.engine import vocab_size
from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import Config, ModelConfig
from megatron_synth.interop.hf_settings import family_of, hf_config
from megatron_synth.interop.hf_weights import to_hf_state
from megatron_synth.train.batch import TensorBatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Baseline:
    """The training loop round a module that turns tokens [B, S] into logits [B, S, V]."""

    def __init__(self, name: str, logits: Callable[[Tensor], Tensor], model: nn.Module, config: Config):
        optim = config.optim
        self.name, self._logits, self._clip = name, logits, optim.clip_grad
        self._parameters = list(model.parameters())
        matrices = [p for p in self._parameters if p.dim() > 1]
        norms = [p for p in self._parameters if p.dim() == 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": norms, "weight_decay": 0.0}],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )
        self._losses: list[Tensor] = []

    def step(self, batches: Sequence[TensorBatch]) -> None:
        """Accumulate, clip, update."""
        self._optimizer.zero_grad(set_to_none=True)
        self._losses = []
        for batch in batches:
            logits = self._logits(batch.inputs)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())
            (loss / len(batches)).backward()
            self._losses.append(loss.detach())
        if self._clip > 0:
            nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()

    def loss(self) -> float:
        """Mean loss of the latest step before its update."""
        return float(torch.stack(self._losses).double().mean())


# ---- Hugging Face


def hugging_face(config: Config, weights: Mapping[str, Tensor], device: torch.device) -> Baseline:
    """Transformers' class of the model's family with its SDPA attention.

    Args:
        config: the run.
        weights: the engine's, full tensors by megatron-core's names.
        device: where to train.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise UserError(f"--vs hf needs transformers ({error}); pip install transformers, or --vs plain") from error
    train, dtype = config.train, config.precision.dtype
    settings = hf_config(config.model, vocab_size(config), train.sequence_length, dtype)
    state = to_hf_state(weights, config.model, vocab_size(config))
    if config.model.share_embeddings_and_output_weights:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with device:
        like = AutoConfig.for_model(**settings)
        model = AutoModelForCausalLM.from_config(like, attn_implementation="sdpa").to(DTYPES[dtype])
    model.load_state_dict(state)
    model.train()
    return Baseline("hf", lambda tokens: model(input_ids=tokens, use_cache=False).logits, model, config)


# ---- plain PyTorch


class PlainNorm(nn.Module):
    """torch's RMSNorm kernel."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(model.hidden_size))
        self.eps = model.norm_epsilon

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class PlainLayer(nn.Module):
    """One transformer layer: A query heads, G key/value heads, D channels, products of one input fused into one."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.heads, self.groups, self.channels = model.num_attention_heads, model.query_groups, model.head_dim
        hidden, ffn = model.hidden_size, model.ffn_hidden_size
        self.attention_norm, self.mlp_norm = PlainNorm(model), PlainNorm(model)
        self.qkv = nn.Linear(hidden, (self.heads + 2 * self.groups) * self.channels, bias=False)
        self.proj = nn.Linear(self.heads * self.channels, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, H], two tables [S, 1, D] -> [B, S, H]."""
        batch, length, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, -1, self.channels)
        qk, v = qkv.split([self.heads + self.groups, self.groups], dim=2)
        left, right = qk.chunk(2, dim=-1)
        q, k = (qk * cos + torch.cat([-right, left], dim=-1) * sin).split([self.heads, self.groups], dim=2)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.heads != self.groups,
        )
        x = x + self.proj(out.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class PlainLlama(nn.Module):
    """A Llama in ordinary PyTorch, with the rotary tables made once."""

    def __init__(self, model: ModelConfig, rows: int, sequence_length: int):
        super().__init__()
        self.embedding = nn.Embedding(rows, model.hidden_size)
        self.layers = nn.ModuleList(PlainLayer(model) for _ in range(model.num_layers))
        self.norm = PlainNorm(model)
        self.head = nn.Linear(model.hidden_size, rows, bias=False)
        if model.share_embeddings_and_output_weights:
            self.head.weight = self.embedding.weight
        channels = torch.arange(0, model.head_dim, 2, dtype=torch.float32)
        angles = torch.outer(torch.arange(sequence_length), model.rotary_base ** (-channels / model.head_dim))
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, S] -> logits [B, S, V]."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def plain_state(weights: Mapping[str, Tensor], model: ModelConfig, rows: int) -> dict[str, Tensor]:
    """PlainLlama's weights, with so many rows for tokens, from the engine's."""
    hf = to_hf_state(weights, model, rows)
    state = {"embedding.weight": hf["model.embed_tokens.weight"], "norm.weight": hf["model.norm.weight"]}
    state["head.weight"] = hf.get("lm_head.weight", state["embedding.weight"])
    for i in range(model.num_layers):
        plain, layer = f"layers.{i}.", f"model.layers.{i}."
        state[plain + "attention_norm.weight"] = hf[layer + "input_layernorm.weight"]
        state[plain + "mlp_norm.weight"] = hf[layer + "post_attention_layernorm.weight"]
        state[plain + "qkv.weight"] = torch.cat([hf[layer + f"self_attn.{n}_proj.weight"] for n in ("q", "k", "v")])
        state[plain + "proj.weight"] = hf[layer + "self_attn.o_proj.weight"]
        state[plain + "gate_up.weight"] = torch.cat([hf[layer + f"mlp.{n}_proj.weight"] for n in ("gate", "up")])
        state[plain + "down.weight"] = hf[layer + "mlp.down_proj.weight"]
    return state


def plain(config: Config, weights: Mapping[str, Tensor], device: torch.device) -> Baseline:
    """PlainLlama; arguments as for `hugging_face`.

    Raises:
        UserError: the model has what a plain Llama has not.
    """
    if family_of(config.model) != "llama" or config.model.rope_scaling is not None:
        raise UserError(f"--vs plain is a plain Llama, and {config.model.name} is not one; use --vs hf or --vs none")
    rows = vocab_size(config)
    with device:
        model = PlainLlama(config.model, rows, config.train.sequence_length).to(DTYPES[config.precision.dtype])
    model.load_state_dict(plain_state(weights, config.model, rows))
    return Baseline("plain", model, model, config)


BASELINES: dict[str, Callable[[Config, Mapping[str, Tensor], torch.device], Baseline]] = {"hf": hugging_face, "plain": plain}
