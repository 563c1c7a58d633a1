"""`python -m tests.faults.planted`: what faults within training cost, with `train.skip` and without it.

One fault in each run: a step on noise, a NaN on one rank of two, a shard of which 2 KiB are noise, a step whose learning rate
is 20 times too high. The table holds each run's last validation loss against that of a run without a fault. Where too many
skipped steps in a row end a run, the command that its message names is followed, in a directory of its own.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.bench import tables
from megatron_synth.core.log import say
from tests.dist.pool import RankPool
from tests.support import read_ledger, read_metrics, tokenizer, write_source

_JOB = "tests.dist.faults.skip_jobs.train_with_fault"
_SKIP = "train.skip={sigmas: 8, window: 64, least: 16}"
_FAULTS = {
    "a batch of noise": ("noise", 1),
    "a NaN on one rank of two": ("nan", 2),
    "2 KiB of noise in a shard": ("none", 1),
    "a learning rate 20 times too high": ("rate", 1),
}
"""What the table calls it: the fault of the job, and ranks."""
_DAMAGED = "2 KiB of noise in a shard"
_BEYOND = "an id beyond the vocabulary in a shard"


def write(folder: Path, steps: int) -> Path:
    """A source that is read less than once, a validation domain, and the configuration."""
    tokenizer().save(folder / "tokenizer.json")
    write_source(folder / "web", 0, steps * 8 * 32 + 4096, shards=4)
    write_source(folder / "val", 1, 32 * 400 + 1)
    config = folder / "base.yaml"
    config.write_text(
        f"""model: {{num_layers: 4, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, num_query_groups: 2}}
data:
  sources: {{web: {{path: {folder / "web"}, ratio: 1}}}}
  validation: {{val: {{path: {folder / "val"}}}}}
train: {{steps: {steps}, global_batch_size: 8, micro_batch_size: 4, sequence_length: 32, max_consecutive_skips: 4}}
optim: {{lr: 3e-3, warmup_steps: 10, schedule: wsd}}
precision: {{dtype: fp32}}
checkpoint: {{interval: 20, keep_last: 99}}
log: {{interval: 10, wandb: {{mode: disabled}}}}
"""
    )
    return config


def damage(source: Path) -> None:
    """Put noise in the place of 1,024 tokens in the middle of a shard."""
    file = sorted(source.glob("*.bin"))[1]
    content = bytearray(file.read_bytes())
    place = len(content) // 4 * 2
    content[place : place + 2048] = np.random.default_rng(7).integers(0, 256, 1024, dtype=np.uint16).tobytes()
    file.write_bytes(content)


def put_beyond(source: Path) -> None:
    """Put an id that is no token into the middle of a shard."""
    file = sorted(source.glob("*.bin"))[1]
    tokens = np.fromfile(file, np.uint16)
    tokens[len(tokens) // 2] = 65535
    tokens.tofile(file)


class Twin:
    """Runs on this CPU."""

    def __init__(self, folder: Path, steps: int, at: int):
        self._folder, self._at = folder, at
        self._config = write(folder, steps)
        self._ranks = RankPool()
        self._sources = {_DAMAGED: folder / "damaged" / "web", _BEYOND: folder / "beyond" / "web"}
        for source in self._sources.values():
            shutil.copytree(folder / "web", source)
            shutil.copy(folder / "tokenizer.json", source.parent)
        damage(self._sources[_DAMAGED])
        put_beyond(self._sources[_BEYOND])

    def run(self, name: str, ranks: int, fault: str, *settings: str) -> tuple[Path, int, str]:
        """Train; the run directory, the exit code, and what rank 0 said on stderr."""
        run = self._folder / name
        for what, source in self._sources.items():
            if what.replace(" ", "-") in name:
                settings = (f"data.sources.web.path={source}", *settings)
        arguments = ["train", str(self._config), *settings, "--run-dir", str(run)]
        results = self._ranks.run(ranks, _JOB, arguments, fault, self._at, timeout=1200.0)
        return run, int(results[0].value), results[0].stderr

    def row(self, what: str, expected: float, skip: bool) -> list[str]:
        """The row of a fault."""
        fault, ranks = _FAULTS[what]
        name = what.replace(" ", "-") + ("-skip" if skip else "")
        run, code, said = self.run(name, ranks, fault, *([_SKIP] if skip else []))
        path, skipped = "", self._skipped(run)
        if code == 1 and (found := re.search(r"checkpoint\.branch_from=(\S+) data\.skip='(\S+ \S+)'", said)):
            branch = (f"checkpoint.branch_from={found[1]}", f"data.skip={found[2]}")
            run, code, said = self.run(f"{name}-branch", ranks, "none", _SKIP, *branch)
            path = f", then {branch[0].partition('@')[2]} without samples {found[2]}".replace("then ", "branched from step ")
        assert code == 0, said
        loss = read_metrics(run)[-1]["eval/loss"]
        first = self._named(run if not path else self._folder / name)
        cells = [
            what,
            "yes" if skip else "no",
            f"{skipped}{path}",
            f"{loss:.5f}",
            f"{100 * (loss / expected - 1):+.2f} %",
            first,
        ]
        say(" | ".join(cells))
        return cells

    def refused(self, what: str, verify: str) -> list[str]:
        """The row of a damaged shard that ends the run with a message, before or as the damage is read."""
        run, code, said = self.run(f"{what.replace(' ', '-')}-{verify}", 1, "none", f"data.verify={verify}")
        assert code == 2 and "shard-00001" in said, said
        done = len(read_metrics(run)) if (run / "metrics.jsonl").is_file() else 0
        found = re.search(r"(shard-\d+\.bin, block \d+) .*?: ([a-z]*)", said)
        named = f"{found[1]}: {found[2]}" if found else ""
        if not found:
            row = re.search(r"(byte \d+).*read for (sample \d+), (\S+), (documents? \d+(?: to \d+)?)", said)
            assert row is not None, said
            named = f"{row[2]}, {Path(row[3]).name}, {row[1]}, {row[4]}"
        return [what, f"data.verify: {verify}", f"ended after step {done}, exit code 2", "", "", named]

    @staticmethod
    def _skipped(run: Path) -> int:
        records = read_metrics(run)
        return int(records[-1]["optim/skipped"]) if records else 0

    def _named(self, run: Path) -> str:
        """The first row of largest loss that events.log names, and where it is read from."""
        named = r"(?:largest losses|above their median): (sample \d+) \S+ \(web: (\S+), (documents? \d+(?: to \d+)?)"
        found = re.search(named, (run / "events.log").read_text())
        return "" if found is None else f"{found[1]}, {Path(found[2]).name}, {found[3]}"


def main(argv: list[str]) -> int:
    """Make the table. Returns 0 if every run with `train.skip` ends within `--within` of the one without a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.planted", description=__doc__)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--at", type=int, default=275, help="the step of the fault")
    parser.add_argument("--only", choices=list(_FAULTS), action="append", help="leave the other faults out")
    parser.add_argument("--within", type=float, default=0.005, help="relative difference of the last loss that is allowed")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        twin = Twin(Path(folder), options.steps, options.at)
        plain, code, said = twin.run("plain", 1, "none")
        assert code == 0, said
        expected = read_metrics(plain)[-1]["eval/loss"]
        assert read_ledger(plain)["samples"] == 8 * options.steps
        say(f"without a fault: {expected:.5f}")
        rows: list[list[str]] = [["fault", "train.skip", "steps skipped", "last loss", "off by", "first row named"]]
        rows.append(["none", "no", "0", f"{expected:.5f}", "", ""])
        worst = 0.0
        for what in options.only or _FAULTS:
            for skip in (False, True):
                rows.append(twin.row(what, expected, skip))
                if skip:
                    worst = max(worst, abs(float(rows[-1][3]) / expected - 1))
        rows.append(twin.refused(_DAMAGED, "blocks"))
        rows.append(twin.refused(_BEYOND, "sizes"))
    head: dict[str, Any] = tables.header("", [])
    head["command"] = " ".join(["python -m tests.faults.planted", *argv])
    say("\n" + "\n".join([*tables.header_lines(head), "", *tables.markdown_table(rows)]))
    return 0 if worst <= options.within else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
