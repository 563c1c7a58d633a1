"""What is odd about a run and its user should know: loss spikes, steps that are not finite, slow ranks. Rank 0, at a log step.

Everything here is computed from what was reduced for the record anyway.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from megatron_synth.config.schema import Config
from megatron_synth.core.log import say
from megatron_synth.train.record import metrics
from megatron_synth.train.record.run_dir import RunDir
from megatron_synth.train.spikes import LOSS_FLOOR, Row, Window

STANDS_OUT = "far above the other rows of the source"
"""What notes on rows have in common."""
_ROW_NOTES = 20
"""Notes on rows of one start."""
_WINDOW = 32
_LEAST = 16
"""Steps before spikes are looked for."""


class Notes:
    """Writes events.log and the console."""

    def __init__(self, config: Config, run_dir: RunDir, hosts: Sequence[str], losses: Sequence[float] = ()):
        """hosts: of each rank. losses: of the last steps before this start."""
        self._log, self._run_dir, self._hosts = config.log, run_dir, hosts
        self._losses = Window(_WINDOW, _LEAST, LOSS_FLOOR)
        self._losses.restore(losses)
        self._rows_told = 0
        self._slowest: int | None = None
        self._times_slow = 0

    @property
    def losses(self) -> list[float]:
        """Of the last steps that counted, by which the next are judged."""
        return self._losses.values

    def look(self, record: metrics.Record, skipped: str = "") -> str | None:
        """What is odd about a step; None: nothing. skipped: why it was, if its numbers are finite and it was."""
        loss, norm = record[metrics.LOSS], record[metrics.GRAD_NORM]
        if loss is None:
            return "no label counts (data.eod_mask_loss, prompts): the loss is a mean over nothing, and there is no gradient"
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"not finite, skipped: loss {loss:.4g}, gradient norm {norm:.4g}"
        if skipped:  # its loss is none to hold others against
            return f"skipped: {skipped}"
        sigmas, limit = self._losses.sigmas(loss), self._log.loss_spike_sigmas
        before = f"the median {self._losses.median:.4f} of the {len(self._losses)} steps before" if len(self._losses) else ""
        self._losses.add(loss)
        return f"loss spike: {loss:.4f}, {sigmas:.1f} sigmas above {before}" if limit is not None and sigmas > limit else None

    def tell(
        self, record: metrics.Record, what: str, rows: Mapping[str, int], samples: tuple[int, int], worst: Sequence[str] = ()
    ) -> None:
        """Write down what is odd about a step.

        Args:
            record: of the step.
            what: as `look` said it.
            rows: its samples by source.
            samples: the first and the last of them.
            worst: its rows of largest loss, in words.
        """
        losses = metrics.parts(record, metrics.SOURCE_LOSS)
        sources = ", ".join(f"{name} {count} (loss {losses.get(name, math.nan):.4g})" for name, count in rows.items() if count)
        first, last = samples
        command = f"megatron-synth mix show {self._run_dir.path} {first}-{last} --text"
        ranked = f"; largest losses: {'; '.join(worst)}" if worst else ""
        text = f"step {record[metrics.STEP]}: {what}; samples {first} to {last}: {sources}{ranked}; read them with: {command}"
        say(f"warning: {text}")
        self._run_dir.event(f"warning: {text}")

    def tell_rows(self, step: int, number: int, first: Row, named: Sequence[str]) -> None:
        """Write down the rows of a step that stand out from those of their source, though the step does not.

        Args:
            step: the step.
            number: how many rows.
            first: the first of them.
            named: the first few, in words.
        """
        self._rows_told += 1
        if self._rows_told > _ROW_NOTES:
            return
        which = "a row" if number == 1 else f"{number} rows"
        text = f"step {step}: {which} {STANDS_OUT}, {first.sigmas:.1f} sigmas above their median: "
        text += "; ".join(named) + ("; and more" if number > len(named) else "")
        text += f"; read it with: megatron-synth mix show {self._run_dir.path} {first.sample}-{first.sample} --text"
        if self._rows_told == _ROW_NOTES:
            text += f"; {_ROW_NOTES} steps had such rows since the start, later ones are not noted"
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
