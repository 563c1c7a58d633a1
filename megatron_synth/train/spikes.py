"""Steps that stand out: a loss, or a gradient norm, far above those of the steps before it. Rows that do among their source's.

Above their median, in standard deviations that a trend does not widen: 1.4826 x the median of the absolute differences between
neighbors, divided by the root of 2. (A falling loss has a wide spread about its median in which a batch of noise would hide.)
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_synth.config.schema import SkipConfig

SIGMA = 1.4826
"""Standard deviation of a normal distribution / its median absolute deviation."""
LOSS_FLOOR, NORM_FLOOR = 0.002, 0.05
"""Least standard deviation, as a part of the median: a loss that has converged moves by less without meaning anything; gradient
norms have long tails, and one that is a quarter above the others is no fault."""
ROW_FLOOR = 0.02
"""The same of single rows."""
_ROWS, _LEAST_ROWS, _LEVEL = 1024, 96, 32
"""Rows of a source that others are held against, how many there must be, and over how many its level is taken."""


class Window:
    """The last values of a number, and how far another one lies above them."""

    def __init__(self, size: int, least: int, floor: float):
        """least: values before which nothing stands out. floor: least standard deviation, as a part of the median."""
        self._values: deque[float] = deque(maxlen=size)
        self._least, self._floor = least, floor

    def __len__(self) -> int:
        return len(self._values)

    @property
    def values(self) -> list[float]:
        """What a checkpoint keeps of it, the oldest first."""
        return list(self._values)

    @property
    def median(self) -> float:
        """Of the values, of which there must be some."""
        return statistics.median(self._values)

    def restore(self, values: Iterable[float]) -> None:
        """Go on from `values`."""
        self._values.clear()
        self._values.extend(values)

    def add(self, value: float) -> None:
        """Take in a value; the oldest may go."""
        self._values.append(value)

    def sigmas(self, value: float) -> float:
        """How many robust standard deviations `value` lies above the median; 0 while there are too few."""
        if len(self._values) < self._least:
            return 0.0
        differences = [abs(after - before) for before, after in pairwise(self._values)]
        deviation = SIGMA * statistics.median(differences) / math.sqrt(2)
        return (value - self.median) / max(deviation, self._floor * abs(self.median), 1e-12)


class Guard:
    """Says of each step whether it is skipped (`train.skip`). Its numbers are equal on all ranks, and so are its answers."""

    def __init__(self, config: SkipConfig):
        self._sigmas = config.sigmas
        self.loss, self.norm = (Window(config.window, config.least, floor) for floor in (LOSS_FLOOR, NORM_FLOOR))

    def judge(self, loss: float | None, norm: float) -> str:
        """Why a step is to be skipped; empty: it is not, and is taken in. loss: None where no label counts."""
        if not (math.isfinite(norm) and (loss is None or math.isfinite(loss))):
            return "not finite"
        values = [("loss", loss, self.loss), ("gradient norm", norm, self.norm)]
        for name, value, window in values:
            if value is not None and (sigmas := window.sigmas(value)) > self._sigmas:
                before = f"the median {window.median:.4g} of the {len(window)} steps before"
                return f"{name} {value:.4g} stands out, {sigmas:.1f} sigmas above {before}"
        for _, value, window in values:
            if value is not None:
                window.add(value)
        return ""

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint keeps of it."""
        return {"loss": self.loss.values, "grad_norm": self.norm.values}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Go on from a state; an empty one, of a run that had no guard, is a beginning."""
        self.loss.restore(state.get("loss", ()))
        self.norm.restore(state.get("grad_norm", ()))


class Row(NamedTuple):
    """A row that stands out from those of its source."""

    sigmas: float
    loss: float
    """Nats per label; NaN or infinite where it is no number."""
    sample: int


class Rows:
    """Says which rows stand out from those of their source that this rank has trained on, although their step may not.

    A part of a row that is damaged, or one row of many, moves the loss of a step by less than the steps differ. What is judged
    is a row's loss less the median of the `_LEVEL` rows of its source before its step, so that a falling loss does not widen
    the spread: by how many deviations it lies above the median of the same of the last `_ROWS` rows. A deviation is 1.4826
    times their median distance from that median, and at least ROW_FLOOR of the loss.
    """

    def __init__(self, sigmas: float, sources: int):
        self._sigmas = sigmas
        self._losses = [np.empty(0) for _ in range(sources)]
        self._above = [np.empty(0) for _ in range(sources)]

    def look(
        self, losses: npt.NDArray[np.float64], source_ids: npt.NDArray[np.int64], samples: npt.NDArray[np.int64]
    ) -> list[Row]:
        """The rows of a step that stand out, the first first. The others are what the next are held against.

        losses: [N] nats per label. source_ids, samples: [N] source of each row and its number in the mixture.
        """
        found: list[Row] = []
        for source_id, (before, above) in enumerate(zip(self._losses, self._above, strict=True)):
            own = source_ids == source_id
            values, numbers = losses[own], samples[own]
            if not len(values):
                continue
            odd = ~np.isfinite(values)
            if len(before) == _LEVEL:
                level = float(np.median(before))
                risen = values - level
                if len(above) >= _LEAST_ROWS:
                    usual = float(np.median(above))
                    spread = SIGMA * float(np.median(np.abs(above - usual)))
                    sigmas = (risen - usual) / max(spread, ROW_FLOOR * abs(level), 1e-12)
                    odd |= sigmas > self._sigmas
                    rows = zip(sigmas[odd].tolist(), values[odd].tolist(), numbers[odd].tolist(), strict=True)
                    found += [Row(*one) for one in rows]
                self._above[source_id] = np.concatenate([above, risen[~odd]])[-_ROWS:]
            self._losses[source_id] = np.concatenate([before, values[~odd]])[-_LEVEL:]
        return sorted(found, key=lambda row: row.sample)
