"""What a run may not change when it goes on, and what its user should hear of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import Config, OptimConfig
from megatron_synth.core.log import scientific
from megatron_synth.train.schedule import learning_rate

_NOTICEABLE = 0.01
"""Relative change of the learning rate that is reported."""
_SHAPE: dict[str, Any] = {"windows_per_sequence": 1, "phases": [], "skip": [], "exclude_parents_of": None}
_SOURCE: dict[str, Any] = {"ratio": None, "max_epochs": 1.0, "unique_tokens": None, "shift_windows": False, "where": None}
"""Settings of data, and of a source in it, that decide what a sample holds, with what older versions meant."""


def check_steps(checkpoint: object, done: int, steps: int) -> None:
    """Refuse a run that would end before where it is.

    Raises:
        UserError: says what to set.
    """
    if steps < done:
        raise UserError(
            f"train.steps: {steps}, but {checkpoint} is of step {done}; set it to {done} or more to go on. To go back to an "
            "earlier checkpoint of the run, remove the later ones; to train less from the start, use another run directory"
        )


def rate_jump(before: Mapping[str, Any], config: Config, done: int) -> str | None:
    """How the learning rate of the next step differs from what it would have been; None: it does not, or there is no step.

    Args:
        before: the configuration in the checkpoint, as plain data.
        config: the one that the run goes on with.
        done: steps of the checkpoint.
    """
    if not 0 < done < config.train.steps:
        return None
    fields = {name: value for name, value in before["optim"].items() if name in OptimConfig.model_fields}
    optim, steps = OptimConfig(**fields), max(int(before["train"]["steps"]), done)
    last = learning_rate(done - 1, optim, steps)
    expected = learning_rate(done, optim, steps) if done < steps else last
    new = learning_rate(done, config.optim, config.train.steps)
    if abs(new - expected) <= _NOTICEABLE * max(new, expected):
        return None
    text = f"the learning rate goes from {scientific(last)} in step {done} to {scientific(new)} in step {done + 1}"
    if done < steps:
        return f"{text}, where it would have been {scientific(expected)}: the schedule was changed"
    return f"{text}: the schedule that had ended in step {done} was made longer"


def mixture_differences(
    before: Mapping[str, Any], contents_before: Mapping[str, Any], config: Config, contents: Mapping[str, Any]
) -> list[str]:
    """The settings and sources that decide which tokens a sample holds and that are not as they were, each in words.

    Args:
        before: the configuration in the checkpoint, as plain data.
        contents_before: what names the content of each source there; empty from versions that did not keep it.
        config: the one that the run is to go on with.
        contents: what names the content of its sources.
    """
    return list(_mixture_differences(before, contents_before, config, contents))


def _mixture_differences(
    before: Mapping[str, Any], contents_before: Mapping[str, Any], config: Config, contents: Mapping[str, Any]
) -> Iterator[str]:
    after = config.model_dump(mode="json")

    def changed(key: str, old: Any, new: Any) -> Iterator[str]:
        if old != new:
            yield f"{key} was {_shown(old)} and is {_shown(new)}"

    seed = before["data"].get("seed")
    yield from changed(
        "the data seed (data.seed, else train.seed)", before["train"]["seed"] if seed is None else seed, config.data_seed
    )
    yield from changed("train.sequence_length", before["train"]["sequence_length"], config.train.sequence_length)
    for key, default in _SHAPE.items():
        yield from changed(f"data.{key}", before["data"].get(key, default), after["data"][key])
    old_sources, new_sources = before["data"]["sources"], after["data"]["sources"]
    if list(old_sources) != list(new_sources):
        yield f"data.sources were {', '.join(old_sources)} and are {', '.join(new_sources)} (their order counts)"
    for name in [name for name in old_sources if name in new_sources]:
        old, new = old_sources[name], new_sources[name]
        for key, default in _SOURCE.items():
            yield from changed(f"data.sources.{name}.{key}", old.get(key, default), new[key])
        if name in contents_before and contents_before[name] != contents[name]:
            same = new["path"] == old["path"]
            what = f"{new['path']} was prepared again" if same else f"{new['path']} holds other data than {old['path']} did"
            yield f"data.sources.{name}: {what} (digest {contents_before[name]} -> {contents[name]})"
        elif not contents_before:
            yield from changed(f"data.sources.{name}.path", old["path"], new["path"])


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
