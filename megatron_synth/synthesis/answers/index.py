"""Where each answer stands: 28 bytes per key, so that a billion fits where a dictionary would hold fifty million."""

from __future__ import annotations

import numpy as np

MERGE_AT = 65_536
"""New keys that wait in a dictionary before they are merged into the sorted arrays."""

Place = tuple[int, int]  # number of the part, byte in it


class KeyIndex:
    """Keys of 32 hexadecimal digits -> place. Keys are added and never removed."""

    def __init__(self) -> None:
        self._high = np.empty(0, np.uint64)
        self._low = np.empty(0, np.uint64)
        self._parts = np.empty(0, np.uint32)
        self._offsets = np.empty(0, np.uint64)
        self._new: dict[str, Place] = {}

    def __len__(self) -> int:
        return int(self._high.size) + len(self._new)

    def __contains__(self, key: str) -> bool:
        return self.find(key) is not None

    def find(self, key: str) -> Place | None:
        """Where the answer of a key stands; None if there is none."""
        found = self._new.get(key)
        if found is not None:
            return found
        high, low = _halves(key)
        at = int(np.searchsorted(self._high, np.uint64(high)))
        while at < self._high.size and int(self._high[at]) == high:
            if int(self._low[at]) == low:
                return int(self._parts[at]), int(self._offsets[at])
            at += 1
        return None

    def add(self, key: str, place: Place) -> None:
        """Remember a key that is not known yet."""
        assert key not in self, key
        self._new[key] = place
        if len(self._new) >= MERGE_AT:
            self._merge()

    def _merge(self) -> None:
        halves = np.array([_halves(key) for key in self._new], np.uint64).reshape(-1, 2)
        places = list(self._new.values())
        high = np.concatenate([self._high, halves[:, 0]])
        low = np.concatenate([self._low, halves[:, 1]])
        order = np.argsort(high, kind="stable")
        self._high, self._low = high[order], low[order]
        self._parts = np.concatenate([self._parts, np.array([part for part, _ in places], np.uint32)])[order]
        self._offsets = np.concatenate([self._offsets, np.array([offset for _, offset in places], np.uint64)])[order]
        self._new = {}


def _halves(key: str) -> tuple[int, int]:
    return int(key[:16], 16), int(key[16:], 16)
