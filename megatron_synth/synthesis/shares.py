"""Shares of a synthesis: several processes, such as the tasks of a SLURM array, answer the requests of one output.

Which share a request is in follows from what it asks, and not from who runs when: equal requests are in one share, so that none
is asked twice. A share has a folder of answers and a lock of its own; whoever runs the whole has those of all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_synth.config.errors import UserError

FOLDERS = "share-*"
MAX_SHARES = 100_000
_DIGITS = 8  # hexadecimal ones of a parent's id, which is a digest


@dataclass(frozen=True)
class Share:
    """Share `number`, from 0, of `of`."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """From `NUMBER/OF`.

        Raises:
            UserError: it is none.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if found is None or not int(found[1]) < int(found[2]) <= MAX_SHARES:
            raise UserError(f"--share: expected NUMBER/OF such as 0/4, the first of four, found {text!r:.40}")
        return cls(int(found[1]), int(found[2]))

    @property
    def folder(self) -> str:
        """The name of its folder of answers."""
        return f"share-{self.number:05d}-of-{self.of:05d}"

    def has_parent(self, parent: str) -> bool:
        """Whether requests about a parent, the first where there are several, are in this share. parent: its id."""
        return int(parent[:_DIGITS], 16) % self.of == self.number

    def has_batch(self, number: int) -> bool:
        """Whether a batch is, of requests that must be given together."""
        return number % self.of == self.number
