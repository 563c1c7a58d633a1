"""`python -m tests.faults.synthesis --kills 50`: client and server are killed at random moments, and nothing is lost.

A synthesis is run by the command line against a server without a model, both processes of their own. Again and again one of
them, or both, get SIGKILL at a moment drawn at random, and are started again. In the end every request was answered once, the
account adds up, and the corpus equals that of a run that nobody touched, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_synth.config.load import to_yaml
from megatron_synth.data.preparing.readers.synthesized import read_record
from megatron_synth.synthesis.answers.parts import keys_of
from megatron_synth.synthesis.setup import ANSWERS
from megatron_synth.synthesis.synthesis_file import SynthesisConfig

ROOT = Path(__file__).resolve().parents[2]
WORDS = "river mill road hill bridge stone water village church market farmer harvest winter summer wheel trade".split()
VICTIMS = ("client", "server", "both")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


class Server:
    """The stub as a process, on a port that stays the same."""

    def __init__(self, rate: float):
        self._rate, self._port = rate, 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "benchmarks.synthesis.stub", "--rate", str(self._rate), "--port", str(self._port)]
        command += ["--fault", "500=0.05", "--fault", "drop=0.05", "--fault", "429=0.05"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=_environment())
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        assert self.url, "the server did not start"
        self._port = int(self.url.rsplit(":", 1)[1].removesuffix("/v1"))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def settings(folder: Path, output: str, url: str, documents: int) -> Path:
    """A synthesis file about documents that are made up."""
    generator = random.Random(3)
    parents = folder / "parents.jsonl"
    if not parents.exists():
        texts = [" ".join(generator.choices(WORDS, k=60)) + f". Number {number}." for number in range(documents)]
        parents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    off = ["copy_of_parent", "repetition", "little_of_parent", "wrong_language"]
    engine: dict[str, Any] = {
        "name": "openai",
        "servers": url,
        "backoff_s": 0.02,
        "attempts": 100,
        "patience_s": 60,
        "concurrency": 8,
    }
    config = SynthesisConfig.model_validate(
        {
            "output": str(folder / output),
            "kind": "hq-rephrase",
            "parents": {"web": {"input": str(parents)}},
            "generator": {"model": "stub", "api": "completions"},
            "engine": engine,
            "filters": {"off": off},
        }
    )
    file = folder / f"{output}.yaml"
    file.write_text(to_yaml(config))
    return file


def _start(file: Path, log: Path) -> subprocess.Popen[bytes]:
    with open(log, "ab") as output:
        command = [sys.executable, "-m", "megatron_synth", "synthesize", "run", str(file)]
        return subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=output, stderr=output)


def _answers(output: Path) -> int:
    return sum(1 for _ in keys_of(output / ANSWERS))


def campaign(folder: Path, kills: int, seed: int = 1, per_kill: int = 12) -> dict[str, Any]:
    """Kill `kills` times; what happened.

    per_kill: requests that there are for each kill, so that the run outlasts them.
    """
    draw = random.Random(seed)
    documents = per_kill * kills + 20
    server = Server(rate=200)
    try:
        whole = settings(folder, "whole", server.url, documents)
        assert _start(whole, folder / "whole.log").wait(600) == 0, (folder / "whole.log").read_text()[-2000:]
        killed = settings(folder, "killed", server.url, documents)
        output, log = folder / "killed", folder / "killed.log"
        victims: Counter[str] = Counter()
        client = _start(killed, log)
        for _ in range(kills):
            victim = draw.choice(VICTIMS)
            before = _answers(output)
            # most moments while answers come, some while the client starts
            if draw.random() < 0.8:
                _wait_for(output, before + draw.randint(1, per_kill // 2), client)
            else:
                time.sleep(draw.uniform(0, 1.5))
            time.sleep(draw.uniform(0, 0.03))
            if victim in ("server", "both"):
                server.kill()
            if victim in ("client", "both") and client.poll() is None:
                client.send_signal(signal.SIGKILL)
                client.wait()
            if victim in ("server", "both"):
                server.start()
            if client.poll() is not None:
                client = _start(killed, log)
            victims[victim] += 1
        code = client.wait(600)
        # 75: the server went away; 2, with these last words: it was away when the client began
        while code == 75 or (code == 2 and log.read_text().endswith("start the server, or correct the address\n")):
            client = _start(killed, log)
            code = client.wait(600)
        assert code == 0, (code, log.read_text()[-3000:])
    finally:
        server.kill()
    return _compare(folder, victims)


def _wait_for(output: Path, answers: int, client: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and client.poll() is None:
        if _answers(output) >= answers:
            return
        time.sleep(0.01)


def _compare(folder: Path, victims: Counter[str]) -> dict[str, Any]:
    """What the killed run has made beside the one that nobody touched."""
    output, reference = folder / "killed", folder / "whole"
    keys = list(keys_of(output / ANSWERS))
    assert len(keys) == len(set(keys)), "a key is there twice"
    assert sorted(keys) == sorted(keys_of(reference / ANSWERS))
    account = read_record(output).account
    assert account.asked == account.kept + sum(account.rejected.values()) + account.refused + account.unanswered == len(keys)
    for name in ("synthesis.json", "rejected.jsonl", "corpus/part-00000.jsonl"):
        assert (output / name).read_bytes() == (reference / name).read_bytes(), name
    return {"victims": dict(victims), "asked": account.asked, "kept": account.kept}


def main(argv: list[str]) -> int:
    """Run the campaign and print what happened."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.synthesis", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        found = campaign(Path(folder), arguments.kills, arguments.seed)
        victims = ", ".join(f"{name} {count}" for name, count in sorted(found["victims"].items()))
        took = f"{time.monotonic() - start:.0f} s"
        print(f"{arguments.kills} kills ({victims}) in {took}: {found['asked']} asked once each, {found['kept']} kept;")
        print("corpus, record and rejected answers equal to those of a run that nobody touched, byte for byte")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
