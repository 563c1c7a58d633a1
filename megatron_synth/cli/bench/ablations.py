"""`megatron-synth bench train --ablations`: the base and each variant in turn, and the table of what a lever does."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_synth.bench.train.ablations import Refused, Variant, chosen, variants
from megatron_synth.bench.train.ablations_table import render
from megatron_synth.bench.train.engine import Block, vocab_size
from megatron_synth.bench.train.rank_group import Job, RankGroup, RankGroupFailed, Ready, prepare
from megatron_synth.cli.bench.sweep import memory_of_a_rank, model_settings
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.core.files import write_json
from megatron_synth.core.log import say
from megatron_synth.parallel.plan import Layout, plan


@dataclass
class Measured:
    """A group's figures."""

    ready: Ready
    blocks: list[Block] = field(default_factory=list)
    peak_bytes: int = 0


@dataclass
class Effect:
    """A variant, and the base in the same turns; or why there are none."""

    variant: Variant
    status: str
    """`measured`, `out of memory`, `too slow` or `failed`."""
    found: Measured | None = None
    base_blocks: list[Block] = field(default_factory=list)
    error: str = ""

    def step_ratios(self) -> list[float]:
        """Per turn: the variant's median step time over the base's."""
        assert self.found is not None
        return [ours.median_s / theirs.median_s for ours, theirs in zip(self.found.blocks, self.base_blocks, strict=True)]

    def cpu_ratios(self) -> list[float]:
        """Per turn: processor time of a step, over all ranks, over the base's; empty on a GPU."""
        assert self.found is not None
        return [
            statistics.median(ours.cpu_s) / statistics.median(theirs.cpu_s)
            for ours, theirs in zip(self.found.blocks, self.base_blocks, strict=True)
            if ours.cpu_s
        ]


def losses_apart(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference; 0 where all are equal to the bit."""
    return max(
        abs(ours - theirs) / abs(theirs) if ours != theirs else 0.0 for ours, theirs in zip(found, expected, strict=True)
    )


def run(path: str, overrides: list[str], models: list[str], options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measure every lever that can be turned; exit code 0 when the base could be measured."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--ablations starts its ranks itself: run it once, without torchrun, with --ranks")
    if options.vs not in (None, "none") or options.sweep or options.vary or len(models) > 1:
        raise UserError("--ablations stands alone: leave out --vs, --sweep, --vary and all but one model")
    if options.profile or options.trace:
        raise UserError("--ablations has no profile: profile one setting without it")
    gpus, _ = memory_of_a_rank()
    ranks = options.ranks or max(1, gpus)
    if gpus and ranks > gpus:
        raise UserError(f"--ranks {ranks}: this machine has {gpus} GPU{'s' if gpus > 1 else ''}")
    settings = [*(setting for model in models for setting in model_settings(model)), *overrides]
    levers, real_data = chosen(options.ablations), options.data == "real"
    possible, refused = variants(path, settings, ranks, levers, "gpu" if gpus else "cpu", real_data)
    config = load_file(Config, path, settings)
    if not real_data:
        vocab_size(config)  # refused before anything is started
    layout = plan(config, ranks)

    method = prepare(on_gpu=gpus > 0)
    base, effects = _measure(path, settings, config, layout, possible, options, method)
    tried = len(effects)
    refused += [Refused(left.lever, left.settings, f"no time left of {options.budget} s") for left in possible[tried:]]
    from megatron_synth.bench import tables

    head = {**tables.header("bench", ["train", *argv]), "device": base.ready.device}
    document = to_json(head, config, layout, base, effects, refused)
    say("\n" + render(document))
    if options.json is not None:
        write_json(options.json, document)
    return EXIT_OK


def _measure(
    path: str,
    settings: Sequence[str],
    config: Config,
    layout: Layout,
    possible: Sequence[Variant],
    options: argparse.Namespace,
    method: str,
) -> tuple[Measured, list[Effect]]:
    turns = max(1, len(possible)) * options.pairs

    def group(variant: Variant | None, blocks: int) -> RankGroup:
        one, place = config, layout
        if variant is not None:
            one = load_file(Config, path, [*settings, *variant.settings])
            place = plan(one, layout.world_size)
        job = Job(
            one,
            place,
            options.warmup,
            variant.environment if variant else (),
            options.data == "real",
            variant.read_ahead if variant else True,
            blocks * options.steps,
        )
        return RankGroup(job, method, options.timeout)

    effects: list[Effect] = []
    began, longest = time.monotonic(), 0.0
    try:
        with group(None, turns) as base_group:
            base = Measured(base_group.ready())
            for number, variant in enumerate(possible, start=1):
                start = time.monotonic()
                if options.budget is not None and start + longest > began + options.budget:
                    break
                effects.append(_effect(variant, lambda v=variant: group(v, options.pairs), base_group, base, options))
                longest = max(longest, time.monotonic() - start)
                done = effects[-1]
                ratio = f" step time x{statistics.median(done.step_ratios()):.3f}" if done.found else f": {done.error}"
                say(f"{number}/{len(possible)} {variant.lever}, {variant.text}: {done.status}{ratio}")
            if not effects:
                base.blocks += [base_group.block(options.steps) for _ in range(options.pairs)]
            base.peak_bytes = base_group.end()
    except RankGroupFailed as failure:
        raise UserError(f"the base cannot be measured: {failure}") from None
    return base, effects


def _effect(variant: Variant, start: Any, base_group: RankGroup, base: Measured, options: argparse.Namespace) -> Effect:
    """A, B in one turn, B, A in the next, so that a drift of the machine favors neither."""
    effect = Effect(variant, "measured")
    try:
        with start() as group:
            found = Measured(group.ready())
            for turn in range(options.pairs):
                for is_base in (True, False) if turn % 2 == 0 else (False, True):
                    if is_base:
                        effect.base_blocks.append(_base_block(base_group, options.steps))
                        base.blocks.append(effect.base_blocks[-1])
                    else:
                        found.blocks.append(group.block(options.steps))
            found.peak_bytes = group.end()
            effect.found = found
    except RankGroupFailed as failure:
        effect.status, effect.error = failure.status, failure.error
    return effect


def _base_block(group: RankGroup, steps: int) -> Block:
    try:
        return group.block(steps)
    except RankGroupFailed as failure:
        raise UserError(f"the base failed beside a variant: {failure}") from None


def to_json(
    head: dict[str, Any],
    config: Config,
    layout: Layout,
    base: Measured,
    effects: Sequence[Effect],
    refused: Sequence[Refused],
) -> dict[str, Any]:
    """The result with every single step time."""

    def times(blocks: Sequence[Block]) -> dict[str, Any]:
        return {"step_s": [block.step_s for block in blocks], "cpu_step_s": [block.cpu_s for block in blocks]}

    def measured(effect: Effect) -> dict[str, Any]:
        assert effect.found is not None
        found = effect.found
        return {
            **times(found.blocks),
            "base": times(effect.base_blocks),
            "step_time_ratios": effect.step_ratios(),
            "cpu_time_ratios": effect.cpu_ratios(),
            "peak_bytes": found.peak_bytes,
            "peak_ratio": found.peak_bytes / base.peak_bytes,
            "warmup_losses": found.ready.losses,
            "losses_apart": losses_apart(found.ready.losses, base.ready.losses),
            "first_step_s": found.ready.start_s,
        }

    return {
        **head,
        "layout": layout.describe(),
        "config": config.model_dump(mode="json"),
        "base": {
            **times(base.blocks),
            "peak_bytes": base.peak_bytes,
            "warmup_losses": base.ready.losses,
            "first_step_s": base.ready.start_s,
        },
        "levers": [
            {
                "lever": effect.variant.lever,
                "turned_to": effect.variant.text,
                "status": effect.status,
                "error": effect.error,
                **(measured(effect) if effect.found is not None else {}),
            }
            for effect in effects
        ],
        "refused": [{"lever": one.lever, "settings": list(one.settings), "reason": one.reason} for one in refused],
    }
