"""`python -m tests.faults.shard_mutations`: shards whose .idx, .bin, .learned or manifest.json were altered, opened and read.

Each is read whole through the loader, with its documents, with compiled code and without: it is refused with a message, or,
where there are checksums, equal to what was written. Nothing may crash. The work is done in processes of their own, so that
one that dies is counted and its seed named. `--state FILE` keeps what was done, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.data.loading import loader
from megatron_synth.data.loading.loader import Loader
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
from megatron_synth.data.shards import native
from megatron_synth.data.shards.block_hash import BlockHasher
from megatron_synth.data.shards.checksums import BlockChecker
from megatron_synth.data.shards.indexed import HEADER, MAGIC, ShardWriter
from megatron_synth.data.shards.learned import SUFFIX as LEARNED
from megatron_synth.data.shards.learned import LearnedWriter
from megatron_synth.data.shards.manifest import Counts, Manifest, Provenance, ShardInfo, TokenizerInfo
from megatron_synth.data.shards.source import Source, open_source
from tests.faults.tally import Tally

VOCABULARY = 500
LENGTH = 16
BLOCK = 256
_PART = 2000
PREPARED = "prepared"
BARE = "bare"
NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    256,
    65535,
    65536,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**40,
    -(2**40),
    2**62,
    2**63 - 1,
    -(2**63),
)
HOSTILE: tuple[Any, ...] = (
    *(
        *NUMBERS,
        2**64,
        10**30,
        -0.5,
        1e300,
        None,
        True,
        "",
        "x",
        "../x",
        "/etc/passwd",
        "..",
        ".",
        "a\0b",
        "\u202e",
        "0" * 5000,
    ),
    *([], {}, [[]], {"a": 1}),
)


@dataclass(frozen=True)
class Sound:
    """What the files held before they were altered, and what the loader made of it."""

    files: dict[str, bytes]
    read: list[tuple[bytes, ...]]


def make(folder: Path) -> None:
    """A prepared source of two shards, and a bare pair whose documents have several sequences or none."""
    generator = np.random.default_rng(0)
    infos = []
    (folder / PREPARED).mkdir(parents=True)
    for number in range(2):
        lengths = generator.integers(1, 40, 25).astype(np.int32)
        writer = ShardWriter(folder / PREPARED / f"shard-{number:05d}", np.dtype(np.uint16))
        writer._blocks = BlockHasher(BLOCK)
        writer.add(generator.integers(0, VOCABULARY, lengths.sum()).astype(np.uint16), lengths)
        info = ShardInfo(name=f"shard-{number:05d}", **vars(writer.finish()))
        mask = LearnedWriter(folder / PREPARED / f"{info.name}{LEARNED}")
        mask.add(generator.random(info.tokens) < 0.5)
        sha256, learned = mask.finish()
        infos.append(info.model_copy(update={"learned_sha256": sha256, "learned_tokens": learned}))
    Manifest(
        name=PREPARED,
        kind="natural",
        generator=None,
        split="train",
        dtype="uint16",
        tokenizer=TokenizerInfo(path="../tokenizer.json", fingerprint="f" * 64, vocab_size=VOCABULARY, eod_id=0),
        counts=Counts(documents=50, tokens=sum(info.tokens for info in infos), text_bytes=1),
        block_bytes=BLOCK,
        shards=tuple(infos),
        made=Provenance(program="test", config_digest="0" * 64, inputs={}, holdout="0"),
    ).save(folder / PREPARED)
    lengths = generator.integers(0, 30, 40).astype(np.int32)
    tokens = generator.integers(0, VOCABULARY, lengths.sum()).astype(np.int32)
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * 4
    documents = np.array([0, 0, *sorted(generator.integers(0, 41, 12).tolist()), 40, 40], np.int64)
    header = HEADER.pack(MAGIC, 1, 4, len(lengths), len(documents))
    (folder / f"{BARE}.idx").write_bytes(header + lengths.tobytes() + pointers.astype(np.int64).tobytes() + documents.tobytes())
    (folder / f"{BARE}.bin").write_bytes(tokens.tobytes())


def sound(folder: Path, name: str) -> Sound:
    """One of the two sources as it is."""
    paths = sorted((folder / PREPARED).iterdir()) if name == PREPARED else [folder / f"{BARE}.idx", folder / f"{BARE}.bin"]
    return Sound({str(path.relative_to(folder)): path.read_bytes() for path in paths}, read(folder / name, blocks=False))


def read(path: Path, *, blocks: bool) -> list[tuple[bytes, ...]]:
    """All batches of a source: tokens, and where documents begin and end. blocks: after its checksums."""
    source = open_source(path, "s", memory_map=not blocks)
    if blocks:
        assert source.manifest is not None
        source.check_before_reading(BlockChecker(source.path, source.manifest).check)
    return list(_batches(source))


def _batches(source: Source) -> Any:
    windows = source.num_windows(LENGTH)
    if windows < 2:
        raise UserError("too few tokens")
    plan = MixturePlan([SourceSpec("s", Fraction(1), windows, 1.0)], 0)
    loader = Loader(
        plan,
        [source],
        sequence_length=LENGTH,
        micro_batch_size=2,
        data_parallel_rank=0,
        data_parallel_size=1,
        with_boundaries=True,
    )
    for first in range(0, windows - 1, 2):
        for batch in loader.micro_batches(first, 2):
            bounds = batch.boundaries
            assert bounds is not None
            learned = np.empty(0, np.bool_) if batch.learned is None else batch.learned
            arrays = (batch.tokens, learned, bounds.cu_seqlens, bounds.ends, bounds.position_ids(), bounds.loss_mask())
            yield tuple(array.tobytes() for array in arrays)


def mutate(draw: random.Random, name: str, data: bytes) -> bytes:
    """Other bytes than `data`, at random."""
    if name.endswith(".json") and draw.random() < 0.7:
        return _mutate_json(draw, data)
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        kind = draw.randrange(6)
        at = draw.randrange(len(content)) if content else 0
        if kind <= 1 and content:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 2 and len(content) >= 8:
            at = draw.randrange(len(content) - 7)
            struct.pack_into("<q", content, at, draw.choice(NUMBERS))
        elif kind == 3:
            del content[at : at + draw.choice((1, 2, 4, 8, 100, 10**6))]
        elif kind == 4:
            content[at:at] = draw.randbytes(draw.choice((1, 2, 4, 8, 100)))
        elif content:
            other, size = draw.randrange(len(content)), draw.choice((2, 4, 8, 64))
            part = bytes(content[other : other + size])
            content[at : at + len(part)] = part
    return bytes(content)


def _mutate_json(draw: random.Random, data: bytes) -> bytes:
    value = json.loads(data)
    for _ in range(draw.choice((1, 1, 2))):
        place: Any = value
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(place[key], dict | list) and draw.random() < 0.9:
                place = place[key]
                continue
            if draw.random() < 0.1:
                del place[key]
            elif isinstance(place[key], int) and draw.random() < 0.5:
                place[key] += draw.choice((-2, -1, 1, 2, 256))
            else:
                place[key] = draw.choice(HOSTILE)
            break
    return json.dumps(value).encode()


def attempt(folder: Path, seed: int, sources: dict[str, Sound]) -> str:
    """Alter one file, read, and put it back; what happened: `refused`, `equal`, or, without checksums, `other tokens`.

    Raises:
        AssertionError: other tokens than were written came out although there are checksums, or compiled code and numpy differ.
        Exception: anything else that no user should see.
    """
    draw = random.Random(seed)
    source = draw.choice((PREPARED, PREPARED, BARE))
    name = draw.choice(list(sources[source].files))
    altered = mutate(draw, name, sources[source].files[name])
    blocks = source == PREPARED and draw.random() < 0.5
    (folder / name).write_bytes(altered)
    compiled, outcomes = native.library, []
    try:
        for library in (compiled, lambda: None):
            native.library = library  # type: ignore[assignment]
            try:
                outcomes.append(read(folder / source, blocks=blocks))
            except UserError:
                outcomes.append(None)
    finally:
        native.library = compiled
        (folder / name).write_bytes(sources[source].files[name])
    assert outcomes[0] == outcomes[1], f"seed {seed}: compiled code and numpy differ"
    if outcomes[0] is None:
        return "refused"
    if outcomes[0] == sources[source].read:
        return "equal"
    # without checksums a .bin file may hold any tokens of the vocabulary, and a bare index may divide them in any sound way
    assert not blocks, f"seed {seed}: {name} was altered, and other tokens were served"
    assert source == BARE or name.endswith((".bin", LEARNED)), f"seed {seed}: {name} was altered, and documents moved"
    return "other tokens"


def _work(folder: Path, first: int, count: int, results: Path) -> None:
    """Attempts one after the other, a line of `results` for each."""
    loader.LOOK_AHEAD_ROWS = 64  # as many as there are windows: else most of the time goes into batches that nobody reads
    make(folder)
    sources = {name: sound(folder, name) for name in (PREPARED, BARE)}
    with results.open("a", buffering=1, encoding="utf-8") as file:
        for seed in range(first, first + count):
            try:
                outcome = attempt(folder, seed, sources)
            except BaseException as error:
                outcome = f"failed: {type(error).__name__}: {error}".replace("\n", " ")
            file.write(outcome + "\n")


def _outcomes(folder: Path, first: int, count: int) -> list[str]:
    """Of each attempt, in processes that begin again after one that died."""
    context, results = multiprocessing.get_context("spawn"), folder / "results"
    results.touch()
    for life in range(count + 1):
        lines = results.read_text(encoding="utf-8").splitlines()
        if len(lines) >= count:
            return lines
        process = context.Process(target=_work, args=(folder / str(life), first + len(lines), count - len(lines), results))
        process.start()
        process.join()
        if process.exitcode:
            with results.open("a", encoding="utf-8") as file:
                file.write(f"crashed: the process ended with {process.exitcode}\n")
    return results.read_text(encoding="utf-8").splitlines()


def campaign(count: int, seed: int, processes: int) -> tuple[Counter[str], list[str]]:
    """Outcomes and their numbers; and failures, with their seeds."""
    each = -(-count // processes)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
        parts = [Path(folder) / str(number) for number in range(processes)]
        for part in parts:
            part.mkdir()
        found = pool.map(_outcomes, parts, range(seed, seed + count, each), [each] * processes)
        lines = [line for part in found for line in part]
    failures = [f"seed {seed + at}: {line}" for at, line in enumerate(lines) if line.startswith(("failed", "crashed"))]
    return Counter(line.split(":")[0] for line in lines), failures


def main(argv: list[str]) -> int:
    """Run a campaign; 1 when anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.shard_mutations", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="files to alter")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    parser.add_argument("--processes", type=int, default=1, help="that share the work")
    parser.add_argument("--state", type=Path, help="file that keeps what is done, to go on")
    options = parser.parse_args(argv)
    began, tally = time.monotonic(), Tally(options.state, options.seed)
    for part in tally.missing(options.count, _PART):
        tally.add(part, *campaign(_PART, options.seed + part * _PART, options.processes))
    print(tally.text() + f"; {(time.monotonic() - began) / 60:.0f} min")
    print("\n".join(tally.failures[:50]))
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
