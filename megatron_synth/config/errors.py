"""The errors that a user causes and can fix: they end the program with exit code 2 and one clear message."""

from __future__ import annotations

from dataclasses import dataclass

_MOST, _LONGEST = 50, 1000
"""Problems that a message lists, and characters of each."""

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_RANK_LOST = 70  # EX_SOFTWARE: a rank hangs or is gone, start me again to resume
EXIT_UNREAD = 141  # 128 + SIGPIPE, as shells do: nobody reads the output any more
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request, start me again to resume


class UserError(Exception):
    """Wrong configuration or input. The message names the file, key or rank, what was expected and what to do."""


class RankError(UserError):
    """A user's error that perhaps only this rank has met, such as a file missing on one node: this rank prints it.

    Other errors are met by all ranks alike, and printed by rank 0 alone.
    """


class PeerError(UserError):
    """Another rank has ended with an error of its user's, which it prints: this rank ends with it, too, and prints nothing."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a configuration.

    path: dotted key, such as ``parallel.tensor_model_parallel_size``; empty when no single key is at fault.
    message: what was expected, what was found and what to do.
    """

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(UserError):
    """All problems of one configuration at once."""

    def __init__(self, source: str, problems: list[Problem]):
        assert problems
        self.source, self.problems = source, problems
        head = f"{source}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"
        lines = [f"  {text if len(text) <= _LONGEST else text[:_LONGEST] + ' ...'}" for text in map(str, problems[:_MOST])]
        if len(problems) > _MOST:
            lines.append(f"  and {len(problems) - _MOST} more")
        super().__init__("\n".join([head, *lines]))
