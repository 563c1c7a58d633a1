"""The learning rate as a function of the step alone, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

from megatron_synth.config.schema import OptimConfig


def learning_rate(step: int, optim: OptimConfig, total_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0, of a run of `total_steps` steps.

    With W = warmup_steps, peak = lr, and T = total_steps - 1 the last step:

    - warm-up, step < W: ``peak * (step + 1) / W``. The first step gets peak / W, step P = max(W - 1, 0) the peak.
    - cosine: ``min_lr + (peak - min_lr) * (1 + cos(pi * (step - P) / (T - P))) / 2``; exactly min_lr at step T
      (I. Loshchilov and F. Hutter, SGDR, 2017, without restarts).
    - wsd, with D = decay_steps or a tenth of the run: peak until step B = max(T - D, P), then the straight line
      ``peak + (min_lr - peak) * (step - B) / (T - B)``; exactly min_lr at step T. A decay that would begin
      before the warm-up has ended begins at its end.
    - linear: the straight line ``peak + (min_lr - peak) * (step - P) / (T - P)``; exactly min_lr at step T.
    - inverse_sqrt: ``max(min_lr, peak * sqrt((P + 1) / (step + 1)))`` (A. Vaswani et al., arXiv 1706.03762, eq. 3, with its
      scale chosen so that step P gets the peak); without warm-up it falls from the first step on.
    - constant: peak.

    A run that ends within its warm-up ends there: the warm-up has precedence over every decay.
    """
    assert 0 <= step < total_steps, f"step {step} of a run of {total_steps}"
    peak, floor, warmup = optim.lr, optim.min_lr, optim.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    last, peak_step = total_steps - 1, max(warmup - 1, 0)
    if optim.schedule == "constant" or step == peak_step:
        return peak
    if optim.schedule == "inverse_sqrt":
        return max(floor, peak * math.sqrt((peak_step + 1) / (step + 1)))
    if step == last:
        return floor
    progress = (step - peak_step) / (last - peak_step)
    if optim.schedule == "cosine":
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if optim.schedule == "linear":
        return peak + (floor - peak) * progress
    decay_steps = optim.decay_steps or max(1, round(total_steps / 10))
    decay_begin = max(last - decay_steps, peak_step)
    if step <= decay_begin:
        return peak
    return peak + (floor - peak) * (step - decay_begin) / (last - decay_begin)
