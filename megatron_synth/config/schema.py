"""Every setting of a training run, as frozen sections. One field, one docstring, one default.

Names are Megatron's where Megatron has one. The sections `data` and `model` are in `data.py` and `model.py`. Rules that span
sections are in `rules.py`; reading files is in `load.py`.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from megatron_synth.config.data import AnswersConfig as AnswersConfig
from megatron_synth.config.data import DataConfig as DataConfig
from megatron_synth.config.data import PhaseConfig as PhaseConfig
from megatron_synth.config.data import RampConfig as RampConfig
from megatron_synth.config.data import SourceConfig as SourceConfig
from megatron_synth.config.data import ValidationConfig as ValidationConfig
from megatron_synth.config.model import ModelConfig as ModelConfig
from megatron_synth.config.section import NonNegativeInt, PositiveInt, Section, Seed


class ParallelConfig(Section):
    """The layout. The data-parallel size is what remains: world size / (tensor x context x pipeline)."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share each layer's matrices (TP)."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Stages that share the layers (PP)."""
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Model chunks per stage in the interleaved schedule (VP). Default: one, plain 1F1B."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share each sequence (CP), for long ones: each has an early and a late part of it. They hold the same weights,
    and gather each other's keys and values in attention."""
    sequence_parallel: bool | None = None
    """Split norms and residuals over the tensor-parallel ranks. Default: on exactly when tensor parallel."""
    use_distributed_optimizer: bool = True
    """Shard optimizer states over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool | None = None
    """Reduce gradients while the backward pass runs. Default: on GPUs, with several data-parallel ranks and the distributed
    optimizer."""
    overlap_param_gather: bool | None = None
    """Gather updated weights while the forward pass runs; needs the distributed optimizer and overlap_grad_reduce. Default: as
    overlap_grad_reduce's."""
    ddp_bucket_size: PositiveInt | None = None
    """Parameters whose gradients are reduced at once where that overlaps with the backward pass. Default: megatron-core's, 40
    million or, if it is more, one million for each data-parallel rank."""

    @property
    def uses_sequence_parallel(self) -> bool:
        """`sequence_parallel` after the default."""
        return self.tensor_model_parallel_size > 1 if self.sequence_parallel is None else self.sequence_parallel

    def overlaps(self, data_parallel_size: int, on_gpu: bool) -> tuple[bool, bool]:
        """`overlap_grad_reduce` and `overlap_param_gather` after the defaults."""
        pays = on_gpu and data_parallel_size > 1 and self.use_distributed_optimizer
        gather = self.overlap_param_gather
        if gather is None:
            gather = pays and self.overlap_grad_reduce is not False
        reduce = self.overlap_grad_reduce
        return (pays or gather) if reduce is None else reduce, gather

    @property
    def virtual_stages(self) -> int:
        """Model chunks per stage, after the default."""
        return self.virtual_pipeline_model_parallel_size or 1


class SkipConfig(Section):
    """When a step changes nothing: its loss or its gradient norm stands out from those of the steps before it."""

    sigmas: Annotated[float, Field(gt=0)] = 8.0
    """So many robust standard deviations above the median. One is 1.4826 x the median absolute difference between neighbors,
    divided by the root of 2."""
    window: Annotated[int, Field(ge=4, le=100_000)] = 64
    """Of the last so many steps that were not skipped."""
    least: Annotated[int, Field(ge=4, le=100_000)] = 16
    """Steps before which nothing stands out."""


class BatchStage(Section):
    """Steps at the beginning of a run with a batch size of their own."""

    steps: PositiveInt
    """Optimizer steps."""
    global_batch_size: Annotated[int, Field(ge=1, le=2**22)]
    """Sequences of each of them."""


class TrainConfig(Section):
    """How long, how much at a time."""

    steps: PositiveInt
    """Optimizer steps."""
    global_batch_size: Annotated[int, Field(ge=1, le=2**22)]
    """Sequences per optimizer step, over all ranks."""
    batch_ramp: tuple[BatchStage, ...] = ()
    """Batch sizes of the first steps, stage after stage; global_batch_size holds from their end on. The learning rate follows
    steps, whatever their size. Default: none."""
    micro_batch_size: PositiveInt = 1
    """Sequences per forward pass of one data-parallel rank."""
    sequence_length: Annotated[int, Field(ge=1, le=2**24)]
    """Tokens per sequence (S)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations made again in the backward pass instead of kept: selective, the outputs of norms and of SwiGLU, which cost
    next to nothing to make again; full, all but each layer's input, at the cost of a third more arithmetic."""
    gc_interval: PositiveInt | None = 100
    """Collect Python's garbage every so many steps, on all ranks at once. Null: whenever Python likes, also within steps."""
    seed: Seed = 1234
    """Seed of the initial weights and, unless data.seed is set, of the data order."""
    fused_loss: bool = True
    """Output layer and cross-entropy in one, chunk by chunk: the logits, [tokens, vocabulary], are never whole in memory."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared logarithm of the softmax's denominator, which keeps logits from drifting; 1e-4 is usual. Logged
    beside the loss, which is without it. Needs fused_loss."""
    skip: SkipConfig | None = None
    """Skip steps whose loss or gradient norm stands out, as those that are not finite are. Default: only these."""
    max_consecutive_skips: PositiveInt = 5
    """Stop after this many steps in a row that were skipped."""
    hang_timeout_s: Annotated[float, Field(ge=1)] | None = 600.0
    """A step that takes longer, and three times longer than the longest so far, is a hang: all ranks write their stacks, one
    says which is behind, and the run ends with exit code 70. Start-up, the first step, evaluations and saves that are waited
    for may take six times as long. `null`: wait for ever."""
    lost_rank_timeout_s: Annotated[float, Field(ge=1)] = 60.0
    """A rank of another host without a sign of life for so long is lost, and reported likewise. That one of the same host has
    ended is known within seconds."""

    @property
    def tokens_per_step(self) -> int:
        """Trained tokens per optimizer step, after the batch ramp."""
        return self.global_batch_size * self.sequence_length

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Every batch size that a step has, in their order."""
        return (*(stage.global_batch_size for stage in self.batch_ramp), self.global_batch_size)

    def batch_size_of(self, step: int) -> int:
        """Sequences of optimizer step `step`, counted from 0."""
        for stage in self.batch_ramp:
            if step < stage.steps:
                return stage.global_batch_size
            step -= stage.steps
        return self.global_batch_size

    def sequences_until(self, step: int) -> int:
        """Sequences of the steps before step `step`, counted from 0."""
        found = 0
        for stage in self.batch_ramp:
            here = min(step, stage.steps)
            found, step = found + here * stage.global_batch_size, step - here
        return found + step * self.global_batch_size


class OptimConfig(Section):
    """The optimizer and the learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw. muon: Muon for the matrices of the layers, AdamW for embeddings, output layer, norms and biases, at one learning
    rate: updates of a matrix have the root mean square of AdamW's."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Muon's momentum."""
    muon_ns_steps: Annotated[int, Field(ge=1, le=20)] = 5
    """Iterations by which Muon orthogonalizes a matrix."""
    lr: Annotated[float, Field(gt=0, le=1000)] = 3e-4
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end."""
    schedule: Literal["cosine", "wsd", "linear", "inverse_sqrt", "constant"] = "cosine"
    """After warm-up: cosine to min_lr, warmup-stable-decay, a straight line to min_lr, peak x sqrt(warmup_steps / steps done),
    which needs no length of the run and falls no lower than min_lr, or constant."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    decay_steps: PositiveInt | None = None
    """wsd: steps of the final linear decay. Default: a tenth of the run."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of Adam's first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of Adam's second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's epsilon."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    qk_clip: Annotated[float, Field(gt=0)] | None = None
    """QK-clip: where the largest attention logit of a head exceeds this (Kimi K2: 100), its queries and keys are scaled so that
    it would not. Every step computes the scores of all tokens once more for it. Default: off."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """d of an exponential average of the weights, e <- d e + (1 - d) w after every update, which is saved, evaluated beside the
    weights and exported on request. Default: none is kept."""


class PrecisionConfig(Section):
    """Number formats."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Weights and activations. With bf16, master weights, gradients and optimizer states stay fp32."""
    fp8: Literal["off", "delayed", "current", "blockwise"] = "off"
    """Products of the linear layers in FP8. delayed: one scale per tensor, from largest magnitudes of past steps. current: one
    scale per tensor, from the tensor itself. blockwise: one per 1 x 128 (activations, gradients) and 128 x 128 (weights)."""
    fp8_format: Literal["hybrid", "e4m3"] | None = None
    """hybrid: e5m2 for gradients, e4m3 for the rest. e4m3: that for all. Default: e4m3 where blocks are scaled, else hybrid."""
    fp8_first_last_bf16: bool | NonNegativeInt = False
    """Keep so many layers at the beginning, and as many at the end, in `dtype`; true is one."""
    fp8_amax_history_len: PositiveInt = 16
    """delayed: steps whose largest magnitude sets the scale."""
    fp8_margin: NonNegativeInt = 0
    """delayed: divide scales by 2 to this power, as room for tensors that grow."""
    fp8_backend: Literal["auto", "te", "own"] = "auto"
    """Whose FP8 layers: TransformerEngine's or ours. auto: TransformerEngine's on a GPU where it can be imported."""
    fp8_fused: bool = True
    """Quantize RMSNorm and SwiGLU, forward and backward, while they are made: the same numbers in fewer passes. Ours only."""
    fp8_log_every: PositiveInt | None = None
    """Write each FP8 layer's largest magnitudes, scales and shares of under- and overflow to metrics.jsonl every so many steps.
    Default: never."""
    fp8_param_gather: bool = False
    """Keep the weights of the FP8 layers in FP8 alone, and gather them so from data-parallel ranks: half the traffic, no bf16
    copy. TransformerEngine's layers and the distributed optimizer only. Checkpoints do not depend on it."""

    @property
    def fp8_number_format(self) -> Literal["hybrid", "e4m3"]:
        """`fp8_format` after the default."""
        return self.fp8_format or ("e4m3" if self.fp8 == "blockwise" else "hybrid")

    @property
    def fp8_bf16_ends(self) -> int:
        """`fp8_first_last_bf16` as a number of layers."""
        return int(self.fp8_first_last_bf16)


class KernelsConfig(Section):
    """Which implementation computes an operation; `megatron-synth kernels` shows what a machine has.

    auto takes the first that the device allows. A backend that is named and unavailable is an error.
    """

    rms_norm: Literal["auto", "te", "apex", "triton", "torch", "compile"] = "auto"
    """RMSNorm."""
    rms_norm_residual: Literal["auto", "triton", "torch", "compile"] = "auto"
    """Addition to the residual stream and the RMSNorm after it."""
    swiglu: Literal["auto", "te", "triton", "torch", "compile"] = "auto"
    """silu(gate) * up."""
    rope: Literal["auto", "triton", "torch", "compile"] = "auto"
    """Rotary position embedding."""
    attention: Literal["auto", "cudnn", "fa3", "flash", "torch", "te"] = "auto"
    """Causal attention, within documents where they are masked. cudnn: whole rows only. fa3: FlashAttention 3, where its wheel
    is installed. flash: torch's FlashAttention 2. torch: its choice for each shape, which may be a slow one. te:
    TransformerEngine's, only where it is named."""
    cross_entropy_stats: Literal["auto", "triton", "torch"] = "auto"
    """First pass over the logits: maximum, sum of exponentials, the label's logit."""
    cross_entropy_grad: Literal["auto", "triton", "torch"] = "auto"
    """Second pass over the logits: their gradient, in their memory."""
    adam: Literal["auto", "te", "apex", "torch", "triton"] = "auto"
    """The optimizer's update."""
    wgrad: Literal["auto", "apex", "torch"] = "auto"
    """Weight gradients, added straight into fp32 gradients."""
    quantise_fp8: Literal["auto", "triton", "torch"] = "auto"
    """Quantizers of FP8 layers, where precision.fp8 has any of ours."""
    swiglu_quantise: Literal["auto", "triton", "torch"] = "auto"
    """SwiGLU and its gradient in one with their quantizers, where precision.fp8_fused."""
    rms_norm_quantise: Literal["auto", "triton", "torch"] = "auto"
    """RMSNorm in one with its quantizer, where precision.fp8_fused."""


class CheckpointConfig(Section):
    """When to save, what to keep."""

    interval: PositiveInt | None = None
    """Save every so many steps. Default: only by time, at the end and when stopped."""
    interval_s: Annotated[float, Field(gt=0)] | None = 1800.0
    """Also save when the last save is so many seconds ago, half an hour by default. Null: never by time."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep."""
    keep_every: PositiveInt | None = None
    """Also keep, for good, those whose step is a multiple of this."""
    async_save: bool = True
    """Write files while training goes on: it waits for a copy to the host's memory alone. The last save of a run, and that on a
    stop request, are waited for."""
    verify: Literal["sizes", "checksums"] = "checksums"
    """What is checked of a checkpoint before it is resumed: the sizes of its files, or their content too, which reads them once
    more, in parallel over the ranks. A damaged one is passed over for the newest sound one before it."""
    keep_steps: tuple[PositiveInt, ...] = ()
    """Save after these steps too, and keep them for good: what branches begin from."""
    upload_to: str | None = None
    """Folder of this run alone in object storage, such as `s3://bucket/runs/a`: checkpoints are uploaded there while training
    goes on, kept as here, and the newest sound one is fetched where the run directory has none that is as new."""
    init_from: str | None = None
    """Start from these weights (a run directory or checkpoint, or `URL` or `URL@STEP` of a run in object storage), with fresh
    optimizer and data."""
    init_vocabulary: Literal["same", "extend"] = "same"
    """With init_from: same refuses another vocabulary or tokenizer. extend takes the checkpoint's tokenizer with tokens added:
    a new token's row in embedding and output layer is the mean of all old rows."""
    init_ema: bool = False
    """With init_from: start from the average that the run kept (optim.ema_decay) in place of its weights."""
    branch_from: str | None = None
    """`RUN@STEP`, or `URL@STEP` of a run in object storage: go on from this checkpoint of another run with its weights,
    moments, steps and data position, under this file's schedule, budget and mixture. A mixture that differs from the trunk's
    begins there, its phases counted from there."""


class EvalConfig(Section):
    """Validation."""

    interval: PositiveInt | None = None
    """Evaluate every so many steps. Default: only at the end."""
    batches: PositiveInt | None = None
    """Global batches per domain. Default: the whole domain."""
    at_start: bool = False
    """Also evaluate before the first step: the record of step 0."""


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    """Offline runs are written below the run directory; `wandb sync` uploads them."""
    project: str = "megatron-synth"
    """Project name."""
    entity: str | None = None
    """Team or user. Default: wandb's own."""
    name: str | None = None
    """Display name. Default: the run directory's name."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""


class LogConfig(Section):
    """Console, metrics.jsonl and wandb."""

    interval: PositiveInt = 10
    """Steps between log lines. metrics.jsonl has every step all the same."""
    straggler_pct: Annotated[float, Field(gt=0)] | None = 20.0
    """Name the slowest rank and its host when its own time per step is so many percent over the median of all ranks."""
    loss_spike_sigmas: Annotated[float, Field(gt=0)] | None = 8.0
    """Note a step, its samples and how to read them when its loss lies so many robust standard deviations above the median of
    the 32 steps before it. Steps that are not finite are always noted."""
    health_interval: PositiveInt | None = None
    """Every so many steps, record the norms of gradients, weights, updates and activations, the largest attention logit and the
    share of saturated FP8 values, all by layer, and entropy and padding of the output. Default: never."""
    loss_by: Annotated[tuple[str, ...], Field(max_length=8)] = ()
    """Columns of categories, such as `[kind, generator]`: training and evaluation also record the loss by their values, the 16
    most frequent of each and the rest together."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""


class Progress(NamedTuple):
    """How far a run has come. Both are counted, as the batch size may change at a resume."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Windows consumed."""


NOT_BEGUN = Progress()


class Config(Section):
    """A training run."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig()
    precision: PrecisionConfig = PrecisionConfig()
    kernels: KernelsConfig = KernelsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch on one rank."""
        return self.train.micro_batch_size * self.train.sequence_length // self.parallel.context_parallel_size

    @property
    def window_length(self) -> int:
        """Tokens of a sample: a window of one source. `rules.check` sees to it that whole windows make a sequence."""
        return self.train.sequence_length // self.data.windows_per_sequence

    def samples_of_step(self, step: int) -> int:
        """Windows of optimizer step `step`, counted from 0, over all ranks."""
        return self.train.batch_size_of(step) * self.data.windows_per_sequence

    @property
    def total_samples(self) -> int:
        """Windows of a run that begins and ends with this configuration."""
        return self.samples_at_end(NOT_BEGUN)

    def samples_at_end(self, progress: Progress) -> int:
        """Windows that a run has consumed at its end: those so far, whatever the batch size then was, and those to come."""
        if progress.step >= self.train.steps:
            return progress.samples
        sequences = self.train.sequences_until(self.train.steps) - self.train.sequences_until(progress.step)
        return progress.samples + sequences * self.data.windows_per_sequence

    def step_after(self, samples: int, progress: Progress) -> int:
        """Whole steps after which at most `samples` windows are consumed, of a run that goes on from `progress`."""
        sequences, step = (samples - progress.samples) // self.data.windows_per_sequence, progress.step
        ends = accumulate(stage.steps for stage in self.train.batch_ramp)
        for end, stage in zip(ends, self.train.batch_ramp, strict=True):
            if sequences < 0 or step >= end:
                continue
            here = min(end - step, sequences // stage.global_batch_size)
            sequences, step = sequences - here * stage.global_batch_size, step + here
            if step < end:
                return step
        return max(step + sequences // self.train.global_batch_size, 0)

    @property
    def data_seed(self) -> int:
        """Seed of the data order, after the default."""
        return self.train.seed if self.data.seed is None else self.data.seed
