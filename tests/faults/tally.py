"""What a campaign has tried so far, in a file: it is interrupted and goes on, and its counts add up over several starts.

A campaign is cut into parts, each with a seed of its own that follows from the campaign's and the part's number. The file keeps
a line of JSON for every part that came to its end; a part that was interrupted is done again, from its beginning.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Tally:
    """The parts of one campaign that are done.

    Args:
        file: where they are kept; None: only in memory.
        seed: of the campaign; a file of another seed is refused.
    """

    def __init__(self, file: Path | None, seed: int):
        self._file, self._seed = file, seed
        self._parts: dict[int, dict[str, Any]] = {}
        if file is not None and file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                part = json.loads(line)
                assert part["seed"] == seed, f"{file}: has seed {part['seed']}"
                self._parts[part["part"]] = part

    def missing(self, count: int, of_part: int) -> Iterator[int]:
        """Numbers of the parts that are still to do, for `count` cases with `of_part` in each."""
        for part in range(-(-count // of_part)):
            if part not in self._parts:
                yield part

    def seed_of(self, part: int) -> int:
        """The seed of a part."""
        return self._seed * 1_000_003 + part

    def add(self, part: int, outcomes: Mapping[str, int], failures: list[str] | None = None) -> None:
        """Keep what a part has found."""
        found = {
            "part": part,
            "seed": self._seed,
            "outcomes": dict(outcomes),
            "failures": failures or [],
            "commit": _commit(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._parts[part] = found
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")

    def run(self, count: int, of_part: int, work: Callable[[int, int], Mapping[str, int]]) -> None:
        """Do every missing part: `work(seed, of_part)` gives its outcomes."""
        for part in self.missing(count, of_part):
            self.add(part, work(self.seed_of(part), of_part))

    @property
    def outcomes(self) -> Counter[str]:
        """All parts together."""
        return sum((Counter(part["outcomes"]) for part in self._parts.values()), Counter[str]())

    @property
    def failures(self) -> list[str]:
        """Of all parts."""
        return [failure for part in self._parts.values() for failure in part["failures"]]

    def text(self) -> str:
        """Outcomes, seed, commits and days in one paragraph."""
        outcomes = ", ".join(f"{number:,} {name}" for name, number in sorted(self.outcomes.items()))
        commits = ", ".join(sorted({part["commit"] for part in self._parts.values()}))
        days = sorted({part["time"][:10] for part in self._parts.values()})
        return f"seed {self._seed}, commit {commits}, {' to '.join(dict.fromkeys((days[0], days[-1])))}: {outcomes}"


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
