"""`prepare` killed at changes that it makes to the disk, files damaged, killed again: the same bytes in the end.

`PREPARE_KILLED_EVERY=1 pytest tests/unit/data/preparing/test_prepare_crashes.py` takes every change, not one in three.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from megatron_synth.cli.prepare.verify import main as verify
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.data.preparing import pipeline, shuffle, splits
from megatron_synth.data.preparing.prepare import prepare
from tests.crashing import run_until

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
PLAIN = {"tokenizer": {"train": {"vocab_size": 300}}}
SHUFFLED = {"shuffle": {"seed": 5}, "packing": {"sequence_length": 32}, **PLAIN}

EVERY = int(os.environ.get("PREPARE_KILLED_EVERY", "3"))


def prepare_in_small_parts(settings: str, force: bool) -> None:
    """What runs in a process of its own: runs, splits and buckets are small, so that there are many."""
    pipeline.CHUNK_CHARACTERS, pipeline.RUN_BYTES = 300, 200
    splits.SMALL_SPLIT = splits.SPLIT_BYTES = 700
    shuffle.BUCKET_BYTES = 400
    prepare(PrepareConfig.model_validate_json(settings), force=force)


def settings_of(folder: Path, output: Path, changes: dict) -> str:
    """Two sources, of which the first has a holdout and the second a limit."""
    generator = random.Random(3)
    for name, documents in (("web", 18), ("qa", 10)):
        texts = [" ".join(generator.choices(WORDS, k=generator.randint(1, 25))) for _ in range(documents)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {text}"}) + "\n" for text in texts))
    sources = {
        "web": {"kind": "natural", "input": str(folder / "web.jsonl"), "holdout": "1/4"},
        "qa": {"kind": "qa", "input": str(folder / "qa.jsonl"), "max_bytes": 600},
    }
    return PrepareConfig.model_validate(
        {"output": str(output), "sources": sources, "shard_tokens": 100, **changes}
    ).model_dump_json()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def damage(folder: Path, generator: random.Random) -> None:
    """Cut off or flip a bit of one file that a killed run has left."""
    found = [path for partial in sorted(folder.glob(".out.partial-*")) for path in sorted(partial.rglob("*"))]
    files = [path for path in found if path.is_file() and path.stat().st_size]
    if not files:
        return
    path = generator.choice(files)
    data = bytearray(path.read_bytes())
    if generator.random() < 0.4:
        data = data[: generator.randrange(len(data))]
    else:
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def finish(step: int, settings: str, force: bool) -> None:
    """Go on to the end; a run that is refused has cleaned up, and the next starts over."""
    ended = run_until(None, False, prepare_in_small_parts, settings, force)
    assert not ended.killed
    if ended.refused is not None:
        again = run_until(None, False, prepare_in_small_parts, settings, force)
        assert again.refused is None, (step, ended.refused, again.refused)


@pytest.mark.parametrize("changes", [PLAIN, SHUFFLED], ids=["plain", "shuffled"])
def test_killed_and_damaged_at_any_step_gives_the_same_bytes_in_the_end(tmp_path, changes):
    """By turns a kill with damage, a power failure, and a power failure with damage; twice where the first left something."""
    output = tmp_path / "out"
    settings = settings_of(tmp_path, output, changes)
    whole = run_until(None, False, prepare_in_small_parts, settings, False)
    assert whole.refused is None
    expected = tree(output)
    assert len([name for name in expected if name.endswith(".bin")]) > 5
    first = 1 if changes is PLAIN else 2
    for count, step in enumerate(range(min(first, EVERY), whole.steps + 1, EVERY)):
        shutil.rmtree(output, ignore_errors=True)
        generator = random.Random(step)
        power_fails, damaged = count % 3 > 0, count % 3 < 2
        for stop in (step, generator.randrange(1, whole.steps)):
            if not output.exists() and run_until(stop, power_fails, prepare_in_small_parts, settings, False).killed and damaged:
                damage(tmp_path, generator)
        finish(step, settings, False)
        assert tree(output) == expected, f"killed at step {step}"
        assert not list(tmp_path.glob(".out*")), f"killed at step {step}"
    assert verify([str(output)]) == 0


def test_an_output_that_is_being_replaced_is_never_lost(tmp_path):
    """Killed at every step around the two renames: the old output or the new one is there, or put back by the next run."""
    output = tmp_path / "out"
    old, new = settings_of(tmp_path, output, PLAIN), settings_of(tmp_path, output, {**PLAIN, "shard_tokens": 10**6})
    assert run_until(None, False, prepare_in_small_parts, old, False).refused is None
    before = tree(output)
    steps = run_until(None, False, prepare_in_small_parts, new, True).steps
    after = tree(output)
    assert before != after
    for step in range(steps - 40, steps + 1):
        shutil.rmtree(output)
        for name, data in before.items():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_bytes(data)
        assert run_until(step, False, prepare_in_small_parts, new, True).killed
        again = run_until(None, False, prepare_in_small_parts, new, False)
        assert tree(output) == (after if again.refused is None else before), f"killed at step {step}"
        assert again.refused is None or "prepared from other settings" in again.refused
        assert not list(tmp_path.glob(".out*-old")), f"killed at step {step}"
        for left in tmp_path.glob(".out*"):
            shutil.rmtree(left)
