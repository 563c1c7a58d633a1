"""Where each answer stands: 28 bytes per key, so that a billion fits where a dictionary would hold fifty million."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NEW_KEYS = 16_384
"""Keys that wait in a dictionary before they become a sorted run of arrays."""

Place = tuple[int, int]  # number of the part, byte in it


@dataclass(frozen=True)
class _Run:
    """Keys in order: halves uint64 [N], and where they stand: parts uint32 [N], offsets uint64 [N]; of a set both are empty."""

    high: np.ndarray
    low: np.ndarray
    parts: np.ndarray
    offsets: np.ndarray

    def find(self, high: int, low: int) -> int | None:
        at = int(self.high.searchsorted(np.uint64(high)))
        while at < self.high.size and int(self.high[at]) == high:
            if int(self.low[at]) == low:
                return at
            at += 1
        return None


class KeyIndex:
    """Keys of 32 hexadecimal digits -> place. Keys are added and never removed.

    Sorted runs are merged when they are of about one size, so that there are few, and each key is moved few times.
    """

    _with_places = True

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._new: dict[str, Place] = {}

    def __len__(self) -> int:
        return sum(run.high.size for run in self._runs) + len(self._new)

    def __contains__(self, key: str) -> bool:
        return self.find(key) is not None

    def find(self, key: str) -> Place | None:
        """Where the answer of a key stands; None if there is none."""
        found = self._new.get(key)
        if found is not None or not self._runs:
            return found
        high, low = _halves(key)
        for run in self._runs:
            at = run.find(high, low)
            if at is not None:
                return (int(run.parts[at]), int(run.offsets[at])) if self._with_places else (0, 0)
        return None

    def add(self, key: str, place: Place) -> None:
        """Remember a key that is not known yet: the caller has looked."""
        self._new[key] = place
        if len(self._new) >= NEW_KEYS:
            self._to_arrays()

    def _to_arrays(self) -> None:
        halves = np.array([_halves(key) for key in self._new], np.uint64)
        places = list(self._new.values()) if self._with_places else []
        parts = np.array([part for part, _ in places], np.uint32)
        offsets = np.array([offset for _, offset in places], np.uint64)
        self._new = {}
        runs = [*self._runs, _sorted(_Run(halves[:, 0], halves[:, 1], parts, offsets))]
        while len(runs) > 1 and runs[-2].high.size <= 2 * runs[-1].high.size:
            last, before = runs.pop(), runs.pop()
            names = ("high", "low", "parts", "offsets")
            runs.append(_sorted(_Run(*(np.concatenate([getattr(before, name), getattr(last, name)]) for name in names))))
        self._runs = runs


class KeySet(KeyIndex):
    """Keys without places, in 16 bytes each."""

    _with_places = False

    def is_new(self, key: str) -> bool:
        """Whether a key was not there before; now it is."""
        if key in self:
            return False
        self.add(key, (0, 0))
        return True


def _sorted(run: _Run) -> _Run:
    order = np.argsort(run.high, kind="stable")
    places = (run.parts[order], run.offsets[order]) if run.parts.size else (run.parts, run.offsets)
    return _Run(run.high[order], run.low[order], *places)


def _halves(key: str) -> tuple[int, int]:
    return int(key[:16], 16), int(key[16:], 16)
