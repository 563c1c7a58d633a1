"""Time and memory of a command, without those of whoever starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

# a process counts the most that its parent had resident when it was started: a small one between them has hardly any
_BETWEEN = """
import json, os, sys, time
began = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(child, 0)
seconds = time.perf_counter() - began
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
"""


@dataclass(frozen=True)
class Usage:
    """seconds, and cpu_s of the processor; peak: most bytes resident."""

    seconds: float
    cpu_s: float
    peak: int


def usage_of(command: Sequence[str]) -> Usage:
    """Run a command to its end; what it prints is thrown away unless it fails."""
    between = [sys.executable, "-S", "-c", _BETWEEN, *command]
    done = subprocess.run(between, capture_output=True, text=True, check=True)
    code, seconds, cpu_s, peak = json.loads(done.stdout)
    if code:
        raise RuntimeError(f"{' '.join(command)}: exit code {code}\n{done.stderr[-2000:]}")
    return Usage(seconds, cpu_s, peak * 1024)
