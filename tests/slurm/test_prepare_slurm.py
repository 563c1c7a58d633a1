"""A preparation as an array over four nodes of a real SLURM, one of them killed in the middle: the bytes of one machine."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from megatron_synth.data.preparing.journal import JOURNAL, read_journal
from tests.slurm.conftest import call
from tests.slurm.lab import Lab
from tests.unit.data.preparing.support import tree, write_texts

LINES = 4000
TASKS = 4


def write(tmp_path: Path, output: str) -> Path:
    """A text of some megabytes in splits of half a megabyte, and what to prepare of it."""
    folder = write_texts(tmp_path / "in", lines=LINES)
    file = tmp_path / f"{output}.yaml"
    file.write_text(
        f"output: {tmp_path / output}\n"
        "tokenizer: {train: {vocab_size: 400, max_bytes: 100000}}\n"
        f'sources: {{web: {{kind: natural, input: "{folder}/*.jsonl", holdout: 1/20}}}}\n'
        "shuffle: {seed: 3}\n"
    )
    return file


def stop(share: Path, which: str) -> None:
    """Halt the process that does a share."""
    pid = json.loads((share / ".lock").read_text())["pid"]
    assert which in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    os.kill(pid, signal.SIGSTOP)


def test_shares_on_four_nodes_of_which_one_is_lost(four: Lab, tmp_path: Path) -> None:
    assert call(four, "prepare", str(write(tmp_path, "one")), "--workers", "1").code == 0
    file, output = write(tmp_path, "array"), tmp_path / "array"
    options = ["--slurm", "--tasks", str(TASKS), "--workers", "1"]
    dry = call(four, "prepare", str(file), *options, "--dry-run")
    assert (
        dry.code == 0
        and "web: 4 files by byte ranges" in dry.out
        and "--share 3/4" in dry.out
        and "nothing was submitted" in dry.out
    ), dry.err
    assert not output.with_name("array.slurm").exists()
    told = call(four, "prepare", str(file), *options)
    assert told.code == 0, told.err
    job = next(line.split()[1] for line in told.out.splitlines() if line.startswith("job "))
    again = call(four, "prepare", str(file), *options)
    assert again.code == 2 and "of this output is" in again.err
    share = tmp_path / ".array.shares" / "share-00001-of-00004"
    four.wait("a split of the second share", lambda: len(read_journal(share / JOURNAL)) > 2)
    stop(share, "1/4")  # in the middle, until its node is gone
    lost = four.run("squeue", "-h", "-j", f"{job}_1", "-o", "%N").strip()
    shown = call(four, "prepare", str(file), "--status")
    assert "share-00001-of-00004: " in shown.out and f"job {job}_1" in shown.out, shown.out + shown.err
    four.kill_node(lost)
    four.wait("the output", (output / "prepare.json").exists)
    four.start_node(lost)
    ours, alone = tree(output), tree(tmp_path / "one")
    assert {name: data for name, data in ours.items() if name != "prepare.json"} == {
        name: data for name, data in alone.items() if name != "prepare.json"
    }
    assert not share.exists()
    attempts = output.with_name("array.slurm").glob(f"*/shares/attempts/{job}_1.jsonl")
    begins = [json.loads(line) for file in attempts for line in file.read_text().splitlines() if '"begin"' in line]
    assert len(begins) >= 2 and begins[-1]["nodes"] != lost
