"""Sources of a run that hold the same text, whatever their paths: by checksums, and of bare pairs by their files."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

from megatron_synth.config.errors import UserError
from megatron_synth.data.mixing.mixture import MixturePlan
from megatron_synth.data.shards.selection import SelectedSource, parents_of, shared_tokens
from megatron_synth.data.shards.source import Source


def notes(sources: Sequence[Source], validation: Mapping[str, Source], exclude_parents: bool = False) -> list[str]:
    """What is likely a mistake, and may be meant: one line each. exclude_parents: whether data.exclude_parents_of is set."""
    shards = {id(source): _shards(source) for source in [*sources, *validation.values()]}
    found = []
    for source in sources:
        if source.manifest is not None and source.manifest.split == "validation":
            found.append(
                f"data.sources.{source.name}: {source.path} was prepared as validation text (split: validation), and is "
                "trained on"
            )
        if exclude_parents and source.manifest is not None and source.manifest.kind != "natural" and not parents_of(source):
            found.append(
                f"data.sources.{source.name}: {source.path} is of kind {source.manifest.kind} and has no column of type "
                "parent: data.exclude_parents_of leaves nothing of it out"
            )
    for one, two in combinations(sources, 2):
        if _overlap(one, two, shards) and isinstance(one, SelectedSource) | isinstance(two, SelectedSource):
            found.append(
                f"data.sources.{one.name} and data.sources.{two.name} choose from the same text ({one.path}) and share "
                f"{shared_tokens(one, two):,} tokens: an epoch of the one repeats a part of the other's"
            )
        elif _overlap(one, two, shards):
            found.append(
                f"data.sources.{one.name} ({one.path}) and data.sources.{two.name} ({two.path}) hold the same text: an "
                "epoch of the one repeats the other's"
            )
    for name, domain in validation.items():
        for source in sources:
            if _overlap(domain, source, shards):
                found.append(
                    f"data.validation.{name} ({domain.path}) and data.sources.{source.name} ({source.path}) hold the same "
                    "text: what is evaluated is trained on"
                )
    return found


def _overlap(one: Source, two: Source, shards: Mapping[int, frozenset[Hashable]]) -> bool:
    """Whether two sources hold the same text; of documents chosen from the same files, whether some are in both."""
    if not shards[id(one)] & shards[id(two)]:
        return False
    chosen = isinstance(one, SelectedSource) or isinstance(two, SelectedSource)
    return not chosen or one.manifest is None or two.manifest is None or shared_tokens(one, two) > 0


def check_epochs(plan: MixturePlan, sources: Sequence[Source], total_samples: int) -> None:
    """Hold the epochs of sources of equal content together against the largest of their limits.

    Raises:
        UserError: together they repeat the text more often.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, source in enumerate(sources):
        groups.setdefault(_content(source), []).append(number)
    counts = plan.counts(total_samples).tolist()
    for numbers in groups.values():
        specs = [plan.sources[number] for number in numbers]
        if len(numbers) == 1 or any(spec.allowed_samples is None for spec in specs):
            continue
        needed, allowed = sum(counts[number] for number in numbers), max(spec.allowed_samples or 0 for spec in specs)
        if needed > allowed:
            windows = max(spec.epoch_windows for spec in specs)
            enough = math.ceil(needed * 1000 / windows) / 1000
            names = " and ".join(f"data.sources.{spec.name}" for spec in specs)
            raise UserError(
                f"{names} hold the same text: together {needed} samples of {windows} windows, {needed / windows:.3f} epochs; "
                f"max_epochs allows {allowed}. Leave one out, lower their ratios, or set max_epochs of one to {enough:.12g}"
            )


def _content(source: Source) -> Hashable:
    return source.digest if source.digest is not None else _shards(source)


def _shards(source: Source) -> frozenset[Hashable]:
    """What the shards of a source are known by: the checksum of their tokens, or the file of a bare pair."""
    if source.manifest is not None:
        return frozenset(shard.bin_sha256 for shard in source.manifest.shards if shard.tokens)
    status = source.shard(0).bin_path.stat()
    return frozenset([(status.st_dev, status.st_ino)])
