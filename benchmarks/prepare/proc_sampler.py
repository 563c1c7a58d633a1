"""Memory and processor time of a process and all its children, sampled through /proc."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INTERVAL_S = 0.1
FIELDS = ("Rss", "Pss", "Pss_Anon")


@dataclass
class Usage:
    """The most bytes that were seen at one moment, of all processes together; what lies between two samples is missed.

    pss: pages that several processes share are divided among them; rss: such pages count for each of them, so it is an
    upper bound; anonymous: the part of pss that is no page of a file, so that the system cannot take it back.
    cpu_s: processor time of each process when it was last seen.
    """

    pss: int = 0
    rss: int = 0
    anonymous: int = 0
    cpu_s: dict[int, float] = field(default_factory=dict)

    def sample(self, process: Any) -> None:
        """Look once. process: a psutil.Process."""
        import psutil

        total = dict.fromkeys(FIELDS, 0)
        try:
            family = [process, *process.children(recursive=True)]
        except psutil.Error:
            return
        for one in family:
            try:
                times = one.cpu_times()
                # workers may be anybody's children, so the system's own sum of processor time will not do
                self.cpu_s[one.pid] = times.user + times.system
                for line in Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines():
                    name, _, value = line.partition(":")
                    if name in total:
                        total[name] += int(value.split()[0]) * 1024
            except (psutil.Error, OSError):  # it has just ended
                continue
        self.rss = max(self.rss, total["Rss"])
        self.pss = max(self.pss, total["Pss"])
        self.anonymous = max(self.anonymous, total["Pss_Anon"])


def watch(process: Any) -> Usage:
    """Sample until a subprocess.Popen has ended."""
    import psutil

    usage = Usage()
    while process.poll() is None:
        try:
            usage.sample(psutil.Process(process.pid))
        except psutil.NoSuchProcess:
            break
        time.sleep(INTERVAL_S)
    process.wait()
    return usage
