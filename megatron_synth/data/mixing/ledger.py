"""What was really delivered, per source, held against the plan.

Each rank counts the samples, windows of one source, that it trained on; the trainer sums the counts over the data-parallel
ranks and merges the sum. The total must then equal the plan's count of the same prefix, source by source, to the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import with_config
from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from megatron_synth.config.errors import UserError
from megatron_synth.core.records import OPEN, Count
from megatron_synth.data.mixing.mixture import MixturePlan

Int64 = npt.NDArray[np.int64]


@with_config(OPEN)
class EarlierLabels(TypedDict):
    """Labels that were in the loss of the first `samples` samples, where the run's present settings do not tell them."""

    samples: Count
    sources: dict[str, Count]


class LedgerMismatch(AssertionError):
    """Samples delivered are not the samples planned."""


class Ledger:
    """Samples delivered by each source, over all ranks since the run began."""

    def __init__(self, names: Sequence[str], ratios: Sequence[Fraction], num_windows: Sequence[int], window_length: int):
        """One entry per source, in the order of the plan's source ids. num_windows: of an epoch, each of `window_length`."""
        assert len(names) == len(ratios) == len(num_windows)
        self.names = tuple(names)
        self.ratios = tuple(ratios)
        self.num_windows = tuple(num_windows)
        self.window_length = window_length
        self._overall: Callable[[int], tuple[Fraction, ...]] | None = None
        self._total = np.zeros(len(self.names), dtype=np.int64)
        self._unlearned = np.zeros(len(self.names), dtype=np.int64)
        """Of `_total`, the samples of steps that were skipped."""
        self._labels: Int64 | None = None
        """Labels of each source that were learned, where some tokens are read alone; None: they are not counted."""
        self._earlier: EarlierLabels | None = None
        """Of these, what was counted under other settings."""
        self._trunk: tuple[str, int, Int64] | None = None
        """Of a branch: id and step of the trunk, and what it had delivered by then."""

    @classmethod
    def of(cls, plan: MixturePlan, window_length: int) -> Ledger:
        """The empty ledger of a plan."""
        ledger = cls(plan.names, plan.ratios, plan.epoch_windows, window_length)
        if plan.phased:
            ledger._overall = plan.overall_ratios
        return ledger

    @classmethod
    def planned(cls, plan: MixturePlan, window_length: int, samples: int) -> Ledger:
        """The ledger of a run that has delivered the plan's first `samples` samples."""
        ledger = cls.of(plan, window_length)
        ledger.merge(plan.counts(samples))
        return ledger

    def count_labels(self) -> None:
        """Count the labels that are learned, too: some tokens of the sources are read and not learned."""
        self._labels = np.zeros(len(self.names), dtype=np.int64)

    def close_labels(self) -> None:
        """Keep the labels counted so far apart, where they are counted: those that follow are counted under other settings."""
        if self._labels is not None:
            sources = {name: count for name, count in self.labels.items() if count}
            self._earlier = {"samples": int(self._total.sum()), "sources": sources}

    def begin_branch(self, run_id: str, step: int, counts: Mapping[str, int]) -> None:
        """Count as a branch of a run that had delivered `counts` samples by source at `step`; they are kept apart."""
        self._trunk = run_id, step, self._by_source(counts)

    @property
    def samples(self) -> Int64:
        """int64 [K]: merged samples of each source (a copy)."""
        return self._total.copy()

    def merge(self, global_delta: npt.ArrayLike, *, learned: bool = True, labels: npt.ArrayLike | None = None) -> None:
        """Add what all data-parallel ranks together delivered. global_delta: int64 [K]; learned: the step was not skipped.

        labels: int64 [K], those in the loss; they are counted after `count_labels`.
        """
        delta = np.asarray(global_delta, dtype=np.int64)
        assert delta.shape == self._total.shape and np.all(delta >= 0)
        self._total += delta
        if not learned:
            self._unlearned += delta
        elif self._labels is not None:
            assert labels is not None
            self._labels += np.asarray(labels, dtype=np.int64)

    def verify(self, plan: MixturePlan, samples_consumed: int) -> None:
        """Raise LedgerMismatch unless the merged counts are those of the plan's first `samples_consumed` samples."""
        assert plan.names == self.names
        expected = plan.counts(samples_consumed)
        if np.array_equal(expected, self._total):
            return
        wrong = [
            f"{name}: expected {due}, found {found}"
            for name, due, found in zip(self.names, expected.tolist(), self._total.tolist(), strict=True)
            if due != found
        ]
        raise LedgerMismatch(
            f"samples delivered differ from the plan after {samples_consumed} samples "
            f"({int(self._total.sum())} counted): {'; '.join(wrong)}"
        )

    def to_json(self) -> dict[str, Any]:
        """Content of ledger.json.

        A sample has `sequence_length` tokens: those of a window. Per source: tokens = samples x sequence_length,
        epochs = samples / windows of an epoch, share = fraction of all samples. ratio: of a mixture in phases, the exact
        share that the phases so far give it, as a fraction. unlearned: of the samples, those of steps that were skipped, where
        there are any. learned: labels that were in the loss, where some tokens are read and not learned; tokens, and with them
        the ratios, are those read; `earlier` in it is what was counted before a start with other settings. Of a branch all this
        counts the trunk's part too; `trunk` and `branch` tell the parts apart.
        """
        total = int(self._total.sum())
        ratios = self.ratios if self._overall is None else self._overall(total)
        sources = {
            name: {
                "ratio": str(ratio),
                "samples": samples,
                "tokens": samples * self.window_length,
                "epochs": samples / windows,
                "share": samples / total if total else 0.0,
            }
            for name, ratio, windows, samples in zip(self.names, ratios, self.num_windows, self._total.tolist(), strict=True)
        }
        content: dict[str, Any] = {
            "samples": total,
            "tokens": total * self.window_length,
            "sequence_length": self.window_length,
            "sources": sources,
        }
        if self._labels is not None:
            by_source = dict(zip(self.names, self._labels.tolist(), strict=True))
            content["learned"] = {"tokens": sum(by_source.values()), "sources": by_source}
            if self._earlier is not None:
                content["learned"]["earlier"] = self._earlier
        if self._unlearned.any():
            content["unlearned"] = self._part(self._unlearned)
        if self._trunk is not None:
            run_id, step, before = self._trunk
            content["trunk"] = {"run": run_id, "step": step, **self._part(before)}
            content["branch"] = self._part(self._total - before)
        return content

    def _part(self, counts: Int64) -> dict[str, Any]:
        """A part of what was delivered, without the sources that gave nothing to it."""
        total, length = int(counts.sum()), self.window_length
        named = zip(self.names, counts.tolist(), strict=True)
        sources = {name: {"samples": count, "tokens": count * length} for name, count in named if count}
        return {"samples": total, "tokens": total * length, "sources": sources}

    def state_dict(self) -> dict[str, int]:
        """Samples by source name."""
        return dict(zip(self.names, self._total.tolist(), strict=True))

    @property
    def unlearned(self) -> dict[str, int]:
        """Of the samples, those of steps that were skipped, by name of the sources that gave some."""
        return {name: count for name, count in zip(self.names, self._unlearned.tolist(), strict=True) if count}

    @property
    def labels(self) -> dict[str, int]:
        """Labels that were learned, by source; empty where they are not counted."""
        return {} if self._labels is None else dict(zip(self.names, self._labels.tolist(), strict=True))

    @property
    def labels_earlier(self) -> EarlierLabels | None:
        """Of the labels, what was counted under other settings."""
        return self._earlier

    def load_state_dict(
        self,
        state: Mapping[str, int],
        unlearned: Mapping[str, int] | None = None,
        labels: Mapping[str, int] | None = None,
        labels_earlier: EarlierLabels | None = None,
    ) -> None:
        """Go on from a saved state; sources that it does not know begin at 0. UserError if it knows others."""
        self._total = self._by_source(state)
        if self._labels is not None:
            self._labels = self._by_source(labels or {})
            self._earlier = labels_earlier
        self._unlearned = self._by_source(unlearned or {})

    def _by_source(self, counts: Mapping[str, int]) -> Int64:
        """int64 [K] from samples by name. UserError for a source that delivered some and is not known."""
        unknown = {name for name, count in counts.items() if count} - set(self.names)
        if unknown:
            raise UserError(
                f"the checkpoint's ledger counts the sources {', '.join(sorted(counts))}, the run has "
                f"{', '.join(sorted(self.names))}: resume with the data.sources that the checkpoint was "
                "made with, or start a new run from its weights "
                "(checkpoint.init_from)"
            )
        return np.array([counts.get(name, 0) for name in self.names], dtype=np.int64)
