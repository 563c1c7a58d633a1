"""How long an optimizer step takes on GPUs, from shapes, bytes and the rates in `hardware.py`. Pure arithmetic.

The parts are added up as the engine runs them: products one after another at a rate that depends on how well their tiles fill
the chip; elementwise passes at the memory's rate; what the host needs to launch a layer as a lower bound; collectives by
group and link, less what runs beside them; a pipeline's bubble; the optimizer. What is not in it: stragglers, data loading,
checkpoints, network congestion.

Letters as in `memory.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

from megatron_synth.config.schema import Config
from megatron_synth.estimate.flops import attended, flops_per_token
from megatron_synth.estimate.hardware import Accelerator
from megatron_synth.estimate.memory import parameters_per_rank
from megatron_synth.model.architecture import Dimensions, products


@dataclass(frozen=True)
class Assumptions:
    """The constants of the model. Only `sustained` is fitted; the others are measured or published elsewhere."""

    gemm_bf16: float = field(default=0.797, metadata={"source": "788 of 989 TFLOP/s measured for 8192^3 on an H200"})
    gemm_fp8: float = field(
        default=0.644, metadata={"source": "DeepGEMM: 1125 to 1426 TFLOP/s at M=4096 on Hopper, the middle of 1979"}
    )
    sustained: float = field(
        default=0.70,
        metadata={"source": "fitted to seven published runs (plan --check): what real runs reach of the sum of the parts"},
    )
    memory: float = field(default=0.896, metadata={"source": "4.3 of 4.8 TB/s measured for a copy on an H200"})
    attention_forward: float = field(
        default=0.674, metadata={"source": "FlashAttention-3: 667 TFLOP/s causal, S4096, D128, of 989"}
    )
    attention_backward: float = field(default=0.449, metadata={"source": "FlashAttention-3: 444 TFLOP/s, as above"})
    link: float = field(default=0.8, metadata={"source": "assumed share of NVLink that NCCL reaches on large messages"})
    fabric: float = field(default=0.85, metadata={"source": "assumed share of InfiniBand that NCCL reaches on large messages"})
    latency_s: float = field(default=15e-6, metadata={"source": "assumed start of a collective, per 8 ranks doubled once"})
    host_layer_s: float = field(
        default=450e-6, metadata={"source": "assumed time of the host to launch a layer's forward and backward pass"}
    )
    hidden: float = field(default=0.9, metadata={"source": "assumed share of a pass that a reduction or gather hides behind"})


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the slowest stage, by what they are spent on; they add up to `total`."""

    gemm: float
    attention: float
    memory: float
    """Elementwise passes, norms, the loss."""
    host: float
    """Waiting for the host to launch."""
    tensor: float
    """Tensor-parallel collectives that nothing hides."""
    pipeline: float
    """Exchange between stages that nothing hides."""
    bubble: float
    data: float
    """Gradient reduction and parameter gather that nothing hides."""
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds per step."""
        return math.fsum(vars(self).values())

    @property
    def bound(self) -> str:
        """The largest part."""
        return max(vars(self), key=lambda name: float(vars(self)[name]))


_TILES = ((128, 256, 1.0), (128, 128, 0.92), (64, 128, 0.8))
"""Rows, columns and relative rate of the tiles that libraries choose among."""


@lru_cache(maxsize=100_000)
def gemm_seconds(chip: Accelerator, assume: Assumptions, m: int, n: int, k: int, fp8: bool, accumulate: bool) -> float:
    """[m, k] x [k, n]; with `accumulate` the result is added to an fp32 buffer, else written in bf16."""
    peak = (chip.fp8_flops or chip.bf16_flops) if fp8 else chip.bf16_flops
    rate = peak * (assume.gemm_fp8 if fp8 else assume.gemm_bf16) * assume.sustained
    filled = 0.0
    for rows, columns, relative in _TILES:
        tiles = math.ceil(m / rows) * math.ceil(n / columns)
        filled = max(filled, relative * tiles / (math.ceil(tiles / chip.processors) * chip.processors))
    moved = (1 if fp8 else 2) * (m * k + k * n) + (8 if accumulate else 2) * m * n
    return max(2 * m * n * k / (rate * filled), moved / (chip.memory_bandwidth * assume.memory * assume.sustained))


@dataclass(frozen=True)
class _Pass:
    """Seconds of one micro-batch through one layer or through the output layer."""

    gemm: float
    attention: float
    memory: float
    tensor: float

    @property
    def total(self) -> float:
        return self.gemm + self.attention + self.memory + self.tensor

    def times(self, factor: float) -> _Pass:
        return _Pass(self.gemm * factor, self.attention * factor, self.memory * factor, self.tensor * factor)

    def plus(self, other: _Pass) -> _Pass:
        return _Pass(
            self.gemm + other.gemm,
            self.attention + other.attention,
            self.memory + other.memory,
            self.tensor + other.tensor,
        )


def step_time(
    config: Config,
    data: int,
    chip: Accelerator,
    *,
    fp8: bool = False,
    overlap: bool = True,
    assume: Assumptions | None = None,
) -> StepTime:
    """Predicted step of `config` with `data` copies of the model.

    Args:
        config: a bf16 run; model.vocab_size is set.
        data: data-parallel size.
        chip: the GPU and its node.
        fp8: products of the layers in FP8, the output layer in bf16.
        overlap: gradients are reduced, and weights gathered, beside the passes.
        assume: the constants.
    """
    assume = assume or Assumptions()
    model, parallel, train = config.model, config.parallel, config.train
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_stages
    micro_batches = train.global_batch_size // (train.micro_batch_size * data)
    layers = model.num_layers // stages
    forward, backward = _layer(config, chip, assume, fp8)
    head_forward, head_backward = _head(config, chip, assume)

    gpu = forward.total + backward.total
    waiting = layers * max(0.0, assume.host_layer_s - gpu)
    # the last stage has the output layer on top, and sets the pace of the pipeline
    work = forward.plus(backward).times(layers).plus(head_forward).plus(head_backward)
    pace = work.total + waiting
    bubble = (stages - 1) / chunks * pace

    exchange = _exchange_seconds(config, data, chip, assume)
    # the interleaved schedule sends while it computes; what remains is filling and draining
    exposed = 0.0 if stages == 1 else 2 * exchange * (stages - 1 if chunks > 1 else micro_batches)

    parameters = max(parameters_per_rank(config, stage) for stage in (0, stages - 1))
    replicas = data * parallel.context_parallel_size
    reduce_s, gather_s = _data_seconds(parallel.tensor_model_parallel_size, replicas, parameters, chip, assume)
    if overlap:
        beside = layers / chunks / layers if chunks > 1 else 1.0
        reduce_s = max(0.1 * reduce_s, reduce_s - assume.hidden * beside * layers * backward.total)
        gather_s = max(0.1 * gather_s, gather_s - assume.hidden * beside * layers * forward.total)
    shards = replicas if parallel.use_distributed_optimizer else 1
    # per parameter: zero 4, read for the norm 4; of its shard: gradient, master and moments read, three written, weights
    traffic = parameters * 4 + parameters / shards * (4 + 16 + 12 + 2)
    return StepTime(
        gemm=micro_batches * work.gemm,
        attention=micro_batches * work.attention,
        memory=micro_batches * work.memory,
        host=micro_batches * waiting,
        tensor=micro_batches * work.tensor,
        pipeline=exposed,
        bubble=bubble,
        data=reduce_s + gather_s,
        optimizer=traffic / (chip.memory_bandwidth * assume.memory),
    )


def _layer(config: Config, chip: Accelerator, assume: Assumptions, fp8: bool) -> tuple[_Pass, _Pass]:
    """Forward and backward pass of one micro-batch through one layer."""
    train, sizes = config.train, Dimensions.of(config.model)
    tensor = config.parallel.tensor_model_parallel_size
    shards = tensor if config.parallel.uses_sequence_parallel else 1
    tokens, hidden, width = config.micro_batch_tokens, sizes.hidden, sizes.ffn
    queries, keys = sizes.queries, sizes.keys
    linears = products(config.model, tensor).values()

    gemm_forward = sum(gemm_seconds(chip, assume, tokens, n, k, fp8, False) for n, k in linears)
    gemm_input = sum(gemm_seconds(chip, assume, tokens, k, n, fp8, False) for n, k in linears)
    gemm_weight = sum(gemm_seconds(chip, assume, n, k, tokens, fp8, True) for n, k in linears)

    # causal: half of 4 S D per query; the backward pass has five products where the forward pass has two
    model = config.model
    seen = attended(model, train.sequence_length) / model.num_layers
    scores = 2 * tokens * seen * queries / tensor
    rate = chip.bf16_flops * assume.sustained
    attention_forward = scores / (rate * assume.attention_forward)
    attention_backward = 2.5 * scores / (rate * assume.attention_backward)
    gather = _context_seconds(config, chip, assume)
    if config.parallel.context_parallel_size > 1:  # which makes its scores again
        attention_backward += attention_forward

    # elements read and written per token: norms, residual sums, rotation, SwiGLU; backward also what joins their gradients
    forward = 10 * hidden / shards + (2 * (queries + keys) + 3 * width) / tensor
    backward = 12 * hidden / shards + (4 * queries + 6 * keys + 5 * width) / tensor
    if model.qk_norm != "off":
        forward += 2 * (queries + keys) / tensor
        backward += 3 * (queries + keys) / tensor
    bytes_forward, bytes_backward = 2 * forward, 2 * backward
    if fp8:  # read 2, write once as it is and once transposed
        bytes_forward += 4 * (2 * hidden + (queries + width) / tensor)
        bytes_backward += 4 * (2 * hidden + (queries + 2 * keys + 2 * width) / tensor)
    speed = chip.memory_bandwidth * assume.memory * assume.sustained
    one = _ring_seconds(2 * tokens * hidden, tensor, chip.link_bandwidth * assume.link, assume)
    # forward: gather and scatter round both halves. Backward: two gathers wait, the others run beside the products.
    hidden_part = max(0.0, 4 * one - (gemm_input + gemm_weight))
    result = (
        _Pass(gemm_forward, attention_forward, tokens * bytes_forward / speed, 4 * one + gather),
        _Pass(
            gemm_input + gemm_weight, attention_backward, tokens * bytes_backward / speed, 2 * one + hidden_part + 2 * gather
        ),
    )
    if train.recompute == "full":
        return result[0], result[1].plus(result[0])
    if train.recompute == "selective":
        again = tokens * 2 * (4 * hidden / shards + 3 * width / tensor) * 1.5 / speed  # made, then copied into place
        return result[0], result[1].plus(_Pass(0, 0, again, 0))
    return result


def _head(config: Config, chip: Accelerator, assume: Assumptions) -> tuple[_Pass, _Pass]:
    """Output layer and loss of one micro-batch: bf16, the loss in fp32."""
    model, train = config.model, config.train
    tensor = config.parallel.tensor_model_parallel_size
    assert model.vocab_size is not None
    tokens, vocabulary = config.micro_batch_tokens, model.padded_vocab_size(model.vocab_size) // tensor
    hidden = model.hidden_size
    speed = chip.memory_bandwidth * assume.memory * assume.sustained
    weight = gemm_seconds(chip, assume, vocabulary, hidden, tokens, False, True)
    # Fused: logits read for their sums, read and overwritten by their gradient. Else: logits read, fp32 log-probabilities
    # written, read and overwritten by their exponential; read, scaled, written as bf16.
    moved = (6, 0) if train.fused_loss else (14, 14)
    product = gemm_seconds(chip, assume, tokens, vocabulary, hidden, False, False)
    back = gemm_seconds(chip, assume, tokens, hidden, vocabulary, False, False) + weight
    entries = tokens * vocabulary / speed
    return _Pass(product, 0, moved[0] * entries, 0), _Pass(back, 0, moved[1] * entries, 0)


def _ring_seconds(size: float, ranks: int, bandwidth: float, assume: Assumptions) -> float:
    """An all-gather to, or a reduce-scatter of, `size` bytes: each rank passes (n - 1)/n of them on."""
    if ranks == 1:
        return 0.0
    return assume.latency_s * (1 + math.log2(max(1.0, ranks / 8))) + (ranks - 1) / ranks * size / bandwidth


def _context_seconds(config: Config, chip: Accelerator, assume: Assumptions) -> float:
    """Keys and values of one layer gathered by the ranks that share a sequence, or their gradients added up."""
    parallel = config.parallel
    tensor, ranks = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    size = 2 * 2 * config.micro_batch_tokens * ranks * Dimensions.of(config.model).keys / tensor
    near = tensor * ranks <= chip.per_node
    bandwidth = chip.link_bandwidth * assume.link if near else chip.fabric_bandwidth * assume.fabric
    return _ring_seconds(size, ranks, bandwidth, assume)


def _exchange_seconds(config: Config, data: int, chip: Accelerator, assume: Assumptions) -> float:
    """One micro-batch's residual stream from a stage to the next; stages are the outermost axis of megatron-core's order."""
    parallel = config.parallel
    tensor = parallel.tensor_model_parallel_size
    shards = tensor if parallel.uses_sequence_parallel else 1
    size = 2 * config.micro_batch_tokens * config.model.hidden_size / shards
    apart = tensor * parallel.context_parallel_size * data  # ranks between neighbors
    far = apart * parallel.pipeline_model_parallel_size > chip.per_node
    bandwidth = chip.fabric_bandwidth * assume.fabric if far else chip.link_bandwidth * assume.link
    return assume.latency_s + size / bandwidth


def _data_seconds(tensor: int, data: int, parameters: int, chip: Accelerator, assume: Assumptions) -> tuple[float, float]:
    """fp32 gradients reduced, bf16 weights gathered, over the copies of the model.

    A group with k members in a node has k of its network adapters, as long as that is less than NVLink carries.
    """
    bandwidth = chip.link_bandwidth * assume.link
    if tensor * data > chip.per_node:
        members = max(1, chip.per_node // tensor)
        bandwidth = min(bandwidth, members * chip.fabric_bandwidth * assume.fabric)
    return (
        _ring_seconds(4 * parameters, data, bandwidth, assume),
        _ring_seconds(2 * parameters, data, bandwidth, assume),
    )


def rates(config: Config, world_size: int, seconds: float, chip: Accelerator) -> tuple[float, float, float]:
    """Tokens/s, model FLOP/s and MFU against the dense BF16 peak, all per GPU."""
    tokens = config.train.tokens_per_step / seconds / world_size
    flops = tokens * flops_per_token(config.model, config.train.sequence_length)
    return tokens, flops, flops / chip.bf16_flops
