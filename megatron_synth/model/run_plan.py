"""What a run is decided to be, once, before anything is built: layout, device, kernels, FP8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_synth.config.schema import Config
from megatron_synth.model import kernels
from megatron_synth.model.kernels import Choice
from megatron_synth.parallel import engine
from megatron_synth.parallel.plan import Layout

if TYPE_CHECKING:
    from megatron_synth.model.fp8.setup import Fp8Plan


@dataclass(frozen=True)
class RunPlan:
    """The decisions of a run on this rank. Whatever builds or runs a model is given them and decides nothing again."""

    config: Config
    layout: Layout
    device: torch.device
    kernels: Mapping[str, Choice]
    """The backend of every operation; those of the process since the plan was made."""
    fp8: Fp8Plan | None
    """Which layers run in FP8 and how, every kind of product tried on the device; None without FP8."""


def decide(config: Config, layout: Layout) -> RunPlan:
    """Decide what is left open by a configuration and its layout. Needs no other rank.

    Starts the engine on this rank's device and makes the chosen kernels those of the process, so models of a plan are built
    before the next one is made.

    Raises:
        ConfigError: a kernel that the configuration names is unavailable on this machine.
        UserError: FP8 was asked for that this device cannot do.
    """
    choices = kernels.select(config)
    device = engine.start(layout)
    from megatron_synth.model import ops
    from megatron_synth.model.fp8.setup import plan_fp8

    kernels.activate(choices)
    ops.connect()
    return RunPlan(config, layout, device, choices, plan_fp8(config, device))
