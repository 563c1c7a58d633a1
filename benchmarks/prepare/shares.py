"""What it takes to prepare made-up text as an array of SLURM, beside one machine: processor time, memory, the last job's part.

    python -m tests.slurm.lab --nodes 4 -- python -m benchmarks prepare --shares 1,4,16

Each process is started through a script that notes its processor time and its largest resident set: nothing is estimated.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.prepare.corpus import write_corpus
from benchmarks.prepare.memory import DISK_PER_TEXT, HOLDOUT, SEQUENCE_LENGTH, TRAINING_BYTES, VOCABULARY
from benchmarks.prepare.turns import TURN_S, in_turn
from megatron_synth.cluster import slurm
from megatron_synth.config.errors import UserError
from megatron_synth.core.files import write_json
from megatron_synth.data.shards.manifest import Manifest
from megatron_synth.data.tokenizer import FILE_NAME as TOKENIZER

_POLL_S = 0.5
_NOTES = "notes.jsonl"
_NOTING = f"""#!{sys.executable}
import json, resource, subprocess, sys
from pathlib import Path
code = subprocess.call([sys.executable, *sys.argv[1:]])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(Path(__file__).with_name("{_NOTES}"), "a") as file:
    note = {{"command": sys.argv[1:], "cpu_s": used.ru_utime + used.ru_stime, "rss": used.ru_maxrss * 1024}}
    file.write(json.dumps(note) + "\\n")
sys.exit(code)
"""


@dataclass(frozen=True)
class Prepared:
    """One preparation. tasks: None for one machine.

    shares_s, longest_s, last_s: processor seconds of all tasks, of the longest, and of the job that assembles. rss: bytes of
    the largest process.
    """

    tasks: int | None
    seconds: float
    shares_s: float
    longest_s: float
    last_s: float
    rss: int

    @property
    def cpu_s(self) -> float:
        """Processor seconds of all."""
        return self.shares_s + self.last_s

    def last_part(self, start_s: float) -> float:
        """Part of the time that the last job takes where each task, and that job, has a processor; without their start."""
        longest, last = self.longest_s - start_s, self.last_s - start_s
        return last / (longest + last)


@dataclass(frozen=True)
class SharesBench:
    """One machine first, then each number of tasks."""

    text_bytes: int
    documents: int
    tokens: int
    shuffled: bool
    at_once: bool
    start_s: float
    """Processor seconds of a command that finds all of it done: what every process costs before it works."""
    prepared: tuple[Prepared, ...]


def measure(
    text_bytes: int,
    tasks: Sequence[int],
    folder: Path | None,
    shuffled: bool,
    say: Callable[[str], None],
    at_once: bool = False,
) -> SharesBench:
    """Prepare so much text by one machine and by arrays of so many tasks, each with one process.

    Args:
        text_bytes: of the corpus.
        tasks: of the arrays.
        folder: where to put corpus and output, on a disk with room; None: the system's temporary folder.
        shuffled: with a shuffle and packing.
        say: gets a line after each.
        at_once: all of them at one time, not one after the other: on hours of work, what disturbs one disturbs all. The
            tasks of an array then take turns, so that each preparation has one busy process.

    Raises:
        UserError: no SLURM, no room, a step that fails, or other bytes than those of one machine.
    """
    if not slurm.available():
        raise UserError("--shares: needs a SLURM whose nodes are this machine: python -m tests.slurm.lab --nodes 4 -- COMMAND")
    place, needed = folder or Path(tempfile.gettempdir()), (DISK_PER_TEXT + at_once * len(tasks)) * text_bytes
    if shutil.disk_usage(place).free < needed:
        raise UserError(f"{place}: {needed / 1e9:.1f} GB needed; give another --folder, or measure less text")
    with tempfile.TemporaryDirectory(prefix="megatron-synth-shares-", dir=folder) as temporary:
        base = Path(temporary).resolve()  # jobs are not started where this process was
        corpus = write_corpus(base / "corpus", text_bytes, compressed=False)
        say(f"{corpus.documents:,} documents of {corpus.text_bytes / 1e6:,.0f} MB written")
        web = {"kind": "natural", "input": [str(file) for file in corpus.files]}
        tokenizer = {"train": {"vocab_size": VOCABULARY}}
        few = {"output": str(base / "sample"), "tokenizer": tokenizer, "sources": {"web": web | {"max_bytes": TRAINING_BYTES}}}
        write_json(base / "sample.json", few)
        _run(Path(sys.executable), "prepare", str(base / "sample.json"), "--workers", "1")
        settings: dict[str, Any] = {
            "tokenizer": {"path": str(base / "sample" / TOKENIZER)},
            "sources": {"web": web | {"holdout": HOLDOUT}},
        }
        if shuffled:
            settings |= {"shuffle": {"seed": 1}, "packing": {"sequence_length": SEQUENCE_LENGTH}}

        def prepare(count: int | None) -> tuple[Prepared, list[Manifest], float]:
            own = base / ("one" if count is None else str(count))
            noting = _noting(own, settings)
            with in_turn(own) if at_once and count else contextlib.nullcontext():
                prepared = _prepare(own, noting, count)
            manifests = [Manifest.load(own / "out" / name) for name in ("web", "web-valid")]
            say(f"{'one machine' if count is None else f'{count} tasks'}: {prepared.cpu_s:.0f} processor seconds")
            start_s = 0.0
            if count is None:
                (own / _NOTES).unlink()
                _run(noting, "prepare", str(own / "all.json"), "--workers", "1")
                start_s = float(_noted(own)[0]["cpu_s"])
            shutil.rmtree(own)
            return prepared, manifests, start_s

        with ThreadPoolExecutor(1 + len(tasks) if at_once else 1) as threads:
            done = list(threads.map(prepare, (None, *tasks)))
        _, manifests, start_s = done[0]
        for count, (_, others, _) in zip(tasks, done[1:], strict=True):
            if [manifest.digest() for manifest in others] != [manifest.digest() for manifest in manifests]:
                raise UserError(f"prepare wrote other bytes with {count} tasks than on one machine")
        tokens = sum(manifest.counts.tokens for manifest in manifests)
        prepared = tuple(one for one, _, _ in done)
        return SharesBench(corpus.text_bytes, corpus.documents, tokens, shuffled, at_once, start_s, prepared)


def _noting(own: Path, settings: dict[str, Any]) -> Path:
    """A folder for one preparation, its configuration in all.json; returns an interpreter that notes what each process took."""
    own.mkdir()
    noting = own / "python"
    noting.write_text(_NOTING)
    noting.chmod(0o755)
    write_json(own / "cluster.yaml", {"python": str(noting)})
    write_json(own / "all.json", {**settings, "output": str(own / "out")})
    return noting


def _run(noting: Path, *words: str) -> None:
    done = subprocess.run([noting, "-m", "megatron_synth", *words], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr.strip()[-500:]}")


def _noted(base: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (base / _NOTES).read_text().splitlines()]


def _prepare(base: Path, noting: Path, tasks: int | None) -> Prepared:
    began = time.perf_counter()
    if tasks is None:
        _run(noting, "prepare", str(base / "all.json"), "--workers", "1")
    else:
        options = ["--slurm", "--tasks", str(tasks), "--workers", "1", "--cluster", str(base / "cluster.yaml")]
        _run(noting, "prepare", str(base / "all.json"), *options)
        jobs = sorted({file.read_text().strip() for file in base.glob("out.slurm/*/*/job.id")})
        while any(state.active for state in slurm.states(jobs[-2:]).values()):
            time.sleep(_POLL_S)
        if not (base / "out" / "prepare.json").is_file():
            raise UserError(f"{base}/out: not there after its jobs; {slurm.states(jobs[-2:])}")
    seconds = time.perf_counter() - began
    notes = _noted(base)
    own = [note for note in notes if "prepare" in note["command"] and "--slurm" not in note["command"]]
    shares = [note["cpu_s"] for note in own if "--share" in note["command"]]
    last = sum(note["cpu_s"] for note in own if "--share" not in note["command"])
    return Prepared(tasks, seconds, sum(shares), max(shares, default=0.0), last, max(note["rss"] for note in own))


def render(head: dict[str, Any], result: SharesBench) -> str:
    """The result as Markdown."""
    from megatron_synth.bench.tables import header_lines, markdown_table

    alone = result.prepared[0].cpu_s
    turns = f"all at one time, the tasks of an array in turns of {TURN_S:.0f} s"
    rows = [["tasks", "seconds", "CPU s", "longest task", "last job", "its part", "tokens/CPU s", "beside one", "process, MiB"]]
    for one in result.prepared:
        parts = (
            ("", "", "")
            if one.tasks is None
            else (f"{one.longest_s:.1f}", f"{one.last_s:.1f}", f"{one.last_part(result.start_s):.0%}")
        )
        speed = (f"{result.tokens / one.cpu_s:,.0f}", f"{alone / one.cpu_s:.3f}")
        name = "one machine" if one.tasks is None else str(one.tasks)
        rows.append([name, f"{one.seconds:.0f}", f"{one.cpu_s:.1f}", *parts, *speed, f"{one.rss / 2**20:,.0f}"])
    lines = [
        *header_lines(head),
        f"- text: {result.text_bytes / 1e6:,.0f} MB made up by benchmarks/prepare/corpus.py, {result.documents:,} documents, "
        f"{result.tokens:,} tokens of {VOCABULARY:,}; {'shuffled and packed' if result.shuffled else 'in its order'}; one "
        f"process for each task; {turns if result.at_once else 'one after the other'}",
        f"- CPU s: of all processes; each takes {result.start_s:.1f} s before it works. Its part: that of the last job in the "
        "time of a run where each task and that job have one processor, without these; process: the largest resident set of "
        "one, with pages that others share",
    ]
    return "\n".join([*lines, "", *markdown_table(rows)])


def to_json(head: dict[str, Any], result: SharesBench) -> dict[str, Any]:
    """The result with the header."""
    return {**head, **asdict(result)}
