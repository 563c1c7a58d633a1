"""Rules between settings that hold whatever the number of ranks. Those that need it are in `parallel/plan.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction

from megatron_synth.config.errors import Problem
from megatron_synth.config.schema import Config, DataConfig, OptimConfig

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_/-]*")


def check(config: Config) -> list[Problem]:
    """Everything in `config` that contradicts something else in it; an empty list when it is sound."""
    parts = (_model, _parallel, _data, _columns, _optimizer, _schedule, _loss, _precision, _attention, _saving)
    return [problem for part in parts for problem in part(config)]


def batch_sizes(config: Config) -> Iterator[tuple[str, int]]:
    """Every batch size of a run, in the order of its steps, by the key that says it."""
    for number, stage in enumerate(config.train.batch_ramp):
        yield f"train.batch_ramp.{number}.global_batch_size", stage.global_batch_size
    yield "train.global_batch_size", config.train.global_batch_size


def nearest_multiples(value: int, divisor: int) -> str:
    """The multiples of `divisor` around `value`, as advice: `8 or 12`."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)


def _model(config: Config) -> Iterator[Problem]:
    model = config.model
    heads, groups, hidden = model.num_attention_heads, model.query_groups, model.hidden_size
    if model.kv_channels is not None:
        if model.kv_channels % 2:
            yield Problem("model.kv_channels", f"{model.kv_channels} is odd; rotary embedding turns pairs of channels")
    elif hidden % heads:
        message = f"{hidden} is not divisible by the {heads} heads of model.num_attention_heads"
        near = nearest_multiples(hidden, heads)
        yield Problem("model.hidden_size", f"{message}; nearest: {near}; or set model.kv_channels, the channels of a head")
    elif model.head_dim % 2:
        message = f"{hidden} / {heads} heads gives a head dimension of {model.head_dim}; rotary embedding needs it even"
        yield Problem("model.hidden_size", message)
    if heads % groups:
        divisors = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        message = f"{groups} does not divide the {heads} heads of model.num_attention_heads; one of: "
        yield Problem("model.num_query_groups", message + ", ".join(divisors))
    if model.sliding_window_first_layer and model.sliding_window is None:
        message = f"{model.sliding_window_first_layer} has no effect without model.sliding_window"
        yield Problem("model.sliding_window_first_layer", message)
    if (scaling := model.rope_scaling) is not None:
        if scaling.rope_type != "linear" and scaling.original_max_position_embeddings is None:
            message = f"{scaling.rope_type} needs the context length of the first training"
            yield Problem("model.rope_scaling.original_max_position_embeddings", message)
        for low, high, kind in (("low_freq_factor", "high_freq_factor", "llama3"), ("beta_slow", "beta_fast", "yarn")):
            if scaling.rope_type == kind and getattr(scaling, low) >= getattr(scaling, high):
                message = f"{getattr(scaling, low):g} is not below model.rope_scaling.{high} = {getattr(scaling, high):g}"
                yield Problem(f"model.rope_scaling.{low}", message)


def _parallel(config: Config) -> Iterator[Problem]:
    model, parallel = config.model, config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for key, value, what in (
        ("num_attention_heads", model.num_attention_heads, "heads"),
        ("num_query_groups", model.query_groups, "key/value heads"),
        ("ffn_hidden_size", model.ffn_hidden_size, "MLP channels"),
    ):
        if value % tensor and not (key == "num_query_groups" and model.num_query_groups is None):
            message = f"{tensor} tensor-parallel ranks cannot share model.{key} = {value} {what} evenly"
            yield Problem("parallel.tensor_model_parallel_size", message)
    multiple = model.make_vocab_size_divisible_by
    if multiple % tensor:
        # stricter than "the padded vocabulary is divisible": one padding for all layouts, so that one seed is one model
        message = f"{multiple} is not a multiple of the {tensor} tensor-parallel ranks that share the vocabulary"
        nearest = nearest_multiples(multiple, tensor)
        yield Problem("model.make_vocab_size_divisible_by", f"{message}; nearest: {nearest}")
    if parallel.uses_sequence_parallel and tensor == 1:
        message = "true needs parallel.tensor_model_parallel_size > 1: it splits the sequence over those ranks"
        yield Problem("parallel.sequence_parallel", message)
    length = config.train.sequence_length
    context = parallel.context_parallel_size
    pieces = (2 * context if context > 1 else 1) * (tensor if parallel.uses_sequence_parallel else 1)
    if length % pieces:
        message = f"{length} is not divisible by the {tensor} ranks that sequence parallelism splits it over"
        if context > 1:
            over = f" x {tensor} of sequence parallelism" if parallel.uses_sequence_parallel else ""
            message = f"{length} is not divisible by 2 x {context} context-parallel ranks{over} = {pieces}"
        yield Problem("train.sequence_length", f"{message}; nearest: {nearest_multiples(length, pieces)}")

    chunks = parallel.virtual_stages
    if chunks > 1 and pipeline == 1:
        message = f"{chunks} model chunks per stage need parallel.pipeline_model_parallel_size > 1"
        yield Problem("parallel.virtual_pipeline_model_parallel_size", message)
    elif model.num_layers % (pipeline * chunks):
        parts = f"{pipeline} pipeline stages" + (f" x {chunks} chunks" if chunks > 1 else "")
        message = f"{model.num_layers} layers do not divide evenly over {parts}"
        nearest = nearest_multiples(model.num_layers, pipeline * chunks)
        yield Problem("model.num_layers", f"{message}; nearest: {nearest}")

    if parallel.overlap_param_gather:
        for key in ("use_distributed_optimizer", "overlap_grad_reduce"):
            if getattr(parallel, key) is False:
                yield Problem("parallel.overlap_param_gather", f"true needs parallel.{key}: true")


def _data(config: Config) -> Iterator[Problem]:
    data = config.data
    if data.phases:
        yield from _phases(config)
    else:
        missing = [name for name, source in data.sources.items() if source.ratio is None]
        yield from (Problem(f"data.sources.{name}.ratio", "required, but not set") for name in missing)
        if not missing:
            yield from _whole("data.sources", {name: source.ratio or Fraction(0) for name, source in data.sources.items()})
    for section, names in (("sources", data.sources), ("validation", data.validation), ("answers", data.answers)):
        for name in names:
            if not _NAME.fullmatch(name):
                message = "a name has letters, digits, '_', '-' and '/' only: it becomes part of metric names"
                yield Problem(f"data.{section}.{name}", message)
    yield from _shifted(data)
    if data.staging_bytes is not None and data.staging is None:
        yield Problem(
            "data.staging_bytes", f"{data.staging_bytes} has no effect without data.staging, the folder of the copies"
        )
    for number, (first, last) in enumerate(data.skip):
        if last < first:
            yield Problem(f"data.skip.{number}", f"[{first}, {last}] ends before it begins; the first sample comes first")
    train = config.train
    if train.skip is not None and train.skip.least > train.skip.window:
        yield Problem("train.skip.least", f"{train.skip.least} is more than the window of {train.skip.window} steps")
    if train.sequence_length % data.windows_per_sequence:
        divisors = [n for n in range(1, train.sequence_length + 1) if train.sequence_length % n == 0]
        near = sorted(sorted(divisors, key=lambda n: abs(n - data.windows_per_sequence))[:2])
        message = f"{data.windows_per_sequence} does not divide train.sequence_length = {train.sequence_length}"
        yield Problem("data.windows_per_sequence", f"{message}; nearest: {' or '.join(map(str, near))}")
    elif data.windows_per_sequence > 1 and train.sequence_length == data.windows_per_sequence:
        message = f"{data.windows_per_sequence} leaves windows of one token, which has no context of its own; take fewer"
        yield Problem("data.windows_per_sequence", message)
    tokens = train.sequences_until(train.steps) * train.sequence_length
    if tokens > 2**60:
        yield Problem("train.steps", f"{train.steps} steps are {tokens} tokens in all, at most {2**60} can be counted")
    for key, size in batch_sizes(config):
        if size % train.micro_batch_size:
            message = f"{size} is not divisible by train.micro_batch_size = {train.micro_batch_size}"
            yield Problem(key, f"{message}; nearest: {nearest_multiples(size, train.micro_batch_size)}")
    if train.batch_ramp and (ramp := sum(stage.steps for stage in train.batch_ramp)) >= train.steps:
        message = f"its {ramp} steps leave none of train.steps = {train.steps} with train.global_batch_size"
        yield Problem("train.batch_ramp", f"{message}; leave its last stage out, or train longer")


def _shifted(data: DataConfig) -> Iterator[Problem]:
    for name, source in data.sources.items():
        if source.shift_windows and source.unique_tokens is not None:
            message = "true would show tokens beside the windows that unique_tokens chooses; set one of them"
            yield Problem(f"data.sources.{name}.shift_windows", message)


def _whole(path: str, ratios: Mapping[str, Fraction]) -> Iterator[Problem]:
    total = sum(ratios.values(), Fraction(0))
    if total != 1:
        parts = " + ".join(f"{name} {ratio}" for name, ratio in ratios.items())
        decimal = "" if total.denominator == 1 else f" ({float(total):.10g})"
        yield Problem(path, f"the ratios must sum to exactly 1, but {parts} = {total}{decimal}")


def _phases(config: Config) -> Iterator[Problem]:
    data, last = config.data, len(config.data.phases) - 1
    before: int | None = 0
    for number, (phase, end) in enumerate(zip(data.phases, data.phase_ends, strict=True)):
        path = f"data.phases.{number}"
        if phase.tokens is not None and phase.until is not None:
            yield Problem(path, "has both `tokens` (its length) and `until` (its end); keep one of them")
        elif end is None and number < last and before is not None:
            yield Problem(path, "needs `tokens` or `until`: only the last phase may have no end")
        elif end is not None and before is not None and end <= before:
            yield Problem(f"{path}.until", f"{end} is not after the end of the phase before, {before}; both since the start")
        before = end
        if phase.ratios is not None and phase.ramp is not None:
            yield Problem(path, "has both `ratios` and `ramp`; keep one of them")
        elif phase.ramp is not None:
            if end is None:
                yield Problem(path, "a ramp needs an end: set `tokens` or `until`")
            elif phase.ramp.until is not None and phase.ramp.until < end:
                yield Problem(f"{path}.ramp.until", f"{phase.ramp.until} is before the end of the phase, {end}")
            for key, ratios in (("from", phase.ramp.start), ("to", phase.ramp.end)):
                yield from _shares(config, f"{path}.ramp.{key}", ratios)
        elif phase.ratios is not None:
            yield from _shares(config, f"{path}.ratios", phase.ratios)
    rest = [number for number, phase in enumerate(data.phases) if phase.ratios is None and phase.ramp is None]
    stated = [name for name, source in data.sources.items() if source.ratio is not None]
    if rest and stated:
        yield from _whole("data.sources", data.phase_ratios(data.phases[rest[0]]))
    elif rest:
        message = "has neither `ratios` nor `ramp`, and data.sources has no ratios to take instead"
        yield from (Problem(f"data.phases.{number}", message) for number in rest)
    else:
        message = "has no effect: every phase of data.phases has its own ratios; set it to null"
        yield from (Problem(f"data.sources.{name}.ratio", message) for name in stated)


def _columns(config: Config) -> Iterator[Problem]:
    if config.data.exclude_parents_of is not None and not config.data.validation:
        yield Problem("data.exclude_parents_of", "validation: there is no domain in data.validation; set it to null")


def _shares(config: Config, path: str, ratios: Mapping[str, Fraction]) -> Iterator[Problem]:
    known = list(config.data.sources)
    for name in ratios:
        if name not in known:
            yield Problem(f"{path}.{name}", f"no source of data.sources has this name; known: {', '.join(known)}")
    yield from _whole(path, ratios)


def _optimizer(config: Config) -> Iterator[Problem]:
    optim = config.optim
    for name in ("muon_momentum", "muon_ns_steps"):
        if optim.name != "muon" and getattr(optim, name) != OptimConfig.model_fields[name].default:
            yield Problem(f"optim.{name}", f"{getattr(optim, name):g} has no effect without optim.name: muon")
    if optim.name == "muon" and config.model.mup_base_hidden_size is not None:
        message = "cannot be set with optim.name: muon, whose updates of a matrix do not grow with its width; set it to null"
        yield Problem("model.mup_base_hidden_size", message)
    if optim.name == "muon" and config.precision.fp8_param_gather:
        yield Problem("optim.name", "muon needs precision.fp8_param_gather: false, which leaves weights in parts that it knows")
    if optim.qk_clip is not None and config.model.qk_norm != "off":
        yield Problem(
            "optim.qk_clip", f"has no effect with model.qk_norm: {config.model.qk_norm}, which bounds logits; set it to null"
        )
    if optim.qk_clip is not None and config.precision.fp8_param_gather:
        yield Problem("optim.qk_clip", "needs precision.fp8_param_gather: false, as it is not tested with weights in FP8")


def _schedule(config: Config) -> Iterator[Problem]:
    optim, steps = config.optim, config.train.steps
    if optim.min_lr > optim.lr:
        yield Problem("optim.min_lr", f"{optim.min_lr:g} is above the peak, optim.lr = {optim.lr:g}")
    decay = (optim.decay_steps or 0) if optim.schedule == "wsd" else 0
    if optim.decay_steps is not None and optim.schedule != "wsd":
        message = f"only the schedule 'wsd' has decay steps, optim.schedule is '{optim.schedule}'; set it to null"
        yield Problem("optim.decay_steps", message)
    if optim.warmup_steps + decay > steps:
        parts = f"{optim.warmup_steps} warm-up" + (f" + {decay} decay" if decay else "")
        yield Problem("optim.warmup_steps", f"{parts} steps do not fit in train.steps = {steps}")


def _precision(config: Config) -> Iterator[Problem]:
    precision, model = config.precision, config.model
    if precision.fp8 == "off":
        if precision.fp8_param_gather:
            yield Problem("precision.fp8_param_gather", "true needs precision.fp8: delayed, current or blockwise")
        return
    if precision.fp8_bf16_ends * 2 >= model.num_layers:
        message = f"{precision.fp8_bf16_ends} layers at each end are all {model.num_layers} layers: none is left for FP8"
        yield Problem("precision.fp8_first_last_bf16", message)
    if precision.fp8_param_gather:
        if precision.fp8_backend == "own":
            message = "true needs TransformerEngine's layers; set precision.fp8_backend: te, or this to false"
            yield Problem("precision.fp8_param_gather", message)
        if not config.parallel.use_distributed_optimizer:
            message = "true needs parallel.use_distributed_optimizer: true, which holds the weights in fp32"
            yield Problem("precision.fp8_param_gather", message)
    if precision.fp8_backend == "te" or precision.fp8_param_gather:
        key, what = ("fp8_backend", "te") if precision.fp8_backend == "te" else ("fp8_param_gather", "true")
        if precision.dtype != "bf16":
            yield Problem(f"precision.{key}", f"{what} needs precision.dtype: bf16")
        if precision.fp8 == "delayed" and precision.fp8_bf16_ends:
            message = "TransformerEngine's delayed scaling cannot leave layers out; use current"
            message += ", or fp8_backend: own" if what == "te" and not precision.fp8_param_gather else ""
            yield Problem("precision.fp8_first_last_bf16", message)
    # every size of a product is divided by the blocks, or by the 16 elements that the FP8 units read at once
    multiple = 128 if precision.fp8 == "blockwise" else 16
    tensor = config.parallel.tensor_model_parallel_size
    heads, groups, head_dim = model.num_attention_heads, model.query_groups, model.head_dim
    sizes = {
        "model.hidden_size": (model.hidden_size, 1, "hidden size"),
        "model.num_attention_heads": (heads * head_dim, tensor, "query channels"),
        "model.num_query_groups": ((heads + 2 * groups) * head_dim, tensor, "query, key and value channels"),
        "model.ffn_hidden_size": (model.ffn_hidden_size, tensor, "MLP channels"),
        "train.sequence_length": (
            config.train.micro_batch_size * config.train.sequence_length,
            config.parallel.context_parallel_size,
            "tokens of a micro-batch",
        ),
    }
    for key, (size, parts, what) in sizes.items():
        if size % parts or (size // parts) % multiple:
            sharing = "context" if key == "train.sequence_length" else "tensor"
            share = f"{size} / {parts} {sharing}-parallel ranks" if parts > 1 else str(size)
            message = f"precision.fp8: {precision.fp8} needs a multiple of {multiple}, found {share} {what}"
            yield Problem(key, message)


def _attention(config: Config) -> Iterator[Problem]:
    chosen, model = config.kernels.attention, config.model
    if config.parallel.context_parallel_size > 1 and chosen in ("cudnn", "te"):
        message = f"'{chosen}' does nothing where ranks share sequences (parallel.context_parallel_size > 1)"
        yield Problem(
            "kernels.attention", f"{message}: their parts go to torch's FlashAttention; leave it at auto, flash or fa3"
        )
        return
    if chosen == "cudnn":
        windows = any(model.window_of(layer) is not None for layer in range(model.num_layers))
        if config.data.document_masks or windows:
            other = "data.document_masks" if config.data.document_masks else "the model's windows"
            message = f"'cudnn' takes whole rows, not {other}; leave it at auto, or name flash, fa3 or te"
            yield Problem("kernels.attention", message)


def _loss(config: Config) -> Iterator[Problem]:
    if config.train.z_loss and not config.train.fused_loss:
        yield Problem("train.z_loss", f"{config.train.z_loss:g} needs train.fused_loss: true")


def _saving(config: Config) -> Iterator[Problem]:
    every, interval = config.checkpoint.keep_every, config.checkpoint.interval
    if every is not None and interval is None:
        message = f"{every} keeps nothing without checkpoint.interval, which says when to save"
        yield Problem("checkpoint.keep_every", message)
    elif every is not None and interval is not None and every % interval:
        message = f"{every} is not a multiple of checkpoint.interval = {interval}, so few such steps are ever saved"
        yield Problem("checkpoint.keep_every", f"{message}; nearest: {nearest_multiples(every, interval)}")
    if config.checkpoint.init_from is not None and config.checkpoint.branch_from is not None:
        message = "cannot be set with checkpoint.init_from: a branch takes the weights of its trunk; keep one of them"
        yield Problem("checkpoint.branch_from", message)
    if config.checkpoint.init_ema and config.checkpoint.init_from is None:
        yield Problem("checkpoint.init_ema", "true needs checkpoint.init_from, the run whose average it is")
    if config.checkpoint.init_vocabulary == "extend":
        if config.checkpoint.init_from is None:
            yield Problem("checkpoint.init_vocabulary", "extend needs checkpoint.init_from, whose vocabulary it is")
        elif config.precision.fp8_param_gather:
            message = "extend needs precision.fp8_param_gather: false in the first start; it may be true from the second on"
            yield Problem("checkpoint.init_vocabulary", message)
    if config.optim.ema_decay is not None and config.precision.fp8_param_gather:
        yield Problem("optim.ema_decay", "needs precision.fp8_param_gather: false, which leaves weights that it can stand for")
    if not config.data.validation and not config.data.answers:
        if config.eval.interval is not None:
            yield Problem("eval.interval", f"{config.eval.interval} has nothing to evaluate: data.validation is empty")
        if config.eval.at_start:
            yield Problem("eval.at_start", "true has nothing to evaluate: data.validation is empty")
