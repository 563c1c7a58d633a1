"""`python -m tests.faults.preparing --kills 10`: processes of a preparation on SLURM and Ray are killed at random moments.

Text is prepared by arrays of 1, 4 and 16 tasks on four nodes of a real SLURM, and by two nodes of Ray where that is installed.
Again and again one of the processes that tokenize or assemble gets SIGKILL at a moment drawn at random. Jobs that have all
ended without an output are submitted again, as a user would; an output that is there before the kills are used up is made
again. What a journal of a share has told must never be lost, nor told by another share, and the bytes must be those of one
machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_synth.bench.tables import header, header_lines, markdown_table
from megatron_synth.core.lock import holder
from megatron_synth.data.preparing.journal import JOURNAL, read_journal
from megatron_synth.data.preparing.output import lock_file
from megatron_synth.data.preparing.shared import folder_of
from tests.slurm.lab import lab, missing
from tests.support import child_environment
from tests.unit.data.preparing.support import tree, write_texts

LINES, NODES = 3000, 4
LONGEST_PAUSE_S = 2.0
TIMEOUT_S = 600


@dataclass
class Row:
    """What happened to one kind of preparation. starts: commands that were given."""

    kind: str
    kills: int = 0
    of_last: int = 0
    starts: int = 0
    splits: int = 0
    """Told by shares, the most that were seen."""
    equal: bool = False


def write(folder: Path, output: Path) -> Path:
    """What to prepare: some megabytes in dozens of splits."""
    text = write_texts(folder / "in", lines=LINES)
    file = folder / f"{output.name}.yaml"
    file.write_text(
        f"output: {output}\ntokenizer: {{train: {{vocab_size: 400, max_bytes: 100000}}}}\n"
        f'sources: {{web: {{kind: natural, input: "{text}/*.jsonl", holdout: 1/20}}}}\n'
        "shuffle: {seed: 3}\nshard_tokens: 500000\n"
    )
    return file


def bytes_of(output: Path) -> dict[str, bytes]:
    """All but what names the output."""
    return {name: data for name, data in tree(output).items() if name != "prepare.json"}


class Journals:
    """What the shares have told so far."""

    def __init__(self, output: Path):
        self._folder = folder_of(output)
        self.told: dict[tuple[str, int], str] = {}

    def look(self) -> None:
        """Nothing that was told may be gone, or be told by another, while the folder of the shares is there."""
        now: dict[tuple[str, int], str] = {}
        for path in sorted(self._folder.glob(f"share-*/{JOURNAL}")):
            for entry in read_journal(path)[1:]:
                if entry["kind"] == "split":
                    key = (entry["source"], entry["number"])
                    assert now.setdefault(key, path.parent.name) == path.parent.name, f"split {key} was done twice"
        # the last job removes the journals when the output is there
        if all((self._folder / name / JOURNAL).exists() for name in set(self.told.values())):
            lost = {key for key, name in self.told.items() if now.get(key) != name}
            assert not lost or not self._folder.exists(), f"told and lost: {sorted(lost)}"
            self.told = now if len(now) >= len(self.told) else self.told


def of_locks(output: Path) -> Iterator[tuple[int, bool]]:
    """Processes at work on an output, and whether one is the last job."""
    for path in [*folder_of(output).glob("share-*/.lock"), lock_file(output)]:
        found = holder(path)
        if found is not None and found.info is not None and found.lives:
            yield found.info["pid"], path == lock_file(output)


def of_ray(_: Path) -> Iterator[tuple[int, bool]]:
    """Processes of this campaign's cluster that do a task."""
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] == ["ray::_work"]:
                yield process.pid, False
        except psutil.Error:
            continue


def torment(
    row: Row,
    output: Path,
    kills: int,
    chosen: random.Random,
    start: Callable[[], None],
    active: Callable[[], bool],
    victims: Callable[[Path], Iterator[tuple[int, bool]]],
) -> None:
    """Kill until the kills are used up, then let it go on to its end."""
    done, deadline = output / "prepare.json", time.monotonic() + TIMEOUT_S
    journals, pause = Journals(output), chosen.uniform(0, LONGEST_PAUSE_S)
    while row.kills < kills or not done.exists() or active():
        assert time.monotonic() < deadline, f"{row}: not done in {TIMEOUT_S} s"
        if not active():
            if done.exists():
                shutil.rmtree(output)
                journals = Journals(output)
            start()
            row.starts += 1
        journals.look()
        row.splits = max(row.splits, len(journals.told))
        now = time.monotonic()
        found = list(victims(output)) if row.kills < kills else []
        time.sleep(0.05)
        if found:  # time in which nobody is at work is none to kill in
            pause -= time.monotonic() - now
        if found and pause < 0:
            pid, last = chosen.choice(found)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            row.kills += 1
            row.of_last += last
            pause = chosen.uniform(0, LONGEST_PAUSE_S)


def on_slurm(folder: Path, tasks: int, kills: int, chosen: random.Random) -> Row:
    """An array of so many tasks."""
    row, output = Row(f"SLURM, {tasks} task{'s' * (tasks > 1)}"), folder / f"of-{tasks}"
    file = write(folder, output)
    with lab(NODES) as cluster:
        environment = child_environment(**cluster.environment, OMP_NUM_THREADS="1")

        def start() -> None:
            command = [sys.executable, "-m", "megatron_synth", "prepare", str(file), "--slurm", "--tasks", str(tasks)]
            subprocess.run([*command, "--workers", "1"], env=environment, check=True, capture_output=True)

        def active() -> bool:
            return bool(cluster.run("squeue", "-h", "-o", "%i").strip())

        torment(row, output, kills, chosen, start, active, of_locks)
    row.equal = bytes_of(output) == bytes_of(folder / "alone")
    return row


def on_ray(folder: Path, kills: int, chosen: random.Random) -> Row:
    """Two nodes of Ray with one processor each."""
    from ray.cluster_utils import Cluster

    row, output = Row("Ray, 2 nodes"), folder / "by-ray"
    file = write(folder, output)
    os.environ |= child_environment(RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")
    node = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    running: list[subprocess.Popen[bytes]] = []
    try:
        cluster.add_node(**node)

        def start() -> None:
            command = [sys.executable, "-m", "megatron_synth", "prepare", str(file), "--ray", cluster.address]
            running[:] = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]

        def active() -> bool:
            return bool(running) and running[0].poll() is None

        torment(row, output, kills, chosen, start, active, of_ray)
    finally:
        for process in running:
            process.kill()
            process.wait()
        cluster.shutdown()
    row.equal = bytes_of(output) == bytes_of(folder / "alone")
    return row


def main(argv: list[str]) -> int:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.preparing", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    reason, rows = missing(), list[Row]()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        alone = [sys.executable, "-m", "megatron_synth", "prepare", str(write(folder, folder / "alone")), "--workers", "1"]
        subprocess.run(alone, env=child_environment(), check=True, capture_output=True)
        kinds: list[Callable[[random.Random], Row]] = [
            lambda chosen, tasks=tasks: on_slurm(folder, tasks, options.kills, chosen) for tasks in (1, 4, 16)
        ]
        if importlib.util.find_spec("ray") is not None:
            kinds.append(lambda chosen: on_ray(folder, options.kills, chosen))
        for number, kind in enumerate(kinds):
            rows.append(kind(random.Random(options.seed + number)))
            print(rows[-1], flush=True)
    table = [["preparation", "kills", "of the last job", "commands", "splits told by shares", "bytes of one machine"]]
    for row in rows:
        told = str(row.splits) if row.splits else "-"
        table.append([row.kind, str(row.kills), str(row.of_last), str(row.starts), told, "yes" if row.equal else "NO"])
    head = {**header("", []), "command": f"python -m tests.faults.preparing --kills {options.kills} --seed {options.seed}"}
    print("\n".join([*header_lines(head), "", *markdown_table(table)]))
    return 0 if all(row.equal for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
