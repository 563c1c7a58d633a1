"""Tokens and labels that reach the loss, for random configurations, beside a slow reference that knows nothing of the loader.

The reference is written from the documentation in plain Python: the rule of apportionment step by step, the permutation index
by index, documents from the lengths that were drawn. It reads no index, and shares no function with what it is held against.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_synth.config.schema import Config, Progress
from megatron_synth.data.loading import loader
from megatron_synth.data.loading.recount import learned_labels
from megatron_synth.data.loading.run_data import open_data
from megatron_synth.data.shards.indexed import ShardWriter
from megatron_synth.data.shards.manifest import Counts, Manifest, PackingInfo, Provenance, ShardInfo, TokenizerInfo
from megatron_synth.train.batch import TensorBatch, labels_that_count, prefetcher_of, to_device
from tests.support import with_mask

VOCABULARY = 5000
WORD = 2**64
SAMPLES = 400
"""More than any of the runs has."""


# ---- the reference


def keys(seed: int, *stream: str | int) -> list[int]:
    """16 numbers of 64 bits that a seed and a name give."""
    digest = hashlib.shake_256(json.dumps([seed, *stream]).encode()).digest(128)
    return [int.from_bytes(digest[at : at + 8], "little") for at in range(0, 128, 8)]


def permuted(index: int, size: int, key: list[int]) -> int:
    """Image of one index: a Feistel network over the next power of two, walked until the image is below `size`."""
    bits = (size - 1).bit_length()
    low_bits = bits // 2
    while True:
        low, high = index % 2**low_bits, index >> low_bits
        for number, one in enumerate(key):
            hashed = ((high if number % 2 else low) ^ one) * 0x9E3779B97F4A7C15 % WORD
            hashed = (hashed ^ hashed >> 32) * 0xBF58476D1CE4E5B9 % WORD >> 32
            if number % 2:
                low ^= hashed % 2**low_bits
            else:
                high ^= hashed % 2 ** (bits - low_bits)
        index = high << low_bits | low
        if index < size:
            return index


def keyed_hash(number: int, key: list[int]) -> int:
    """What windows of a sequence are sorted by."""
    for one in key[:2]:
        number ^= one
        number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % WORD
        number = (number ^ number >> 27) * 0x94D049BB133111EB % WORD
        number ^= number >> 31
    return number


def apportioned(ratios: dict[str, Fraction], samples: int) -> Iterator[str]:
    """Source of each sample: among the released, the one whose next sample is due first."""
    names = [name for name, ratio in ratios.items() if ratio]
    if len(names) == 1:
        yield from names * samples
        return
    e, counts = Fraction(1, 2 * len(names) - 2), dict.fromkeys(names, 0)
    for step in range(1, samples + 1):
        released = [name for name in names if math.ceil((counts[name] + e) / ratios[name]) <= step]
        name = min(released, key=lambda name: (math.floor((counts[name] + 1 - e) / ratios[name]) + 1, names.index(name)))
        counts[name] += 1
        yield name


@dataclass(frozen=True)
class Row:
    """What one window must be."""

    source: int
    tokens: list[int]
    starts: list[int]
    """Places in [0, L] at which a document begins."""
    padding: list[int]
    """Places of labels that are in no loss: in packed sources documents of one token, and what begins the next window."""
    learned: list[bool]
    """Of each token."""


class Reference:
    """All samples of a run, one by one."""

    def __init__(self, content: dict[str, Any], texts: dict[str, list[list[int]]]):
        data, train = content["data"], content["train"]
        self.seed, self.names = train["seed"], list(data["sources"])
        self.number = data["windows_per_sequence"]
        self.length = train["sequence_length"] // self.number
        self.settings, self.texts = data["sources"], texts
        self.learned = content["learned"]
        manifests = {name: Path(self.settings[name]["path"]) / "manifest.json" for name in self.names}
        self.packed = {
            name for name, file in manifests.items() if file.is_file() and json.loads(file.read_text()).get("packing")
        }
        phases = data["phases"] or [{"ratios": {name: self.settings[name]["ratio"] for name in self.names}}]
        self.order: list[str] = []
        for phase in phases:
            end = (2 * phase["until"] + self.length) // (2 * self.length) if "until" in phase else SAMPLES
            ratios = {name: Fraction(phase["ratios"].get(name, 0)) for name in self.names}
            self.order += apportioned(ratios, end - len(self.order))
        assert len(self.order) >= SAMPLES
        seen = dict.fromkeys(self.names, 0)
        self.occurrence = []
        for name in self.order:
            self.occurrence.append(seen[name])
            seen[name] += 1

    def row(self, sample: int) -> Row:
        """One window of L + 1 tokens."""
        name, length = self.order[sample], self.length
        setting, stream, starts = self.settings[name], [], set()
        learned = self.learned.get(name)
        for document in self.texts[name]:
            starts.add(len(stream))
            stream += document
        shifted = setting["shift_windows"]
        windows = max(len(stream) - (length if shifted else 1), 0) // length
        used = windows if setting["unique_tokens"] is None else setting["unique_tokens"] // length
        epoch, place = divmod(self.occurrence[sample], used)
        window = permuted(place, used, keys(self.seed, "window", name, epoch))
        if used < windows:
            window = permuted(window, windows, keys(self.seed, "subset", name))
        first = window * length + (keys(self.seed, "shift", name, epoch)[0] % length if shifted else 0)
        inside = sorted(start - first for start in starts if first <= start <= first + length)
        padding = [place for place in inside if place and (place == length or place + 1 in inside)]
        packed = padding if name in self.packed else []
        counts = [True] * (length + 1) if learned is None else learned[first : first + length + 1]
        return Row(self.names.index(name), stream[first : first + length + 1], inside, packed, counts)

    def step(self, first: int, batch: int, micro: int, rank: int, ranks: int) -> list[list[list[Row]]]:
        """Micro-batches of sequences of windows, of one rank."""
        key, own = keys(self.seed, "step", first), keys(self.seed, "sequence")
        found = []
        for start in range(0, batch, micro * ranks):
            slots = range(start + rank * micro, start + (rank + 1) * micro)
            sequences = []
            for slot in slots:
                begin = first + permuted(slot, batch, key) * self.number
                samples = range(begin, begin + self.number)
                if self.number > 1:
                    samples = sorted(samples, key=lambda sample: keyed_hash(sample, own))  # type: ignore[assignment]
                sequences.append([self.row(sample) for sample in samples])
            found.append(sequences)
        return found


# ---- what it is held against


def drawn(draw: random.Random, folder: Path) -> tuple[dict[str, Any], dict[str, list[list[int]]]]:
    """A configuration and the documents of its sources, which are written."""
    number = draw.choice((1, 1, 2, 3))
    length = draw.choice((4, 7, 16))
    micro = draw.choice((1, 2))
    ranks = draw.choice((1, 2, 3))
    names = ["web", "qa", "book"][: draw.randint(1, 3)]
    content: dict[str, Any] = {
        "model": {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1, "vocab_size": VOCABULARY},
        "train": {
            "steps": 4,
            "global_batch_size": micro * ranks * draw.randint(1, 3),
            "micro_batch_size": micro,
            "sequence_length": length * number,
            "seed": draw.randrange(2**40),
        },
        "data": {
            "windows_per_sequence": number,
            "document_masks": draw.random() < 0.7,
            "eod_mask_loss": draw.random() < 0.7,
            "memory_map": draw.random() < 0.7,
            "phases": [],
            "sources": {},
        },
        "ranks": ranks,
        "learned": {},
    }
    data, texts = content["data"], {}
    for name in names:
        documents = [[draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 30))] for _ in range(draw.randint(12, 25))]
        texts[name] = documents
        tokens = sum(map(len, documents))
        packed, bare = draw.random() < 0.3, draw.random() < 0.2
        setting: dict[str, Any] = {"path": str(folder / name), "ratio": None, "max_epochs": float("inf")}
        setting["shift_windows"] = not packed and draw.random() < 0.3 and tokens >= 3 * length
        limited = not setting["shift_windows"] and draw.random() < 0.3
        setting["unique_tokens"] = draw.randint(length, (tokens - 1) // length * length) if limited else None
        data["sources"][name] = setting
        learned = None
        if draw.random() < 0.3 and (packed or not bare):  # some stretches are learned, some not
            learned = [draw.random() < 0.5 for _ in range(draw.randint(1, 8))]
            learned = [one for one in learned for _ in range(tokens // len(learned) + 1)][:tokens]
            flips = set(draw.sample(range(tokens), tokens // 9))
            learned = content["learned"][name] = [one != (at in flips) for at, one in enumerate(learned)]
        write(folder / name, documents, draw, length if packed else None, learned=learned)
        if bare and not packed:
            write(folder / name, documents, random.Random(0), None, shards=1)
            setting["path"] = str(folder / name / "shard-00000")
    if draw.random() < 0.4:
        ends = sorted(draw.sample(range(3 * length, 60 * length), draw.randint(1, 2)))
        if len(ends) == 2 and ends[1] - ends[0] < 2 * length:
            ends.pop()
        data["phases"] = [{"until": end, "ratios": shares(draw, names)} for end in ends] + [{"ratios": shares(draw, names)}]
    else:
        for name, ratio in shares(draw, names).items():
            data["sources"][name]["ratio"] = ratio
    return content, texts


def shares(draw: random.Random, names: list[str]) -> dict[str, str]:
    """Exact ratios that sum to 1."""
    weights = [draw.randint(1, 9) for _ in names]
    return {name: str(Fraction(weight, sum(weights))) for name, weight in zip(names, weights, strict=True)}


def write(
    folder: Path,
    documents: list[list[int]],
    draw: random.Random,
    packed: int | None,
    shards: int | None = None,
    learned: list[bool] | None = None,
) -> None:
    """A prepared source whose documents lie in one to three shards."""
    folder.mkdir(exist_ok=True)
    edges = sorted(draw.sample(range(1, len(documents)), (shards or draw.randint(1, 3)) - 1))
    infos = []
    for number, (first, last) in enumerate(zip([0, *edges], [*edges, len(documents)], strict=True)):
        part = documents[first:last]
        writer = ShardWriter(folder / f"shard-{number:05d}", np.dtype(np.uint16))
        writer.add(np.concatenate(part).astype(np.uint16), np.array([*map(len, part)], np.int32))
        info = ShardInfo(name=f"shard-{number:05d}", **vars(writer.finish()))
        if learned is not None:
            begin = sum(map(len, documents[:first]))
            info = with_mask(folder, info, np.array(learned[begin : begin + info.tokens]))
        infos.append(info)
    Manifest(
        name=folder.name,
        kind="other",
        generator=None,
        split="train",
        dtype="uint16",
        tokenizer=TokenizerInfo(path="../tokenizer.json", fingerprint="f" * 64, vocab_size=VOCABULARY, eod_id=0),
        counts=Counts(documents=len(documents), tokens=sum(map(len, documents)), text_bytes=1),
        packing=packed and PackingInfo(sequence_length=packed, padding_tokens=0, cut_documents=0, cut_without=0),
        shards=tuple(infos),
        made=Provenance(program="tests", config_digest="0" * 64, inputs={}, holdout="0"),
    ).save(folder)


def check(
    batch: TensorBatch, expected: list[list[Row]], length: int, masks: bool, loss: bool, packed: bool, masked: bool
) -> None:
    """Hold what a model is given against the rows that it must be."""
    rows = [row for sequence in expected for row in sequence]
    wide = (len(expected), -1)
    assert batch.sources.tolist() == [row.source for row in rows]
    assert batch.weights.tolist() == [1.0] * len(rows)
    assert torch.equal(batch.inputs, torch.tensor([row.tokens[:-1] for row in rows]).reshape(wide))
    assert torch.equal(batch.labels, torch.tensor([row.tokens[1:] for row in rows]).reshape(wide))
    positions, edges, counted = [], [0], []
    for number, row in enumerate(rows):
        begins = sorted({0, *(start for start in row.starts if start < length)})
        edges += [number * length + begin for begin in begins if number or begin]
        positions += [place - max(begin for begin in begins if begin <= place) for place in range(length)]
        out = row.starts if loss else row.padding
        counted += [place + 1 not in out and row.learned[place + 1] for place in range(length)]
    assert (batch.documents is not None) == masks and (batch.loss_mask is not None) == (loss or packed or masked)
    if batch.documents is not None:
        assert batch.documents.cu_seqlens.tolist() == [*edges, len(rows) * length]
        assert batch.documents.position_ids.flatten().tolist() == positions
    if batch.loss_mask is not None:
        assert batch.loss_mask.flatten().tolist() == counted


@pytest.mark.parametrize("part", range(4))
def test_what_reaches_the_loss_is_what_the_reference_says(part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "LOOK_AHEAD_ROWS", 64)  # steps of these runs are small: several tables, and none too long
    for number in range(50 * part, 50 * part + 50):
        draw = random.Random(number)
        folder = tmp_path / str(number)
        folder.mkdir()
        content, texts = drawn(draw, folder)
        ranks = content.pop("ranks")
        reference = Reference(content, texts)
        del content["learned"]
        progress = Progress()
        # a start, and a resume with another batch size and another number of ranks
        for attempt in range(2):
            if attempt:
                ranks = draw.choice((1, 2, 3))
                content["train"]["global_batch_size"] = content["train"]["micro_batch_size"] * ranks * draw.randint(1, 3)
                content["train"]["steps"] = progress.step + 3
            progress = run(content, reference, progress, ranks, read_ahead=number % 5 == 0)


def run(content: dict[str, Any], reference: Reference, progress: Progress, ranks: int, *, read_ahead: bool) -> Progress:
    """All steps of one start, on every rank; where it ends."""
    config = Config.model_validate(content)
    data = open_data(config, check_length=False)
    data.check_length(config, progress)
    masks, loss = config.data.document_masks, config.data.eod_mask_loss
    end, learned = progress, np.zeros(len(data.sources), np.int64)
    for rank in range(ranks):
        place: Any = SimpleNamespace(device=torch.device("cpu"), data_rank=rank, needs_tokens=True)
        layout: Any = SimpleNamespace(data=ranks)
        end = progress
        with prefetcher_of(config, layout, place, data, progress, read_ahead=read_ahead) as prefetcher:
            while end.step < config.train.steps:
                batches = prefetcher.step(end.samples)
                size, micro = config.train.global_batch_size, config.train.micro_batch_size
                expected = reference.step(end.samples, size, micro, rank, ranks)
                for batch, wanted in zip(batches, expected, strict=True):
                    held = to_device(batch, place.device, config.data)
                    check(held, wanted, reference.length, masks, loss, bool(reference.packed), bool(reference.learned))
                    np.add.at(learned, held.sources.numpy(), labels_that_count(held).sum(dim=1).numpy())
                end = Progress(end.step + 1, end.samples + config.samples_of_step(end.step))
    assert end.samples == config.samples_at_end(progress)
    middle, length = (progress.samples + end.samples) // 2, reference.length
    ranges = [(progress.samples, middle), (middle, end.samples)]
    counted = learned_labels(data.plan, data.sources, ranges, length, eod_mask_loss=loss)
    assert counted.tolist() == learned.tolist()
    return end
