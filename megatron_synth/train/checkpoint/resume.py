"""Checkpoints that any layout can read: what a run is beside its tensors, whether one can go on from it, and reading it.

What they consist of as files is in files.py, how they are written in writer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import Config, ModelConfig, ParallelConfig, PrecisionConfig
from megatron_synth.core.files import read_regular
from megatron_synth.core.log import say
from megatron_synth.core.names import plain_name
from megatron_synth.data.loading.run_data import RunData
from megatron_synth.data.mixing.ledger import EarlierLabels
from megatron_synth.data.tokenizer import FILE_NAME, fingerprint_of
from megatron_synth.model import architecture
from megatron_synth.model.fp8 import recipe
from megatron_synth.parallel import fp8_params
from megatron_synth.train.changes import mixture_differences
from megatron_synth.train.checkpoint import companions, files, reading, vocabulary
from megatron_synth.train.checkpoint.sharding import (
    AVERAGE,
    collect_tensors,
    names_of,
    sharded_fp8,
    sharded_model,
    sharded_optimizer,
)
from megatron_synth.train.checkpoint.writer import CheckpointWriter, SaveRequest

S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True)
class TrainerState:
    """All that a run is, beside weights and optimizer: the data state is one integer."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: int
    """Optimizer steps done."""
    samples: int
    """Samples consumed."""
    skipped: int
    """Steps skipped because they were not finite, or stood out."""
    run_id: str
    plan_digest: str
    """Digest of the sample order; another one must not be resumed silently."""
    ledger: dict[str, int]
    """Samples delivered by source."""
    vocab_size: int
    """Tokens of the vocabulary before padding."""
    eod_id: int | None
    """The token that ends a document, if it is known."""
    tokenizer: str | None
    """Name of its file in the run directory, if it is known; a path, in checkpoints of older versions."""
    config: dict[str, Any]
    prefix_digest: str = ""
    """Digest of the samples consumed alone: a mixture that changes only later has the same."""
    contents: dict[str, Any] = field(default_factory=dict)
    """What names the content of each source; empty from versions that did not keep it."""
    tokenizer_fingerprint: str | None = None
    """Of the tokenizer, where the data tells."""
    unlearned: dict[str, int] = field(default_factory=dict)
    """Of the ledger, the samples of skipped steps."""
    labels: dict[str, int] = field(default_factory=dict)
    """Of the ledger, the labels that were learned by source, where some tokens are read and not learned."""
    labels_earlier: EarlierLabels | None = None
    """Of these, what was counted under other settings."""
    consecutive: int = 0
    """Steps skipped in a row just before."""
    window: dict[str, list[float]] = field(default_factory=dict)
    """Losses and gradient norms of the last steps, by which the next are judged (train.skip)."""
    noted: list[float] = field(default_factory=list)
    """Losses of the last steps, by which spikes are noted (log.loss_spike_sigmas)."""
    format: int = 1
    """Of the checkpoint's files; 2 has a manifest."""


def newest_sound(path: Path, verify: str, warn: Callable[[str], None] | None = None) -> Path | None:
    """The newest sound checkpoint of a run directory or checkpoints folder, or `path` itself if it is one; None: there is none.

    The one way to open a checkpoint, whatever is done with it. Called by all ranks, which share the reading.

    Args:
        path: run directory, checkpoints folder or checkpoint.
        verify: `checksums` reads every file, `sizes` none (checkpoint.verify).
        warn: hears of each checkpoint that is damaged and passed over, on rank 0. Default: the console.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # one rank looks, so that all see the same folder
    listed: list[Any] = [files.candidates(path) if rank == 0 else None]
    torch.distributed.broadcast_object_list(listed, src=0)

    def faults_of(checkpoint: Path) -> list[str]:
        found: list[Any] = [None] * world_size
        own = files.faults(checkpoint, checksums=verify == "checksums", part=rank, parts=world_size)
        torch.distributed.all_gather_object(found, own)
        return sorted({fault for part in found for fault in part})

    if warn is None:
        warn = _warn
    return files.first_sound(listed[0], faults_of, warn if rank == 0 else None, path)


def _warn(text: str) -> None:
    say(f"warning: {text}")


def read_trainer(checkpoint: Path) -> TrainerState:
    """The trainer's part of a checkpoint.

    Raises:
        UserError: the file is missing or not ours.
    """
    path = checkpoint / files.TRAINER
    try:
        saved: TrainerState = TypeAdapter(TrainerState).validate_json(read_regular(path), strict=True)
        if saved.tokenizer is not None and Path(saved.tokenizer).name == saved.tokenizer:
            plain_name(saved.tokenizer, "tokenizer")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: expected the trainer's state of a checkpoint: {where}: {first['msg']}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected the trainer's state of a checkpoint: {error}") from error
    return saved


def saved_model(checkpoint: Path, saved: TrainerState) -> ModelConfig:
    """The model section of the run that wrote the checkpoint.

    Raises:
        UserError: there is none, or it is not valid.
    """
    return _section(checkpoint, saved, "model", ModelConfig)


def saved_shape(checkpoint: Path, saved: TrainerState) -> tuple[int, Literal["fp32", "bf16"]]:
    """Tokens of a sequence, and the number format of the weights, in the run that wrote the checkpoint.

    Raises:
        UserError: they are missing.
    """
    train = saved.config.get("train")
    length = train.get("sequence_length") if isinstance(train, dict) else None
    if type(length) is not int or length < 0:
        raise UserError(f"{checkpoint / files.TRAINER}: config.train.sequence_length: expected a number of tokens")
    return length, _section(checkpoint, saved, "precision", PrecisionConfig).dtype


def _section(checkpoint: Path, saved: TrainerState, name: str, kind: type[S]) -> S:
    content = saved.config.get(name)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["config", name, *map(str, first["loc"])])
        raise UserError(f"{checkpoint / files.TRAINER}: {where}: {first['msg']}") from None


def trainer_file(trainer: TrainerState) -> dict[str, Any]:
    """The trainer's part of a checkpoint that is about to be written."""
    return {**asdict(trainer), "format": files.FORMAT}


def check_architecture(checkpoint: Path, saved: TrainerState, model: ModelConfig, vocab_size: int) -> None:
    """Refuse weights of another model.

    Raises:
        UserError: names each setting that differs.
    """
    old = architecture.settings(saved_model(checkpoint, saved), saved.vocab_size)
    new = architecture.settings(model, vocab_size)
    differences = [f"{key} was {old[key]} and is now {new[key]}" for key in old if old[key] != new[key]]
    if differences:
        hint = ""
        if len(differences) == 1 and vocab_size > saved.vocab_size:
            hint = "; where tokens were added to its tokenizer, checkpoint.init_vocabulary: extend takes its weights"
        raise UserError(
            f"{checkpoint}: holds another model: {'; '.join(differences)}. Restore the model section, or use another run "
            f"directory to train the new model from the start{hint}"
        )


def check_resumable(checkpoint: Path, saved: TrainerState, config: Config, data: RunData) -> None:
    """Refuse to resume as something else. The layout, the number of steps, the mixture of samples yet to come may change.

    Raises:
        UserError: names what differs and the choices.
    """
    check_architecture(checkpoint, saved, config.model, data.vocab_size)
    elsewhere = f"start another run directory with checkpoint.init_from={checkpoint} to take over the weights alone"
    before = _lasting(
        _section(checkpoint, saved, "precision", PrecisionConfig),
        _section(checkpoint, saved, "parallel", ParallelConfig),
        _optimizer(saved),
    )
    for key, new in _lasting(config.precision, config.parallel, config.optim.name).items():
        old = before[key]
        if old != new:
            raise UserError(
                f"{checkpoint}: {key} was {old} and is now {new}; a run cannot change it. Set {key}={old}, or {elsewhere}"
            )
    if not data.is_of(saved.plan_digest) and not data.begins_as(saved.prefix_digest, saved.samples):
        differences = mixture_differences(saved.config, saved.contents, config, data.contents)
        what = "; ".join(differences) or "the prepared data of a source is another"
        raise UserError(
            f"{checkpoint}: the mixture differs from the one that this run has consumed {saved.samples} samples of: {what}. "
            "Restore that (config.yaml in the run directory has the settings); to change the mixture from here on, add a phase "
            f"to data.phases that begins at {saved.samples * data.window_length} tokens or later; or {elsewhere}"
        )


def counts_labels_anew(saved: TrainerState, config: Config, *, branches: bool) -> bool:
    """Whether the learned labels of what was consumed so far cannot be told from the settings and records of the run.

    They were not counted, or with another data.eod_mask_loss, or by a trunk, some of whose steps were skipped.
    branches: this start begins a branch of the run that saved.
    """
    data = saved.config.get("data")
    masked = data.get("eod_mask_loss", False) if isinstance(data, dict) else False
    uncounted = saved.samples > 0 and not saved.labels
    return uncounted or masked != config.data.eod_mask_loss or (branches and saved.skipped > 0)


def _optimizer(saved: TrainerState) -> Any:
    """The optimizer of the run that wrote the checkpoint; versions that did not say had one."""
    section = saved.config.get("optim")
    return section.get("name", "adamw") if isinstance(section, dict) else "adamw"


def _lasting(precision: PrecisionConfig, parallel: ParallelConfig, optimizer: Any) -> dict[str, Any]:
    """Settings that hold for the life of a run, those of FP8 first."""
    return {
        "precision.fp8": precision.fp8,
        "precision.fp8_format": precision.fp8_number_format,
        "precision.fp8_first_last_bf16": precision.fp8_bf16_ends,
        "precision.fp8_amax_history_len": precision.fp8_amax_history_len,
        "precision.fp8_margin": precision.fp8_margin,
        "precision.dtype": precision.dtype,
        "parallel.use_distributed_optimizer": parallel.use_distributed_optimizer,
        "optim.name": optimizer,
    }


def extend_vocabulary(
    checkpoint: Path, chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer, config: Config, data: RunData
) -> str | None:
    """Fill the rows of tokens that a checkpoint does not have; what was done, in words, or None. Called by all ranks."""
    before, after = read_trainer(checkpoint).vocab_size, data.vocab_size
    if before == after:
        return None
    vocabulary.fill_new_rows(chunks, optimizer, config.model, before, after)
    return f"the vocabulary grew from {before} to {after} tokens: each new row is the mean of the {before} old ones"


def tokenizer_of(checkpoint: Path, saved: TrainerState) -> Path | None:
    """tokenizer.json of the run that wrote the checkpoint; None if it is not known, or is not there any more.

    Raises:
        UserError: what is there is no tokenizer, or another one.
    """
    if saved.tokenizer is None:
        return None
    own = files.run_of(checkpoint) / FILE_NAME
    # where older versions left it, with the data: what is not a tokenizer is refused below, whatever the path names
    path = own if own.exists() or own.is_symlink() else checkpoint.parent / saved.tokenizer
    if path.is_symlink() and path == own:
        raise UserError(f"{path}: is a link, expected a file of the run's own")
    if not path.is_file():
        return None
    found = fingerprint_of(path)
    if saved.tokenizer_fingerprint not in (None, found):
        raise UserError(
            f"{path}: expected the tokenizer of the run (fingerprint {_short(saved.tokenizer_fingerprint)}), found another one "
            f"({_short(found)}); restore it from a copy of the run, or from the data that it was trained on"
        )
    return path


def check_tokenizer(checkpoint: Path, saved: TrainerState, data: RunData, *, extends: bool = False) -> None:
    """Refuse weights that were trained with another tokenizer than made the data: the same id would mean different text.

    extends: the data's may have tokens added to it.

    Raises:
        UserError: names both.
    """
    file = tokenizer_of(checkpoint, saved)
    before = saved.tokenizer_fingerprint or (fingerprint_of(file) if file else None)
    kept = companions.load(files.run_of(checkpoint))
    ends = [] if saved.eod_id is None else [saved.eod_id]
    if kept is not None and (saved.eod_id in kept.ends or not ends):
        ends = kept.ends
    fits = data.tokenizer_fingerprint is None or before in (None, data.tokenizer_fingerprint)
    if extends and (not fits or data.vocab_size > saved.vocab_size):
        vocabulary.check_growth(file, data.tokenizer, checkpoint)
        fits = True
    same_end = data.eod_id is None or not ends or data.eod_id in ends
    if fits and same_end:
        return
    if before is None:  # an import without a tokenizer: its config.json may name an end that means nothing
        if torch.distributed.get_rank() == 0:
            _warn(f"{checkpoint}: its texts end with token {' or '.join(map(str, ends))}, those of the data with {data.eod_id}")
        return
    old = f"{file or 'its tokenizer'}, {saved.vocab_size} tokens, end of document {' or '.join(map(str, ends)) or 'unknown'}"
    new = f"{data.tokenizer or 'its tokenizer'}, {data.vocab_size} tokens, end of document {data.eod_id}"
    raise UserError(
        f"{checkpoint}: was trained with another tokenizer ({old}, fingerprint {_short(before)}) than the data was made with "
        f"({new}, fingerprint {_short(data.tokenizer_fingerprint)}): the same id means different text. Prepare the data again "
        "with the checkpoint's tokenizer.json as `tokenizer.path`, and its end-of-document token as `tokenizer.eod`"
    )


def _short(fingerprint: str | None) -> str:
    return fingerprint[:12] if fingerprint else "unknown"


def load(
    checkpoint: Path,
    chunks: list[DistributedDataParallel],
    optimizer: ChainedOptimizer | None,
    what: str = "resume",
    *,
    fp8_scales: bool = True,
) -> dict[str, Any]:
    """Read weights, and the optimizer's states unless it is None, into this rank's shards. Called by all ranks.

    Histories of FP8 scales are taken over too, where the checkpoint has them and unless `fp8_scales` is False.

    Returns:
        The weights as they were saved, by megatron-core's names of the chunks.

    Raises:
        UserError: a file is missing or damaged, or the shapes differ.
    """
    state = sharded_model(chunks)
    if optimizer is not None:
        state["optimizer"] = sharded_optimizer(optimizer, dict(state), loading=True)
    else:  # weights from elsewhere come without TransformerEngine's extra state
        state = {name: {key: v for key, v in part.items() if not _is_extra(key)} for name, part in state.items()}
    if fp8_scales and any(map(recipe.is_state, reading.described(checkpoint))):
        state |= sharded_fp8(chunks)
    loaded = reading.load(state, checkpoint, what)
    parts = {name: loaded[name] for name in names_of(chunks)}
    for chunk, part in zip(chunks, parts.values(), strict=True):
        missing, unexpected = chunk.module.load_state_dict(part, strict=False)
        assert all(map(_is_extra, [*missing, *unexpected])), f"missing {missing}, unexpected {unexpected}"
    if "fp8" in loaded:
        run = recipe.of(chunks)
        assert run is not None
        run.load_state(loaded["fp8"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    return parts


def _is_extra(key: str) -> bool:
    return key.endswith("_extra_state")


def load_weights(checkpoint: Path, chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer) -> None:
    """Read weights alone, and let the optimizer's master weights follow them."""
    saved = load(checkpoint, chunks, None, what="take weights", fp8_scales=False)
    quantized = any(map(fp8_params.is_quantized, (parameter for chunk in chunks for parameter in chunk.parameters())))
    # from weights in FP8 it would take what that left of them
    optimizer.reload_model_params(saved if quantized else None)


def full_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All weights, unsharded, on the CPU, by the names of megatron-core's GPT model with all its layers.

    Needs a process group of one rank.

    Raises:
        UserError: the checkpoint does not hold the tensors of the model that its configuration describes.
    """
    saved = read_trainer(checkpoint)
    model = saved_model(checkpoint, saved)
    names = reading.described(checkpoint)
    beside = ("optimizer.", AVERAGE)
    wanted = {name: entry for name, entry in names.items() if not name.startswith(beside) and not recipe.is_state(name)}
    table = architecture.by_key(model, saved.vocab_size)
    check_tensors(checkpoint, {name: tuple(entry.global_shape) for name, entry in wanted.items()}, table, model.num_layers)
    loaded = reading.load(wanted, checkpoint, "take weights", whole=False)
    weights: dict[str, torch.Tensor] = {}
    for key, weight in table.items():
        parts = loaded[key] if weight.in_layers else [loaded[key]]
        weights.update(zip(weight.names(model.num_layers), parts, strict=True))
    return weights


def check_tensors(
    checkpoint: Path, found: dict[str, tuple[int, ...]], table: dict[str, architecture.Weight], layers: int
) -> None:
    """Refuse a checkpoint whose weights are not those of the table.

    Raises:
        UserError: names what is missing, left over, or of another shape.
    """
    expected = {key: weight.saved_shape(layers) for key, weight in table.items()}
    problems = [f"{key} is missing" for key in sorted(expected.keys() - found.keys())]
    problems += [f"{key} is not part of the model" for key in sorted(found.keys() - expected.keys())]
    problems += [
        f"{key} is {list(found[key])}, expected {list(shape)}"
        for key, shape in expected.items()
        if found.get(key, shape) != shape
    ]
    if problems:
        raise UserError(f"{checkpoint}: does not hold the model of its configuration: {'; '.join(problems[:4])}")


def save_full_weights(root: Path, weights: dict[str, torch.Tensor], trainer: TrainerState) -> Path:
    """Write a checkpoint of weights alone, from whole tensors named as `full_weights` returns them. One rank."""
    model = ModelConfig(**trainer.config["model"])
    state: dict[str, Any] = {}
    for key, weight in architecture.by_key(model, trainer.vocab_size).items():
        names = weight.names(model.num_layers)
        if not weight.in_layers:
            state[key] = ShardedTensor.from_rank_offsets(key, weights[names[0]])
            continue
        for layer, name in enumerate(names):
            place = (0, layer, len(names))
            state[f"{key}/{layer}"] = ShardedTensor.from_rank_offsets(key, weights[name], place, prepend_axis_num=1)
    writer = CheckpointWriter(root, "export", torch.device("cpu"))
    request = SaveRequest(trainer.step, trainer_file(trainer), committed=lambda path: None, failed=lambda text: None)
    writer.begin(lambda: collect_tensors(state), request)
    writer.outcome()
    return root / files.name_of(trainer.step)
