"""Stands in for `vllm serve`: the stub on the port and with the key that it is given; it dies once where it is told to."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from benchmarks.synthesis.stub import RunningStub

LAST = 20
HELD_FROM = 15


def main(argv: list[str]) -> None:
    assert argv[0] == "serve", argv
    options = dict(zip(argv[2::2], argv[3::2], strict=True))
    assert options["--host"] == "127.0.0.1"
    assert options["--tensor-parallel-size"] == "1"
    key = os.environ["VLLM_API_KEY"]
    assert key not in argv
    if os.environ.get("FAKE_BROKEN"):
        sys.exit("out of memory, as they say")
    mark = Path(os.environ["FAKE_MARK"] + os.environ.get("SLURMD_NODENAME", ""))
    starts = int(mark.read_text()) if mark.exists() else 0
    mark.write_text(str(starts + 1))
    hold = Path(os.environ.get("FAKE_HOLD", ""))
    dies = starts < int(os.environ.get("FAKE_DEATHS", "0"))

    def gate(number: int) -> int | None:
        """It answers no more once it is to die, or is held: a client that is faster than the loop below gets no further."""
        if dies and number > LAST:
            return 0
        return 429 if number > HELD_FROM and hold.is_file() else None

    with RunningStub(int(options["--port"]), model=options["--served-model-name"], key=key) as stub:
        stub.behavior.gate = gate
        while not dies or stub.seen.requests < LAST:
            time.sleep(0.005)
        os._exit(3)


if __name__ == "__main__":
    main(sys.argv[1:])
