"""`python -m tests.faults.campaign --kills 200`: kill, damage and fill, and see that nothing is lost.

One run is killed with SIGKILL at moments drawn at random, a third of them in a save, until the kills are used up; then it goes
on to its end. It must have the losses, the ledger and the weights of a run that nobody touched, to the bit, and every
checkpoint that it ever resumed from must have been sound. Then come the other faults, one by one. `--table FILE` writes what
happened as Markdown.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from megatron_synth.config.errors import EXIT_RANK_LOST
from megatron_synth.train.checkpoint import files
from tests.dist.pool import RankPool, RanksFailed
from tests.support import LAYOUTS, ROOT, assert_same_losses, read_ledger, read_metrics, snapshot, write_config, write_corpus

INTERVAL = 2
LIFE = 6
"""Steps after which a rank dies at the latest, so that the run outlasts its kills."""


@dataclass
class Row:
    """A line of the table."""

    fault: str
    tried: int = 0
    survived: int = 0
    seen: str = ""


@dataclass
class Campaign:
    """Where everything happens."""

    folder: Path
    pool: RankPool
    config: Path
    seed: int
    rows: list[Row] = field(default_factory=list)

    def arguments(self, run: Path, layout: str, *settings: str) -> list[str]:
        """A training command."""
        return ["train", str(self.config), *LAYOUTS[layout][1], *settings, "--run-dir", str(run)]

    def train(
        self, run: Path, layout: str, *settings: str, job: str = "megatron_synth.cli.main.main", extra: tuple[object, ...] = ()
    ) -> str:
        """Train, which must end well; what rank 0 printed."""
        results = self.pool.run(LAYOUTS[layout][0], job, self.arguments(run, layout, *settings), *extra, timeout=1200)
        printed = "".join(result.stdout + result.stderr for result in results)
        codes = [result.value if isinstance(result.value, int) else result.value[0] for result in results]
        assert codes == [0] * len(codes), printed
        return printed

    def refused(self, run: Path, layout: str, *settings: str) -> str:
        """Train, which must be refused; the error."""
        results = self.pool.run(LAYOUTS[layout][0], "megatron_synth.cli.main.main", self.arguments(run, layout, *settings))
        assert [result.value for result in results] == [2] * len(results), results[0].stdout
        return self.plain(results[0].stderr.strip())

    def plain(self, text: str) -> str:
        """Without what differs from one campaign to the next."""
        text = re.sub(rf"{re.escape(str(self.folder))}/[\w-]+", "RUN", text)
        text = re.sub(r"\.[0-9a-f]{8}\.tmp", ".tmp", text)
        return re.sub(r"[\d.]+[kMGT]?B? bytes are free", "... bytes are free", text)

    def row(self, fault: str) -> Row:
        """A new line of the table."""
        self.rows.append(Row(fault))
        return self.rows[-1]


def _assert_equal_runs(campaign: Campaign, run: Path, reference: Path) -> None:
    assert_same_losses(read_metrics(run), read_metrics(reference), 0)
    assert read_ledger(run) == read_ledger(reference)
    last = [str(files.candidates(path)[0]) for path in (run, reference)]
    (result,) = campaign.pool.run(1, "tests.dist.jobs.differences", *last)
    count, different = result.value
    assert count > 10 and not different, different
    (audit,) = campaign.pool.run(1, "megatron_synth.cli.main.main", ["mix", "audit", str(run)])
    assert audit.value == 0 and "equal: the run consumed what was planned" in audit.stdout, audit.stdout


def kills(campaign: Campaign, layout: str, count: int) -> None:
    """Kill one run `count` times."""
    draw = random.Random(f"{campaign.seed} {layout}")
    world_size, steps = LAYOUTS[layout][0], (LIFE - 1) * count + 10
    settings = (
        f"train.steps={steps}",
        f"checkpoint.interval={INTERVAL}",
        "eval.interval=null",
        "log.interval=10",
        "train.lost_rank_timeout_s=3",
        "data.sources.web.max_epochs=.inf",
        "data.sources.qa.max_epochs=.inf",
    )
    reference, run, trace = (campaign.folder / f"{layout}-{name}" for name in ("reference", "killed", "trace"))
    results = campaign.pool.run(
        world_size, "tests.faults.jobs.train_timed", campaign.arguments(reference, layout, *settings), timeout=3000
    )
    code, step_s, save_s = results[0].value
    assert code == 0
    print(f"{layout}: a run of {steps} steps that nobody touched: {1000 * step_s:.0f} ms a step, {1000 * save_s:.0f} ms a save")
    sound = resumed_from = 0
    for number in range(count):
        moment = ("save", "step", "start")[number % 3]
        if number % 3 == 0:
            at, delay = draw.randint(1, 2), draw.uniform(0, save_s)
        elif number % 3 == 1:
            at, delay = draw.randint(1, LIFE - 1), draw.uniform(0, step_s)
        else:
            at, delay = 0, draw.uniform(0, 2.0)
        extra = (draw.randrange(world_size), moment, at, delay, LIFE, str(trace))
        try:
            campaign.pool.run(
                world_size, "tests.faults.jobs.train_until_killed", campaign.arguments(run, layout, *settings), *extra
            )
        except RanksFailed as failed:
            assert failed.exit_codes[extra[0]] == -9, failed
            rest = {code for rank, code in failed.exit_codes.items() if rank != extra[0]}
            # with no run directory yet there is nobody to watch
            assert rest <= {EXIT_RANK_LOST, 0, None}, failed
        else:
            raise AssertionError(f"kill {number} of {layout} did not happen: {moment} {at} {delay}")
        for checkpoint in files.all_of(run / "checkpoints"):
            assert files.faults(checkpoint, checksums=True) == [], checkpoint
            sound += 1
        found = files.candidates(run) if (run / "checkpoints").is_dir() else []
        step = files.step_of(found[0]) if found else 0
        assert step >= resumed_from, f"after kill {number} the run falls back from step {resumed_from} to {step}"
        resumed_from = step
        if number % 20 == 19:
            print(f"{layout}: {number + 1} kills, at step {step}", flush=True)
    printed = campaign.train(run, layout, *settings)
    assert f"resumed at step {resumed_from}" in printed or not resumed_from
    _assert_equal_runs(campaign, run, reference)
    where = Counter(trace.read_text().split())
    assert sum(where.values()) == count, where
    ranks = f"{world_size} rank{'' if world_size == 1 else 's'}"
    for name, words in (("save", "in a save"), ("step", "in or between steps"), ("start", "while starting or resuming")):
        if not where[name]:
            continue
        row = campaign.row(f"SIGKILL {words}, {ranks}")
        row.tried = row.survived = where[name]
        row.seen = f"the same command resumes; run of {steps} steps equal to an untouched one to the bit"
    print(f"{layout}: {count} kills survived ({dict(where)}), {sound} checkpoints read back and sound", flush=True)


def _flip(file: Path, draw: random.Random) -> None:
    with file.open("r+b") as opened:
        place = draw.randrange(file.stat().st_size)
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ (1 << draw.randrange(8))]))


def _truncate(file: Path, draw: random.Random) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size))


def _all_faults(checkpoint: Path) -> list[str]:
    return files.faults(checkpoint, checksums=True)


def damage(campaign: Campaign, times: int) -> None:
    """Damage files of the newest checkpoint in every way; the run must go back to the one before, and end alike."""
    draw = random.Random(campaign.seed)
    reference = campaign.folder / "damage-reference"
    campaign.train(reference, "single")
    ways: dict[str, Callable[[Path, random.Random], object]] = {
        "file truncated": _truncate,
        "one bit flipped": _flip,
        "file missing": lambda file, draw: file.unlink(),
    }
    names = sorted(path.name for path in files.candidates(reference)[0].iterdir())
    for way, harm in ways.items():
        row = campaign.row(f"checkpoint: {way}")
        for number in range(times * len(names)):
            run = campaign.folder / "damaged"
            shutil.copytree(reference, run)
            newest, before = files.candidates(run)[:2]
            harm(newest / names[number % len(names)], draw)
            row.tried += 1
            found = files.first_sound(files.candidates(run), _all_faults, None, run)
            assert found == before, f"{way} of {names[number % len(names)]} was not seen"
            if number == 0:  # the decision is the same for all; what follows it is trained once
                printed = campaign.train(run, "single")
                _assert_equal_runs(campaign, run, reference)
                (line,) = [line for line in printed.splitlines() if line.startswith("warning:")]
                row.seen = campaign.plain(line)
            row.survived += 1
            shutil.rmtree(run)
    row = campaign.row("checkpoint: all damaged")
    run = campaign.folder / "damaged"
    shutil.copytree(reference, run)
    for checkpoint in files.all_of(run / "checkpoints"):
        _truncate(checkpoint / "common.pt", draw)
    row.tried, row.survived = 1, 1
    row.seen = " ".join(line.strip() for line in campaign.refused(run, "single").splitlines())
    shutil.rmtree(run)


def disks(campaign: Campaign) -> None:
    """A disk that is full for a while, and one that cannot be written to."""
    reference = campaign.folder / "disk-reference"
    settings = ("checkpoint.interval=5",)
    campaign.train(reference, "single", *settings)
    small = campaign.folder / "small"
    small.mkdir()
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", small], capture_output=True).returncode
    how = "a tmpfs of 24 MiB" if mounted else "a limit on file sizes"
    row = campaign.row(f"disk full during a save ({how})")
    run = small / "run"
    try:
        if mounted:
            job, extra = "tests.faults.jobs.train_on_a_small_disk", (str(small / "ballast"), 2)
        else:
            job, extra = "tests.dist.jobs.train_with_a_full_disk", ([2], 0)  # type: ignore[assignment]
        printed = campaign.train(run, "single", *settings, job=job, extra=extra)
        row.tried = 1
        lines = [line for line in printed.splitlines() if line.startswith("warning:") and "could not be written" in line]
        row.seen = campaign.plain(lines[0])
        _assert_equal_runs(campaign, run, reference)
        row.survived = 1
    finally:
        if mounted:
            subprocess.run(["umount", small], check=True)
    row = campaign.row("run directory read-only")
    run = campaign.folder / "read-only"
    shutil.copytree(reference, run)
    before = snapshot(run)
    locked = not subprocess.run(["mount", "--bind", run, run], capture_output=True).returncode
    try:
        if locked:
            subprocess.run(["mount", "-o", "remount,bind,ro", run], check=True)
        else:
            assert os.geteuid(), "root without the right to mount: nothing is read-only here"
            (run / "checkpoints").chmod(0o500)
        row.tried, row.seen = 1, campaign.refused(run, "single", *settings, "train.steps=22")
    finally:
        if locked:
            subprocess.run(["umount", run], check=True)
        else:
            (run / "checkpoints").chmod(0o700)
    assert snapshot(run) == before
    row.survived = 1


def ranks_in_trouble(campaign: Campaign) -> None:
    """A rank that is stopped, dies, hangs or has a bug, in the middle of a run of two."""
    reference = campaign.folder / "trouble-reference"
    settings = ("checkpoint.interval=5", "train.hang_timeout_s=3", "train.lost_rank_timeout_s=3")
    campaign.train(reference, "dp2", *settings)
    faults = {
        "stop": "one rank stopped with SIGSTOP",
        "kill": "one rank of two killed",
        "hang": "one rank hangs in its code",
        "raise": "one rank ends with an exception",
    }
    for what, words in faults.items():
        row = campaign.row(words)
        run = campaign.folder / what
        began = time.monotonic()
        try:
            campaign.pool.run(2, "tests.dist.jobs.train_in_trouble", campaign.arguments(run, "dp2", *settings), what, 1, 8)
        except RanksFailed as failed:
            assert failed.exit_codes[0] == EXIT_RANK_LOST, failed
        row.tried, took = 1, time.monotonic() - began
        (report,) = (run / "hang").glob("report-*.txt")
        lines = [line.strip() for line in report.read_text().splitlines()]
        text = re.sub(r"pid \d+", "pid ...", f"{lines[0]}; {lines[1]}")
        text = re.sub(r"on [\w.-]+, pid", "on HOST, pid", text)
        row.seen = f"after {took:.0f} s: {campaign.plain(text)}"
        campaign.train(run, "dp2", *settings)
        _assert_equal_runs(campaign, run, reference)
        row.survived = 1


def table(campaign: Campaign, command: str, took: float) -> str:
    """The result as Markdown."""
    from megatron_synth.train.record.run_dir import device_name, git_state

    git = git_state(ROOT / "megatron_synth")
    commit = "none" if git is None else git["commit"] + (" with local changes" if git["dirty"] else "")
    lines = [
        f"- command: `{command}`",
        f"- date: {datetime.now(UTC).isoformat(timespec='seconds')}, commit: {commit}",
        f"- device: {device_name()}; it took {took / 60:.0f} minutes",
        "",
        "| fault | tried | survived | what the user saw |",
        "| --- | ---: | ---: | --- |",
    ]
    for row in campaign.rows:
        seen = row.seen.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {row.fault} | {row.tried} | {row.survived} | {seen} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the campaign; an AssertionError tells what did not survive."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.campaign")
    parser.add_argument("--kills", type=int, default=200, help="of one run on one rank; default 200")
    parser.add_argument("--kills-of-two", type=int, default=20, help="of a second run, on two ranks; default 20")
    parser.add_argument("--damage", type=int, default=5, help="times that every file of a checkpoint is damaged in every way")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--table", type=Path, help="Markdown file whose table between the marks is replaced")
    options = parser.parse_args(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        corpus = write_corpus(folder / "corpus")
        campaign = Campaign(folder, RankPool(), write_config(folder / "base.yaml", corpus), options.seed)
        try:
            if options.kills:
                kills(campaign, "single", options.kills)
            if options.kills_of_two:
                kills(campaign, "dp2", options.kills_of_two)
            damage(campaign, options.damage)
            disks(campaign)
            ranks_in_trouble(campaign)
        except BaseException:
            print(table(campaign, "broken off", time.monotonic() - began))  # what stands is worth knowing
            raise
        finally:
            campaign.pool.close()
    command = "python -m tests.faults.campaign"
    command += "".join(
        f" --{name.replace('_', '-')} {getattr(options, name)}" for name in ("kills", "kills_of_two", "damage", "seed")
    )
    text = table(campaign, command, time.monotonic() - began)
    print(text)
    if options.table is not None:
        document = options.table.read_text(encoding="utf-8")
        pattern = re.compile(r"(<!-- table: faults -->\n).*?(<!-- end -->)", re.DOTALL)
        options.table.write_text(pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", document), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
