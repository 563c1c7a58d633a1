"""What is odd about a run and its user should know: loss spikes, steps that are not finite, slow ranks. Rank 0, at a log step.

Everything here is computed from what was reduced for the record anyway.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence

from megatron_synth.config.schema import Config
from megatron_synth.core.log import say
from megatron_synth.train.record import metrics
from megatron_synth.train.record.run_dir import RunDir

_WINDOW = 32
_LEAST = 16
"""Steps before spikes are looked for."""
_SIGMA = 1.4826
"""Standard deviation of a normal distribution / its median absolute deviation."""
_FLOOR = 0.002
"""Least standard deviation, as a part of the median: a loss that has converged moves by less without meaning anything."""


class Notes:
    """Writes events.log and the console."""

    def __init__(self, config: Config, run_dir: RunDir, hosts: Sequence[str]):
        """hosts: of each rank."""
        self._log, self._run_dir, self._hosts = config.log, run_dir, hosts
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._slowest: int | None = None
        self._times_slow = 0

    def step(self, record: metrics.Record, rows: Mapping[str, int], end: int) -> None:
        """Look at a step. rows: its samples by source. end: samples consumed after it."""
        loss, norm = record[metrics.LOSS], record[metrics.GRAD_NORM]
        if loss is None:
            what = "no label counts (data.eod_mask_loss): the loss is a mean over nothing, and there is no gradient"
            self._note(record, what, rows, end)
            return
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._note(record, f"not finite, skipped: loss {loss:.4g}, gradient norm {norm:.4g}", rows, end)
            return
        sigmas = self._sigmas(loss)
        if self._log.loss_spike_sigmas is not None and sigmas > self._log.loss_spike_sigmas:
            median = statistics.median(self._losses)
            before = f"the median {median:.4f} of the {len(self._losses)} steps before"
            text = f"loss spike: {loss:.4f}, {sigmas:.1f} sigmas above {before}"
            self._note(record, text, rows, end)
        self._losses.append(loss)

    def _sigmas(self, loss: float) -> float:
        """How many robust standard deviations `loss` lies above the median of the last steps."""
        if len(self._losses) < _LEAST:
            return 0.0
        median = statistics.median(self._losses)
        deviation = _SIGMA * statistics.median(abs(value - median) for value in self._losses)
        return (loss - median) / max(deviation, _FLOOR * abs(median), 1e-12)

    def _note(self, record: metrics.Record, what: str, rows: Mapping[str, int], end: int) -> None:
        losses = metrics.parts(record, metrics.SOURCE_LOSS)
        sources = ", ".join(f"{name} {count} (loss {losses.get(name, math.nan):.4g})" for name, count in rows.items() if count)
        first = end - sum(rows.values())
        command = f"megatron-synth mix show {self._run_dir.path} {first}-{end - 1} --text"
        text = f"step {record[metrics.STEP]}: {what}; samples {first} to {end - 1}: {sources}; read them with: {command}"
        say(f"warning: {text}")
        self._run_dir.event(f"warning: {text}")

    def times(self, step: int, own_s: Sequence[float]) -> None:
        """Look at the mean time per step of each rank, before it waits for others; name one that is slow twice in a row."""
        limit = self._log.straggler_pct
        if limit is None or len(own_s) < 2:
            return
        median, slowest = statistics.median_low(own_s), max(range(len(own_s)), key=own_s.__getitem__)
        excess = 100 * (own_s[slowest] / median - 1) if median > 0 else 0.0
        if excess <= limit:
            slowest = -1
        self._times_slow = self._times_slow + 1 if slowest == self._slowest else 1
        self._slowest = slowest
        if slowest < 0 or self._times_slow < 2:
            return
        # ranks of one replica wait for each other: the same few share the blame
        like = [rank for rank, value in enumerate(own_s) if value > median * (1 + limit / 100)]
        text = f"step {step}: rank {slowest} is slow: {own_s[slowest]:.3f} s a step before it waits for others, "
        text += f"{excess:.0f} % over the median of {len(own_s)} ranks, {median:.3f} s; over by more than {limit:g} %: "
        text += ", ".join(f"{rank} on {self._hosts[rank]}" for rank in like[:8]) + (" and more" if len(like) > 8 else "")
        say(f"warning: {text}")
        if self._times_slow == 2:  # once; the console tells as long as it lasts
            self._run_dir.event(f"warning: {text}")
