"""Bytes that a rank holds, by kind, counted from the configuration without building the model.

Letters: T tokens of a micro-batch on one rank, H hidden, F MLP width, A query heads, G key/value heads, D channels of a head,
V padded vocabulary, t tensor-parallel size, s its size under sequence parallelism and 1 without, e bytes of an element.

Activations are counted tensor by tensor, after Korthikanti et al. 2022 (arXiv 2205.05198, section 4), for the operations that
run on the device: those of a GPU keep the inputs of norms, those of a CPU their fp32 normalized form. `bench memory` holds the
sums against what is really allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_synth.config.schema import Config
from megatron_synth.model.architecture import Dimensions, Weight, weights

Device = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on one rank of a pipeline stage, at the moment of its peak."""

    weights: int
    gradients: int
    """fp32, in megatron-core's buffers."""
    optimizer: int
    """Adam's moments and, in bf16, the fp32 master weights."""
    activations: int
    """Kept from the forward to the backward pass, by all micro-batches in flight."""
    logits: int
    """What the loss needs above the activations, on the last stage."""
    buffers: int
    """Sequence-parallel gathers and what pipeline stages exchange."""
    working: int
    """What else the most expensive moment of the step needs: one layer's gradients, a recomputed layer, or the
    output layer's. Where it is the loss, that is under `logits` and this is 0: only one of them exists at a time."""
    health: int = 0
    """The copy of the weights that `log.health_interval` measures an update by. It is there when activations are not."""
    keeps_health: bool = False
    """Whether the copy's place is kept from one measured step to the next, as on a CPU."""

    @property
    def total(self) -> int:
        """Without what the framework itself, the communication library and fragmentation take."""
        passes = self.activations + self.logits + self.buffers + self.working
        return self.static + (self.health + passes if self.keeps_health else max(self.health, passes))

    @property
    def static(self) -> int:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer


def kept_per_token(config: Config, device: Device = "gpu", fp8: bool | None = None) -> dict[str, float]:
    """Bytes that one layer keeps per token of a micro-batch on one rank, by tensor, with `train.recompute` as configured.

    `fp8`: whether its products are in FP8; default: as the configuration says.
    """
    fp8 = config.precision.fp8 != "off" if fp8 is None else fp8
    hidden = config.model.hidden_size
    if config.train.recompute == "full":
        return {"layer input": _element(config) * hidden / _sequence_shards(config)}
    kept = _all_kept(config, device, fp8)
    # a layer that makes the outputs of norms and of SwiGLU in FP8 only has none of them to drop
    before = config.model.norm_placement == "before"  # norms after the operations are not made again
    if config.train.recompute == "selective" and not (fp8 and _fuses(config)):
        shards = _sequence_shards(config)
        for name in ("norm outputs", "normalized", "activated") if before else ("activated",):
            kept.pop(name, None)
        if device == "cpu":
            # silu(gate) is an operation of its own there
            kept.pop("silu(gate)", None)
            if before:
                kept["norm inputs"] = 2 * _element(config) * hidden / shards
    return kept


def _element(config: Config) -> int:
    return 2 if config.precision.dtype == "bf16" else 4


def _sequence_shards(config: Config) -> int:
    return config.parallel.tensor_model_parallel_size if config.parallel.uses_sequence_parallel else 1


def _fuses(config: Config) -> bool:
    """Whether layers in FP8 make the outputs of norms and of SwiGLU in FP8 only. TransformerEngine's do not."""
    precision = config.precision
    return precision.fp8_fused and precision.fp8_backend != "te" and not precision.fp8_param_gather


def _all_kept(config: Config, device: Device, fp8: bool) -> dict[str, float]:
    """What a layer keeps without recomputation."""
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    element, shards = _element(config), _sequence_shards(config)
    sizes = Dimensions.of(model)
    hidden, width, queries, keys = sizes.hidden, sizes.ffn, sizes.queries, sizes.keys
    kept = {
        "norm outputs": 2 * element * hidden / shards,
        "attention output": element * queries / tensor,
        "log-sum-exp": 4 * model.num_attention_heads / tensor,
        "gate and up": element * 2 * width / tensor,
        "activated": element * width / tensor,
    }
    if device == "gpu":
        # Query, key and value are views of the product's output, which stays whole, and are rotated in their place. Queries
        # that share keys lie apart in it, group by group: megatron-core makes one tensor of them.
        kept |= {
            "norm inputs": 2 * element * hidden / shards,
            "query, key and value": element * (queries + 2 * keys) / tensor,
            "query, regrouped": element * queries / tensor if queries > keys else 0,
        }
    else:
        kept |= {
            "rotated query and key": element * (queries + keys) / tensor,
            "normalized": 2 * 4 * (hidden + 1) / shards,
            "value": element * keys / tensor,
            "attention output, reordered": element * queries / tensor if config.train.micro_batch_size > 1 else 0,
            "silu(gate)": element * width / tensor,
        }
    if model.qk_norm == "head" and device == "cpu":
        kept["normalized query and key"] = 4 * (queries + keys + model.num_attention_heads + model.query_groups) / tensor
    elif model.qk_norm != "off":  # the norm of keys reads them where the product wrote them
        kept["query before its norm"] = element * queries / tensor
        if device == "cpu":
            kept["query, key and value"] = element * (queries + 2 * keys) / tensor
    if fp8:
        _in_fp8(kept, config, device)
    return kept


def _in_fp8(kept: dict[str, float], config: Config, device: Device) -> None:
    """The inputs of the products are kept quantized, and nobody else's are kept for them."""
    sizes, tensor = Dimensions.of(config.model), config.parallel.tensor_model_parallel_size
    element, shards = _element(config), _sequence_shards(config)
    blocks = config.precision.fp8 == "blockwise"
    number = 1 + 4 / 128 if blocks else 1  # with the scales of its blocks
    kept.pop("activated")
    kept.pop("attention output, reordered", None)
    kept["attention output in fp8"] = number * sizes.queries / tensor
    kept["activated in fp8"] = number * sizes.ffn / tensor
    gathered_whole = blocks and shards > 1  # quantized after they are gathered, and kept as they were before
    if not gathered_whole:
        kept.pop("norm outputs")
        kept["norm outputs in fp8"] = number * 2 * sizes.hidden / shards
    if device == "cpu" and _fuses(config):
        kept.pop("silu(gate)")
        if not gathered_whole:
            kept.pop("normalized")
            kept["norm inputs"] = 2 * (element * sizes.hidden + 4) / shards


def micro_batches_in_flight(stage: int, stages: int, chunks: int, micro_batches: int) -> int:
    """Model chunks' worth of activations that a stage holds at most: 1F1B, interleaved when `chunks` > 1.

    With p stages and v chunks, stage r holds min(p - r, m) micro-batches, or min(2 (p - r - 1) + (v - 1) p + 1, m v) chunks.
    """
    if chunks == 1:
        return min(stages - stage, micro_batches)
    return min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, micro_batches * chunks)


def parameters_per_rank(config: Config, stage: int, vocab_size: int | None = None) -> int:
    """Parameters on one rank of a pipeline stage. Matrices are divided by the tensor-parallel size, norms are not."""
    model, parallel = config.model, config.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    first, last = stage == 0, stage == stages - 1

    def copies(weight: Weight) -> int:
        if weight.in_layers:
            return model.num_layers // stages
        if weight.part == "embedding":
            # a tied output layer on another stage than the embedding is a copy of it
            return first + (last and stages > 1 and model.share_embeddings_and_output_weights)
        return int(last)

    return sum(copies(weight) * weight.size(tensor) for weight in weights(model, vocab_size))


def memory_per_rank(
    config: Config,
    data_parallel_size: int,
    vocab_size: int | None = None,
    device: Device = "gpu",
    fp8: bool | None = None,
) -> list[Memory]:
    """Estimated memory of a rank of each pipeline stage, first to last.

    Per parameter on the rank: weights 2 bytes (4 in fp32), gradients 4, Adam's moments 8 and, in bf16, the fp32 master copy
    4; the average of `optim.ema_decay` 4 more; Muon 4 fewer for each parameter of the layers' products. The distributed
    optimizer divides the last three by the data- and context-parallel sizes. With `fp8` (default: as the configuration says)
    2 bytes more for each parameter of the layers' products: quantized copies, as they are and transposed, which are kept over
    the micro-batches, or with `fp8_param_gather` instead of them; the inputs of these products are kept in FP8, one byte per
    number.
    """
    quantized = config.precision.fp8 != "off" if fp8 is None else fp8
    return [
        _stage(config, data_parallel_size, stage, vocab_size, device, quantized)
        for stage in range(config.parallel.pipeline_model_parallel_size)
    ]


def _stage(config: Config, data: int, stage: int, vocab_size: int | None, device: Device, fp8: bool) -> Memory:
    model, parallel, train = config.model, config.parallel, config.train
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_stages
    tensor, shards, element = parallel.tensor_model_parallel_size, _sequence_shards(config), _element(config)
    tokens, context = config.micro_batch_tokens, parallel.context_parallel_size
    micro_batches = max(1, max(train.batch_sizes) // (train.micro_batch_size * data))
    first, last = stage == 0, stage == stages - 1
    on_rank = parameters_per_rank(config, stage, vocab_size)
    held = micro_batches_in_flight(stage, stages, chunks, micro_batches)
    stream = element * tokens * model.hidden_size // shards  # the residual stream of a micro-batch

    layers = model.num_layers // stages // chunks
    share = _share_in_fp8(config, stage) if fp8 else 0.0
    kept = sum(
        part * sum(kept_per_token(config, device, quantized).values())
        for part, quantized in ((share, True), (1 - share, False))
        if part
    )
    activations = round(kept * tokens * layers) * held
    if last:  # the last norm, and what it is applied to
        activations += stream + round((4 * (model.hidden_size + 1) / shards if device == "cpu" else 0) * tokens) + stream

    buffers = element * tokens * model.hidden_size if shards > 1 else 0
    if context > 1:  # keys and values of all ranks, as they come and in the order of the row, and the same of their gradients
        parts = 4 if device == "cpu" else 4 * context  # there: this rank's, another's, and the gradients of both
        buffers += parts * element * tokens * 2 * Dimensions.of(model).keys // tensor
    if stages > 1 and device == "cpu":  # its norms do not keep their input, and outputs are not released early
        buffers += stream * held * ((not first) + (not last))
    elif stages > 1:
        buffers += 2 * stream

    vocabulary = model.padded_vocab_size(vocab_size or model.vocab_size or 0) // tensor
    loss = head = 0
    if last:
        hidden, weight = element * tokens * model.hidden_size, element * vocabulary * model.hidden_size
        if train.fused_loss:
            loss = _fused_loss_bytes(element, vocabulary, tokens, device) + hidden
            if element == 2 and device == "cpu":  # which has no product of bf16 operands into fp32
                loss += weight
            head = weight + 2 * hidden
        else:
            loss = _loss_bytes(element, tensor, device) * vocabulary * tokens
            # the gradient of the logits, the place that megatron-core makes for a weight's gradient, the input's gradient
            head = element * vocabulary * tokens + weight + 2 * hidden
    layer = _layer_backward(config, tokens, device, fp8)
    working = max(layer, loss, head)
    at_loss = working == loss
    products = sum(weight.size(tensor) for weight in weights(model) if weight.is_product) * model.num_layers // stages
    per_parameter = (12 if element == 2 else 8) + (4 if config.optim.ema_decay is not None else 0)
    momenta = 4 * products if config.optim.name == "muon" else 0  # second moments, which matrices have none of
    shares = data * context if parallel.use_distributed_optimizer else 1
    return Memory(
        weights=on_rank * element + (0 if config.precision.fp8_param_gather else round(2 * products * share)),
        gradients=on_rank * 4,
        optimizer=(on_rank * per_parameter - momenta) // shares,
        activations=activations,
        logits=loss if at_loss else 0,
        buffers=buffers,
        working=0 if at_loss else working,
        health=0 if config.log.health_interval is None else 4 * on_rank // shares,
        keeps_health=device == "cpu",
    )


def _share_in_fp8(config: Config, stage: int) -> float:
    """Of a stage's layers, where those at the ends of the model may be left out."""
    stages = config.parallel.pipeline_model_parallel_size
    layers = config.model.num_layers // stages
    ends = config.precision.fp8_bf16_ends
    first = stage * layers
    inside = range(max(first, ends), min(first + layers, config.model.num_layers - ends))
    return len(inside) / layers


FUSED_LOSS_BYTES = 2**29
"""`LOGITS_BYTES` of the kernels' linear_cross_entropy, which is not imported here: it needs torch. A test compares them."""


def _fused_loss_bytes(element: int, vocabulary: int, tokens: int, device: Device) -> int:
    """Bytes of the fused loss: the logits of a chunk of tokens, and in fp32 what is worked on of them at once."""
    fitting = FUSED_LOSS_BYTES // (vocabulary * element) // 128 * 128
    rows = min(tokens, max(128, fitting))
    block = {"cpu": 2**18, "gpu": 2**24}[device]
    return element * rows * vocabulary + 4 * min(block, rows * vocabulary)


def _loss_bytes(element: int, tensor: int, device: Device) -> int:
    """Bytes per entry of the logits at the loss's own peak.

    In fp32 the logits and, on a rank that holds the whole vocabulary, the log-probabilities beside them; megatron-core's
    loss over shared vocabularies works in place. In bf16 the logits, and in fp32 what becomes their gradient; a CPU converts
    before it takes the logarithm.
    """
    if element == 4:
        return 8 if tensor == 1 else 4
    return 10 if tensor == 1 and device == "cpu" else 6


def _layer_backward(config: Config, tokens: int, device: Device, fp8: bool) -> int:
    """What the backward pass of one layer needs above what is kept.

    The gradient of an MLP's part and two of the residual stream (what is kept goes as they come), the place that megatron-core
    makes for a weight's gradient, and what recomputation makes again, with the copies it is made in. In FP8: `_fp8_backward`.
    """
    sizes = Dimensions.of(config.model)
    tensor, element = config.parallel.tensor_model_parallel_size, _element(config)
    hidden, width = sizes.hidden, sizes.ffn // tensor
    working = _fp8_backward(config, tokens, device) if fp8 else element * (tokens * (width + 2 * hidden) + hidden * width)
    if config.train.recompute == "full":
        working += round(sum(_all_kept(config, device, fp8).values()) * tokens)
    elif config.train.recompute == "selective" and not (fp8 and _fuses(config)):
        working += element * tokens * ({"cpu": 3, "gpu": 2}[device] * width + 4 * hidden)
    return working


def _fp8_backward(config: Config, tokens: int, device: Device) -> int:
    """As `_layer_backward`, of a layer in FP8: the more expensive of the MLP's two products.

    A gradient is there in both orders, a weight's gradient in fp32 before it is added, beside the place that autograd is given.
    """
    tensor, element = config.parallel.tensor_model_parallel_size, _element(config)
    sizes = Dimensions.of(config.model)
    hidden, width = sizes.hidden, sizes.ffn // tensor
    stream = 2 * element * tokens * hidden
    weight = (4 + element) * hidden * width
    activated = element * tokens * width  # the gradient of SwiGLU's output
    down = activated + 2 * tokens * hidden + max(4 * tokens * width, weight)
    up = 4 * tokens * width + 2 * weight
    if not _fuses(config):
        down, up = max(down, 3 * activated), up + 2 * activated
    if device == "cpu":  # quantizers work on fp32 copies, of bf16 on two at once, and SwiGLU's gradient is made first
        copies = 4 * (1 if element == 4 else 2)
        down = max(down, activated + 2 * tokens * hidden + 2 * tokens * width * (element + copies))
    return stream + max(down, up)
