"""Training beside which the health of a step is computed once more, from what passes through the model."""

from __future__ import annotations

from typing import Any


def train_and_compute_health(arguments: list[str], step: int) -> dict[str, Any]:
    """Train on one rank in fp32; what the health of `step` is by plain torch, by the names of metrics.jsonl."""
    import torch

    from megatron_synth.cli import main as cli
    from megatron_synth.train.step import Stepper
    from tests.dist.layouts import health_reference

    original = Stepper.step
    found: dict[str, Any] = {}
    done = 0

    def measured(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done != step:
            return original(self, *args, **kwargs)
        (chunk,) = self.chunks
        with health_reference.watched(chunk.module) as seen:
            before = {name: value.detach().clone() for name, value in chunk.module.named_parameters()}
            result = original(self, *args, **kwargs)
        with torch.no_grad():
            found.update(health_reference.health(chunk.module, seen, before))
        return result

    Stepper.step = measured  # type: ignore[method-assign]
    assert cli.main(arguments) == 0
    return found
