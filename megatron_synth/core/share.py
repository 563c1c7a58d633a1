"""A share of some work: several processes, such as the tasks of a SLURM array, each do theirs without a word to the others."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from megatron_synth.config.errors import UserError

MAX_SHARES = 100_000


@dataclass(frozen=True)
class Share:
    """Share `number`, from 0, of `of`."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
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
        """The name of its folder."""
        return f"share-{self.number:05d}-of-{self.of:05d}"

    @classmethod
    def of_folder(cls, name: str) -> Self | None:
        """The share whose folder has this name; None: it is no share's."""
        found = re.fullmatch(r"share-(\d{5,6})-of-(\d{5,6})", name)
        share = None if found is None else cls(int(found[1]), int(found[2]))
        return share if share is not None and share.folder == name and share.number < share.of <= MAX_SHARES else None

    def has_batch(self, number: int) -> bool:
        """Whether a piece of the work, by its number, is in this share."""
        return number % self.of == self.number
