"""What a run begins from: its own newest checkpoint, that of its trunk, the weights of another run, or nothing.

All that can be refused about it is refused here, before anything in the run directory is changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import Config, Progress
from megatron_synth.data.loading.run_data import RunData
from megatron_synth.storage.remote import is_remote
from megatron_synth.train.changes import check_steps, rate_jump
from megatron_synth.train.checkpoint import fetched, files
from megatron_synth.train.checkpoint.averages import check_average
from megatron_synth.train.checkpoint.branch import Trunk
from megatron_synth.train.checkpoint.resume import (
    TrainerState,
    check_architecture,
    check_resumable,
    check_tokenizer,
    newest_sound,
    read_trainer,
)


@dataclass(frozen=True)
class Start:
    """What a run begins from; nothing, with neither of the two checkpoints."""

    resumed: Path | None = None
    """The checkpoint that it goes on from."""
    saved: TrainerState | None = None
    """The trainer's part of it."""
    weights: Path | None = None
    """The checkpoint of another run whose weights it takes."""
    trunk: Trunk | None = None
    """What the run is a branch of, if it is one."""
    branches: bool = False
    """`resumed` is the trunk's: the branch has no checkpoint of its own yet."""
    warnings: tuple[str, ...] = ()
    """Of checkpoints that are damaged and passed over, and of a rate that jumps; on rank 0."""


def starting_point(config: Config, data: RunData, run_path: Path, trunk: Trunk | None = None) -> Start:
    """What the run in a directory begins from, checked. Called by all ranks; changes nothing.

    trunk: what it is a branch of.

    Raises:
        UserError: it cannot go on from its newest checkpoint, or cannot take the weights that it names.
    """
    warnings: list[str] = []
    found = newest_sound(run_path, config.checkpoint.verify, warnings.append)
    branches = found is None and trunk is not None
    if branches:
        assert trunk is not None
        place = trunk.checkpoint if trunk.url is None else on_every_node(trunk.url, "checkpoint.branch_from")
        found = newest_sound(place, config.checkpoint.verify)
        if found is None:
            raise UserError(f"checkpoint.branch_from: {trunk.checkpoint} is not there any more; restore it from a copy")
        check_tokenizer(found, read_trainer(found), data)
    if found is not None:
        saved = read_trainer(found)
        check_resumable(found, saved, config, data)
        check_steps(found, saved.step, config.train.steps)
        data.check_length(config, Progress(saved.step, saved.samples))
        jump = rate_jump(saved.config, config, saved.step)
        if jump is not None and torch.distributed.get_rank() == 0:
            warnings.append(jump)
        return Start(found, saved, trunk=trunk, branches=branches, warnings=tuple(warnings))
    weights = None if config.checkpoint.init_from is None else to_start_from(config, data)
    return Start(weights=weights, warnings=tuple(warnings))


def to_start_from(config: Config, data: RunData) -> Path:
    """The checkpoint that `checkpoint.init_from` names. Called by all ranks.

    Raises:
        UserError: there is none, or it holds another model, or one of another tokenizer, or no average where
            `checkpoint.init_ema` asks for it.
    """
    assert config.checkpoint.init_from is not None
    path = newest_sound(on_every_node(config.checkpoint.init_from, "checkpoint.init_from"), config.checkpoint.verify)
    if path is None:
        raise UserError(
            f"checkpoint.init_from: {config.checkpoint.init_from}: expected a run directory or a checkpoint, found neither"
        )
    saved = read_trainer(path)
    extends = config.checkpoint.init_vocabulary == "extend"
    if extends and data.vocab_size < saved.vocab_size:
        raise UserError(
            f"{path}: has {saved.vocab_size} tokens, and checkpoint.init_vocabulary: extend can only add to them, found "
            f"{data.vocab_size}; set model.vocab_size to {saved.vocab_size} or more"
        )
    check_architecture(path, saved, config.model, saved.vocab_size if extends else data.vocab_size)
    check_tokenizer(path, saved, data, extends=extends)
    if config.checkpoint.init_ema:
        check_average(path)
    return path


def on_every_node(text: str, key: str) -> Path:
    """A run directory or checkpoint on the disks of all nodes; of a URL the copy of one checkpoint. Called by all ranks.

    Rank 0 chooses the checkpoint: the newest may be another one a moment later, and ranks must not read two.

    Raises:
        UserError: it cannot be copied, or its copy has another path on another node.
    """
    if not is_remote(text):
        return Path(text)
    copy = fetched.Copy(fetched.split(text)[0], key)
    own = Path()
    chosen: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            step = fetched.split(text)[1]
            own = copy.newest() if step is None else copy.step(step)
            chosen = [(str(own), files.hash_file(own / files.MANIFEST))]
        except UserError as error:
            chosen = [UserError(str(error))]
    torch.distributed.broadcast_object_list(chosen, src=0)
    if isinstance(chosen[0], UserError):
        raise chosen[0]
    path, digest = chosen[0]
    fault = ""
    if torch.distributed.get_rank() != 0:
        try:
            own = copy.step(files.step_of(Path(path)))
            if str(own) != path:
                fault = f"is copied to {path} on one node and to {own} on another; let XDG_CACHE_HOME be the same on all"
            elif files.hash_file(own / files.MANIFEST) != digest:
                fault = "was replaced in the bucket while it was copied; start again"
        except UserError as error:
            fault = str(error)
    faults: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(faults, fault)
    for found in faults:
        if found:
            raise UserError(found if found.startswith(key) else f"{key}: {text} {found}")
    return own
