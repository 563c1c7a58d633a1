"""Training with faults put into single steps: a batch of noise, a loss that is no number on one rank, a rate far too high."""

from __future__ import annotations

import os
import signal
from typing import Any

from tests.dist.jobs import rank
from tests.support import GLOBAL_BATCH_SIZE


def train_with_fault(arguments: list[str], fault: str, step: int, kill_at: int | None = None) -> int:
    """Train; in optimizer step `step`, counted from 1 over all starts, comes the fault: noise, row, nan or rate; or none.

    Noise is the same text in every layout, of all rows of the step or, with `row`, of that of its fourth sample. kill_at: the step before which this process is killed.
    """
    from dataclasses import replace

    import numpy as np
    import torch

    from megatron_synth.cli import main as cli
    from megatron_synth.train import loop
    from megatron_synth.train import step as step_module
    from megatron_synth.train.loop import Trainer

    at = {"step": 0}
    batches, learning_rate, original_loss = Trainer._batches, loop.learning_rate, step_module._loss

    def noisy(batch: Any) -> Any:
        tokens = batch.tokens.clone()
        if tokens.numel():
            for row, sample in enumerate(batch.samples.tolist()):
                if fault == "row" and sample != (step - 1) * GLOBAL_BATCH_SIZE + 3:
                    continue
                tokens[row] = torch.from_numpy(np.random.default_rng(sample).integers(0, 256, tokens.shape[1]))
        return replace(batch, tokens=tokens)

    def batches_with_fault(self: Any) -> Any:
        at["step"] = self.step + 1
        if kill_at == self.step + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        found = batches(self)
        return [noisy(batch) for batch in found] if fault in ("noise", "row") and at["step"] == step else found

    def rate(done: int, *rest: Any) -> float:
        return learning_rate(done, *rest) * (20 if fault == "rate" and done + 1 == step else 1)

    def loss_with_fault(losses: Any, **kwargs: Any) -> Any:
        last = rank() == int(os.environ.get("WORLD_SIZE", 1)) - 1
        if fault == "nan" and at["step"] == step and last:
            losses = losses._replace(total=losses.total + torch.nan, per_token=losses.per_token * torch.nan)
        return original_loss(losses, **kwargs)

    Trainer._batches = batches_with_fault  # type: ignore[method-assign]
    loop.learning_rate = rate
    step_module._loss = loss_with_fault
    return cli.main(arguments)
