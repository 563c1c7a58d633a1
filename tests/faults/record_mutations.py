"""`python -m tests.faults.record_mutations --count 20000`: records changed, again and again, and given to every verb that reads
them.

A verb must do its work or refuse with one message, exit code 0, 1 or 2. `status` must always show the sound run beside the
damaged one. What reads the record is asked at each change; verbs that fit, open data or write a page at one change of
`--every`, and figures are drawn to the last dot at one of `--drawn` of these. `--state FILE` keeps what is done, to go on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.synthesis.stub import RunningStub
from megatron_synth.cli import main as cli
from megatron_synth.cluster import slurm, verdict
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import load_file, to_yaml
from megatron_synth.config.schema import Config
from megatron_synth.data.loading.run_data import open_data
from megatron_synth.data.mixing.ledger import Ledger
from megatron_synth.study.execute.folder import Folder
from megatron_synth.study.execute.status_text import status_text
from megatron_synth.study.plan.runs import Run, expand
from megatron_synth.study.plan.study_file import Study, load_study
from megatron_synth.study.report.collect import collect, read_runs_csv, runs_csv
from megatron_synth.synthesis.answers.parts import keys_of
from megatron_synth.synthesis.run import run as synthesize
from megatron_synth.synthesis.setup import ANSWERS
from megatron_synth.synthesis.status import status_text as synthesis_status
from megatron_synth.synthesis.synthesis_file import SynthesisConfig
from megatron_synth.train.record import metrics
from tests.faults.tally import Tally
from tests.support import SEQUENCE_LENGTH, STEPS, run_info, write_config, write_corpus

JOB = "7"
_PART = 500
_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    1e308,
    -1e308,
    5e-324,
    "",
    "x",
    "1/0",
    "\x1b[2J\n",
    "../../x",
    "$\\frac$",
    "ä" * 200,
    "\ud800",
    [],
    {},
    [[]],
    {"": 0},
)
_TEXTS = (b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b"\xff", b"\x00", b"\\ud800", b"\r", b'"', b",", b"\n", b"")


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Another content of a record: another value somewhere, or other bytes."""
    if draw.random() < 0.6:
        changed = _other_value(content, draw)
        if changed is not None:
            return changed
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place, length = draw.randrange(len(data) + 1), draw.choice((1, 4, 40, 400))
        match draw.randrange(6):
            case 0 if place < len(data):
                data[place] ^= 1 << draw.randrange(8)
            case 1:
                data[place : place + length] = bytes(length)
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = draw.randbytes(length)
            case 4:
                del data[place:]
            case _:
                data[place : place + draw.choice((0, 1, 5))] = draw.choice(_TEXTS)
    return bytes(data)


def _other_value(content: bytes, draw: random.Random) -> bytes | None:
    """JSON, or a line of it, with a value replaced or removed; None: it is no JSON."""
    lines = content.split(b"\n")
    try:
        whole = json.loads(content)
        place = None
    except ValueError:
        place = draw.randrange(len(lines))
        try:
            whole = json.loads(lines[place])
        except ValueError:
            return None
    node, above = whole, []
    while isinstance(node, dict | list) and node and draw.random() < 0.85:
        key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        above.append((node, key))
        node = node[key]
    value = draw.choice(_VALUES)
    if not above:
        whole = value
    elif draw.random() < 0.2:
        del above[-1][0][above[-1][1]]
    else:
        above[-1][0][above[-1][1]] = value
    text = json.dumps(whole).encode()
    if place is None:
        return text
    lines[place] = text
    return b"\n".join(lines)


@dataclass(frozen=True)
class World:
    """Records of every kind below a folder: two runs with a job, a study, tables, a synthesis."""

    folder: Path
    study_file: Path
    study: Study
    runs: list[Run]
    synthesis: SynthesisConfig

    @property
    def run(self) -> Path:
        """The run whose records are changed."""
        return self.folder / "runs" / "a"

    @property
    def table(self) -> Path:
        """A runs.csv."""
        return self.folder / "runs.csv"


def make_world(folder: Path) -> World:
    """Write the records as training, a job and a study write them."""
    corpus = write_corpus(folder / "corpus")
    for name in ("a", "b"):
        _write_run(write_config(folder / "train.yaml", corpus), folder / "runs" / name)
    (folder / "runs" / "b" / "config.yaml").write_text(_SHORT)  # what is read of it: YAML takes its time
    study_file = folder / "study.yaml"
    study_file.write_text(_STUDY.format(folder=folder, corpus=corpus))
    study = load_study(str(study_file))
    runs = expand(study)
    _write_study(study, runs)
    rows = collect(study, runs, Folder(study.folder)).rows
    (folder / "runs.csv").write_text(runs_csv(rows))
    return World(folder, study_file, study, runs, _write_synthesis(folder))


_SHORT = f"""model: {{name: custom, num_layers: 2, hidden_size: 32, num_attention_heads: 4}}
data: {{sources: {{web: {{ratio: '1'}}}}}}
train: {{steps: {STEPS}, sequence_length: 32, seed: 1}}
precision: {{dtype: fp32}}
"""
_STUDY = """name: small
output: {folder}/study
sources: {{web: {{path: {corpus}/web}}, qa: {{path: {corpus}/qa}}}}
arms: {{natural: {{web: 1}}, mixed: {{web: 1/2, qa: 1/2}}}}
sizes:
  s: {{model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2}}}}
  m: {{model: {{num_layers: 4, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2}}}}
grid: [{{tokens: [512, 1024, 2048, 4096]}}]
seeds: [1, 2]
validation: {{val: {{path: {corpus}/val}}}}
rates: {{lr: 1e-2}}
protocol: {{train: {{sequence_length: 32, global_batch_size: 4}}, precision: {{dtype: fp32}}}}
report: {{bootstraps: 4}}
"""


def _write_run(config_file: Path, path: Path) -> None:
    config = load_file(Config, config_file)
    data = open_data(config)
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(run_info(starts=2)))
    (path / "config.yaml").write_text(to_yaml(config))
    (path / "events.log").write_text(f"2026-01-01T00:00:00+00:00 done at step {STEPS}\n")
    lines = [
        {"start": 1, "phase": "starting", "begin": 1.0, "end": 2.0},
        {"start": 1, "phase": "steps", "begin": 2.0, "end": 12.0, "first": 1, "last": 12, "data_s": 0.5},
        {"start": 2, "phase": "steps", "begin": 20.0, "end": 30.0, "first": 11, "last": STEPS, "data_s": 0.0},
    ]
    (path / "times.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    node = {"steps": STEPS, "own_s": 6.0, "data": 0.5, "saving": 0.1, "starting": 2.0}
    (path / "nodes.json").write_text(json.dumps({"node0": node, "node1": {**node, "own_s": 9.0}}))
    writer, batch = metrics.MetricsFile(path / "metrics.jsonl"), config.samples_of_step(0)
    for step in range(1, STEPS + 1):
        counted = Ledger.planned(data.plan, SEQUENCE_LENGTH, step * batch).to_json()
        record: dict[str, Any] = {metrics.STEP: step, metrics.LOSS: 5 - 0.1 * step, metrics.GRAD_NORM: 1.0, metrics.LR: 1e-3}
        record |= {metrics.STEP_S: 0.5, metrics.TOKENS_PER_SEC: 1e4, metrics.MFU: None, metrics.TOKENS: counted["tokens"]}
        for name, source in counted["sources"].items():
            record |= {metrics.SOURCE_LOSS + name: 4.0, metrics.SHARE + name: source["share"]}
            record |= {metrics.EPOCH + name: source["epochs"]}
        if step % 10 == 0:
            record |= {metrics.EVAL_DOMAIN_LOSS + "val": 4.5, metrics.EVAL_LOSS: 4.5, metrics.EVAL_DOMAIN_BPB + "val": 2.0}
        writer.append([record])
    planned = Ledger.planned(data.plan, SEQUENCE_LENGTH, STEPS * batch)
    (path / "ledger.json").write_text(json.dumps(planned.to_json()))
    checkpoint = path / "checkpoints" / f"step_{STEPS:08d}"
    checkpoint.mkdir(parents=True)
    state = {"step": STEPS, "samples": STEPS * batch, "plan_digest": data.digest, "ledger": planned.state_dict()}
    (checkpoint / "trainer.json").write_text(json.dumps(state))
    job = path / "slurm" / "20260101T000000"
    (job / "attempts").mkdir(parents=True)
    (job / "outcomes" / f"{JOB}.0").mkdir(parents=True)
    (job / "job.id").write_text(f"{JOB}\n")
    (job / "job.json").write_text(json.dumps({"run_dir": str(path), "nodes": 1}))
    (job / "job.log").write_text("[rank 0] step 1/20\n[rank 1] \x1b[31mred\n")
    end = verdict.End("failed", 1, 0, 3, "ValueError", True, "rank 1: ValueError")
    attempts = [
        {"event": "begin", "time": 1.0, "restart": 0, "step": 0, "nodes": "n1"},
        {"event": "end", "time": 2.0, "restart": 0, "step": 3, "end": vars(end), "requeue": True, "why": "failed"},
    ]
    (job / "attempts" / f"{JOB}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in attempts))
    report = {"time": 2.0, "rank": 1, "host": "n1", "code": 1, "step": 3, "error": "ValueError", "message": "m", "where": None}
    (job / "outcomes" / f"{JOB}.0" / "node-0.jsonl").write_text(json.dumps(report) + "\n")


def _write_study(study: Study, runs: list[Run]) -> None:
    folder = Folder(study.folder)
    folder.prepare()
    source = {"ratio": "1", "samples": 16, "tokens": 512, "epochs": 0.5, "share": 1.0}
    for number, run in enumerate(runs):
        path = folder.run(run)
        path.mkdir(parents=True)
        (path / "run.json").write_text(json.dumps(run_info()))
        (path / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": 4.0}) + "\n")
        if number == 0:
            folder.record_failure(run, 1, "ValueError: x")
            continue
        loss = 2 + 30 / run.tokens**0.5 + 0.01 * number
        content = {"id": run.id, "run": run.name, "seed": run.seed, "steps": run.config.train.steps, "tokens": run.tokens}
        content |= {"parameters": run.parameters, "vocab_size": 256, "flops": run.flops(256), "loss": {"val": loss}}
        content |= {"bpb": {"val": loss / 2}, "tokens_evaluated": {"val": 416}, "train_loss": loss, "skipped": 0}
        content |= {"sources": dict.fromkeys(study.arms[run.arm], source), "train_seconds": 1.0, "device": "CPU"}
        content |= {"layout": "TP1", "world_size": 1, "git": None, "versions": {}, "data_digest": f"{run.arm}{run.seed}"}
        (path / "result.json").write_text(json.dumps(content | {"finished": "2026-01-01T00:00:00+00:00"}))


def _write_synthesis(folder: Path) -> SynthesisConfig:
    texts = [f"The river rises in the hills, and mill number {number} stands by the road. " * 8 for number in range(8)]
    parents = folder / "parents.jsonl"
    parents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    content: dict[str, Any] = {
        "output": str(folder / "synthesis"),
        "kind": "hq-rephrase",
        "parents": {"web": {"input": str(parents)}},
        "generator": {"model": "stub", "api": "completions"},
        "engine": {"name": "openai", "attempts": 1, "patience_s": 1, "timeout_s": 1},
        "filters": {"off": ["copy_of_parent", "repetition", "little_of_parent", "wrong_language"]},
    }
    with RunningStub() as stub, contextlib.redirect_stderr(io.StringIO()):
        content["engine"]["servers"] = stub.url  # nobody listens there afterwards
        config = SynthesisConfig.model_validate(content)
        assert synthesize(config).record is not None
    (folder / "synthesis.yaml").write_text(to_yaml(config))
    with (folder / "synthesis" / "rejected.jsonl").open("a") as file:
        file.write(json.dumps({"id": "a", "text": "x", "parents": ["b"], "reason": "too_short"}) + "\n")
    return config


# ---- what is done with a changed record


class Broken(AssertionError):
    """A verb did not do as it must."""


def _verb(*arguments: str) -> str:
    """Run a verb; what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = cli.main(list(arguments))
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]  # notes may stand before it
    if code not in (0, 1, 2) or (code == 2) != (len(errors) == 1):
        raise Broken(f"{arguments}: exit {code}, {err.getvalue()[:300]}")
    return out.getvalue()


def _quietly(action: Callable[[], object]) -> None:
    with contextlib.suppress(UserError):
        action()


def _run_verbs(world: World, dear: bool) -> None:
    text = _verb("status", str(world.folder / "runs"))
    rows = [line for line in text.splitlines() if line.startswith("b  ")]
    if len(rows) != 1 or "done" not in rows[0]:
        raise Broken(f"the sound run is not shown as it is: {text[:500]}")
    if dear:
        json.loads(_verb("status", str(world.run), "--json"))
        _verb("checkpoint", "ls", str(world.run))
        _verb("logs", str(world.run), "--rank", "1")
        _verb("mix", "audit", str(world.run))
        _verb("report", str(world.run))


def _job_verdict(world: World, dear: bool) -> None:
    if dear:
        _run_verbs(world, dear)
    job = next((world.run / "slurm").glob("*"))
    words = ["end", "--job", JOB, "--restart", "0", "--job-dir", str(job), "--code", "1", "--max-restarts", "3"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = verdict.main(words)
    if code not in (0, 2) or (code == 0 and out.getvalue().split()[0] not in ("requeue", "exit")):
        raise Broken(f"verdict: exit {code}, {out.getvalue()}")


def _study_verbs(world: World, dear: bool) -> None:
    folder = Folder(world.study.folder)
    _quietly(lambda: status_text(world.study, world.runs, folder, each=True))
    _quietly(lambda: collect(world.study, world.runs, folder))
    if dear:
        _verb("study", "status", str(world.study_file))
        _verb("study", "report", str(world.study_file), "--out", str(world.folder / "out"))


def _table_verbs(world: World, dear: bool) -> None:
    _quietly(lambda: read_runs_csv(world.table))
    if dear:
        few = ("--starts", "4", "--bootstraps", "0")
        _verb("fit", str(world.table), "--law", "joint", *few, "--out", str(world.folder / "out"))
        _verb("study", "report", str(world.study_file), "--from", str(world.table), "--out", str(world.folder / "out"))


def _synthesis_verbs(world: World, dear: bool) -> None:
    _quietly(lambda: synthesis_status(world.synthesis))
    _quietly(lambda: sum(1 for _ in keys_of(world.synthesis.folder / ANSWERS)))
    if dear:
        for verb in ("status", "plan", "report", "run"):
            _verb("synthesize", verb, str(world.folder / "synthesis.yaml"))


@contextlib.contextmanager
def _undrawn() -> Iterator[None]:
    """Figures are put together and not drawn, which takes four fifths of the time of those who make them."""
    from matplotlib.figure import Figure

    drawn = Figure.savefig

    def savefig(self: Figure, target: Any, *, format: str, **_: Any) -> None:
        target.write(b"<svg></svg>" if format == "svg" else b"\x89PNG")

    Figure.savefig = savefig  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Figure.savefig = drawn  # type: ignore[method-assign]


def _places(world: World) -> list[tuple[Path, Callable[[World, bool], None]]]:
    run, job = world.run, next((world.run / "slurm").glob("*"))
    folder = Folder(world.study.folder)
    of_run = ["run.json", "metrics.jsonl", "ledger.json", "config.yaml", "events.log", "times.jsonl", "nodes.json"]
    of_run.append(f"checkpoints/step_{STEPS:08d}/trainer.json")
    of_synthesis = ["answers/part-00000.jsonl", "synthesis.json", "corpus/part-00000.jsonl", "rejected.jsonl", "engine.json"]
    of_job = ["job.json", "job.id", f"attempts/{JOB}.jsonl", f"outcomes/{JOB}.0/node-0.jsonl"]
    return [
        *((run / name, _run_verbs) for name in of_run),
        *((job / name, _job_verdict) for name in of_job),
        (folder.run(world.runs[1]) / "result.json", _study_verbs),
        (folder.failure_file(world.runs[0]), _study_verbs),
        (folder.run(world.runs[0]) / "metrics.jsonl", _study_verbs),
        (world.table, _table_verbs),
        *((world.synthesis.folder / name, _synthesis_verbs) for name in of_synthesis),
    ]


def campaign(folder: Path, count: int, seed: int, every: int = 0, drawn: int = 10) -> dict[str, int]:
    """Change a record `count` times. Returns how often each was changed.

    Args:
        folder: an empty one.
        count: changes.
        seed: of what is drawn.
        every: verbs that draw, fit or open data run once in so many changes of a record; 0: never.
        drawn: of these, one in so many draws its figures.

    Raises:
        AssertionError: a verb failed otherwise than by a message, or hid the sound run. The changed record stays where it is.
    """
    world, draw = make_world(folder), random.Random(seed)
    places = _places(world)
    with _undrawn():
        for verbs in dict.fromkeys(verbs for _, verbs in places):
            verbs(world, every > 0)  # all is well before
    happened: Counter[str] = Counter()
    for number in range(count):
        file, verbs = places[number % len(places)]
        content = file.read_bytes()
        # a verdict adds lines, and a synthesis makes its corpus again
        kept = {path: path.read_bytes() for near in (file.parent, file.parent.parent) for path in near.glob("*.json*")}
        file.write_bytes(mutated(content, draw))
        turn = number // len(places)
        dear = every > 0 and turn % every == 0
        try:
            with contextlib.nullcontext() if dear and turn // every % drawn == 0 else _undrawn():
                verbs(world, dear)
        except Exception as error:
            raise Broken(f"change {number} of seed {seed}, {file}: {error!r}") from error
        for path, before in {**kept, file: content}.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(before)
        happened[f"{file.name}{', all verbs' if dear else ''}"] += 1
    return dict(happened)


def main() -> int:
    """Run the campaign; 0: nothing was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--drawn", type=int, default=10)
    parser.add_argument("--state", type=Path, help="file that keeps what is done, to go on")
    options = parser.parse_args()
    slurm.available = lambda: False  # no queue is asked
    began, tally = time.monotonic(), Tally(options.state, options.seed)

    def part(seed: int, count: int) -> dict[str, int]:
        folder = Path(tempfile.mkdtemp(prefix="records-"))
        happened = campaign(folder, count, seed, options.every, options.drawn)
        shutil.rmtree(folder)
        return happened

    tally.run(options.count, _PART, part)
    print(f"none broke a verb; {tally.text()}; {(time.monotonic() - began) / 60:.0f} min")
    return 0


if __name__ == "__main__":
    sys.exit(main())
