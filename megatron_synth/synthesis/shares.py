"""Shares of a synthesis: several processes, such as the tasks of a SLURM array, answer the requests of one output.

Which share a request is in follows from what it asks, and not from who runs when: equal requests are in one share, so that none
is asked twice. A share has a folder of answers and a lock of its own; whoever runs the whole has those of all.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_synth.core import share

FOLDERS = "share-*"
_DIGITS = 8  # hexadecimal ones of a parent's id, which is a digest


@dataclass(frozen=True)
class Share(share.Share):
    """Share `number`, from 0, of `of`. A batch is of requests that must be given together."""

    def has_parent(self, parent: str) -> bool:
        """Whether requests about a parent, the first where there are several, are in this share. parent: its id."""
        return int(parent[:_DIGITS], 16) % self.of == self.number
