"""Stands in for `vllm serve`: the stub on the port and with the key that it is given; it dies once where it is told to."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from benchmarks.synthesis.stub import RunningStub


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
    with RunningStub(int(options["--port"]), model=options["--served-model-name"], key=key) as stub:
        while starts >= int(os.environ.get("FAKE_DEATHS", "0")) or stub.seen.requests < 20:
            stub.behavior.status = 429 if stub.seen.requests > 15 and hold.is_file() else None  # it works no more until then
            time.sleep(0.005)
        os._exit(3)


if __name__ == "__main__":
    main(sys.argv[1:])
