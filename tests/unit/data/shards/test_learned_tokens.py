"""Files of learned tokens: what was written is read, in every way, and what is damaged is found before it is used."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.config.expression import parse
from megatron_synth.data.loading.loader import Loader
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
from megatron_synth.data.shards import native
from megatron_synth.data.shards.checksums import BlockChecker, verify
from megatron_synth.data.shards.learned import SUFFIX, LearnedFile, LearnedWriter, mask_bytes
from megatron_synth.data.shards.manifest import Manifest
from megatron_synth.data.shards.selection import select
from megatron_synth.data.shards.source import Source, open_source
from megatron_synth.data.staging.copies import stage
from tests.support import with_columns, with_masks, write_source

LENGTH = 64
HALVES = (Fraction(1, 2), Fraction(1, 2))


def masked(folder: Path, seed: int, tokens: int = 8_000, shards: int = 3) -> Path:
    write_source(folder, seed, tokens, shards=shards)
    return with_masks(folder, seed)


def learned_of(source: Source) -> np.ndarray:
    """Of each token of a source, read the plain way."""
    infos = source.manifest.shards
    files = [np.fromfile(source.path / f"{info.name}{SUFFIX}", np.uint8) for info in infos]
    return np.concatenate(
        [np.unpackbits(bits, bitorder="little")[: info.tokens] for bits, info in zip(files, infos, strict=True)]
    )


def batches_of(source: Source, steps: int = 20, **options: object) -> list[tuple[int, np.ndarray]]:
    """Window and mask of many rows."""
    plan = MixturePlan([SourceSpec(source.name, Fraction(1), source.num_windows(LENGTH), 100.0)], 5)
    shape = {"sequence_length": LENGTH, "micro_batch_size": 3, "data_parallel_rank": 0, "data_parallel_size": 1}
    loader = Loader(plan, [source], **shape, **options)
    rows = [
        (int(window), mask)
        for step in range(steps)
        for batch in loader.micro_batches(6 * step, 6)
        for window, mask in zip(plan.places(batch.samples)[1], batch.learned, strict=True)
    ]
    assert len(rows) == 6 * steps
    return rows


@pytest.mark.parametrize("way", ["compiled", "numpy", "calls", "blocks"])
def test_masks_of_batches_are_those_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "numpy":
        monkeypatch.setattr(native, "library", lambda: None)
    source = open_source(masked(tmp_path / "s", 3), "s", memory_map=way in ("compiled", "numpy"))
    if way == "blocks":
        source.check_before_reading(BlockChecker(source.path, source.manifest).check)
    expected = learned_of(source)
    assert source.manifest.learned_tokens == expected.sum() < source.num_tokens
    for window, mask in batches_of(source):
        assert mask.tolist() == expected[window * LENGTH + 1 : (window + 1) * LENGTH + 1].astype(bool).tolist()


@pytest.mark.parametrize("memory_map", [True, False])
def test_any_stretch_is_read(tmp_path: Path, memory_map: bool) -> None:
    generator = np.random.default_rng(0)
    for tokens in (1, 7, 8, 9, 64, 1_000):
        learned = generator.random(tokens) < 0.5
        writer = LearnedWriter(tmp_path / f"x{SUFFIX}")
        for part in np.array_split(learned, 7):
            writer.add(part)
        _, found = writer.finish()
        assert found == learned.sum() and (tmp_path / f"x{SUFFIX}").stat().st_size == mask_bytes(tokens)
        file = LearnedFile(tmp_path / f"x{SUFFIX}", tokens, memory_map=memory_map)
        for begin in range(0, tokens, 1 + tokens // 50):
            out = np.empty(tokens - begin, np.bool_)
            file.read(begin, out)
            assert out.tolist() == learned[begin:].tolist()


def test_a_file_that_ends_with_its_page_is_read_no_further(tmp_path: Path) -> None:
    """32,768 tokens are one page of bits: a read beyond it would end the process."""
    folder = masked(tmp_path / "s", 4, 32_768, shards=1)
    assert (folder / f"shard-00000{SUFFIX}").stat().st_size == 4096
    source = open_source(folder, "s")
    expected = learned_of(source)
    rows = batches_of(source, steps=90)
    assert max(window for window, _ in rows) == source.num_windows(LENGTH) - 1
    for window, mask in rows:
        assert mask.tolist() == expected[window * LENGTH + 1 : (window + 1) * LENGTH + 1].astype(bool).tolist()


def test_sources_with_and_without_masks_share_batches(tmp_path: Path) -> None:
    sources = [open_source(masked(tmp_path / "a", 1), "a"), open_source(write_source(tmp_path / "b", 2, 5_000), "b")]
    ratios = [SourceSpec(one.name, ratio, one.num_windows(LENGTH), 100.0) for one, ratio in zip(sources, HALVES, strict=True)]
    plan, expected = MixturePlan(ratios, 5), learned_of(sources[0])
    loader = Loader(plan, sources, sequence_length=LENGTH, micro_batch_size=4, data_parallel_rank=0, data_parallel_size=1)
    for batch in loader.micro_batches(0, 64):
        ids, windows, _ = plan.places(batch.samples)
        for source_id, window, mask in zip(ids, windows, batch.learned, strict=True):
            own = expected[window * LENGTH + 1 : (window + 1) * LENGTH + 1].astype(bool)
            assert mask.all() if source_id else (mask == own).all()


def test_chosen_documents_keep_their_masks(tmp_path: Path) -> None:
    folder = with_masks(with_columns(tmp_path / "s", 5, 8_000), 5)
    source = open_source(folder, "s")
    chosen = select(source, parse("kind == 'qa'"), tmp_path / "cache", "w")
    whole = learned_of(source)
    expected = np.concatenate(
        [
            whole[at : at + count]
            for _, shard, begin, count in chosen.pieces(0, chosen.num_tokens)
            for at in [source.first_token(shard) + begin]
        ]
    )
    for window, mask in batches_of(chosen):
        assert (mask == expected[window * LENGTH + 1 : (window + 1) * LENGTH + 1]).all()
    copy, out = pickle.loads(pickle.dumps(chosen)), np.empty(300, np.bool_)
    copy.read_learned(50, out)
    assert (out == expected[50:350]).all()


def test_damage_is_found_before_it_is_used(tmp_path: Path) -> None:
    folder = masked(tmp_path / "s", 3)
    file = folder / f"shard-00001{SUFFIX}"
    sound = file.read_bytes()
    assert not verify([folder], workers=1).faults
    file.write_bytes(sound[:20] + bytes([sound[20] ^ 1]) + sound[21:])
    (fault,) = verify([folder], workers=1).faults
    assert fault.file == str(file) and "altered: its checksum is not the manifest's" in str(fault)
    source = open_source(folder, "s", memory_map=False)
    source.check_before_reading(BlockChecker(source.path, source.manifest).check)
    with pytest.raises(UserError, match=r"shard-00001.learned: altered"):
        batches_of(source)
    with pytest.raises(UserError, match=r"shard-00001.learned: altered"):
        stage(folder, tmp_path / "disk")
    for damaged in (sound[:-1], sound + b"\0", b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"shard-00001.learned: manifest.json announces"):
            open_source(folder, "s")
    file.unlink()
    with pytest.raises(UserError, match=r"shard-00001.learned: No such file"):
        open_source(folder, "s")


@pytest.mark.parametrize("memory_map", [True, False])
def test_a_file_that_is_cut_off_while_in_use_is_named(tmp_path: Path, memory_map: bool) -> None:
    if memory_map and native.library() is None:
        pytest.skip("needs the compiled functions")
    folder = masked(tmp_path / "s", 4, 400_000, shards=1)
    source = open_source(folder, "s", memory_map=memory_map)
    batches_of(source, steps=1)
    os.truncate(folder / f"shard-00000{SUFFIX}", 0)
    with pytest.raises(UserError, match=r"shard-00000.learned: "):
        batches_of(source, steps=100)


def test_a_file_that_lies_is_refused_by_verify(tmp_path: Path) -> None:
    """Bits after the last token, and a number of learned tokens that is another."""
    folder = masked(tmp_path / "s", 3, 1_001, shards=1)
    sound = json.loads((folder / "manifest.json").read_text())
    content = bytearray((folder / f"shard-00000{SUFFIX}").read_bytes())
    content[-1] |= 0x80
    (folder / f"shard-00000{SUFFIX}").write_bytes(content)
    shard = sound["shards"][0]
    shard |= {"learned_sha256": hashlib.sha256(content).hexdigest(), "learned_tokens": shard["learned_tokens"] + 1}
    (folder / "manifest.json").write_text(json.dumps(sound))
    (fault,) = verify([folder], workers=1).faults
    assert "learned tokens of 1001" in str(fault)


def test_a_manifest_whose_masks_do_not_fit_is_refused(tmp_path: Path) -> None:
    folder = masked(tmp_path / "s", 3, 3_000, shards=2)
    sound = json.loads((folder / "manifest.json").read_text())
    for change in (
        lambda shards: shards[0].update(learned_tokens=10**6),
        lambda shards: shards[0].update(learned_tokens=-1),
        lambda shards: shards[0].update(learned_tokens="x"),
        lambda shards: shards[0].pop("learned_sha256"),
        lambda shards: [shards[1].pop(key) for key in ("learned_tokens", "learned_sha256")],
    ):
        data = json.loads(json.dumps(sound))
        change(data["shards"])
        (folder / "manifest.json").write_text(json.dumps(data))
        with pytest.raises(UserError, match=r"manifest.json"):
            open_source(folder, "s")


def test_another_mask_is_another_source(tmp_path: Path) -> None:
    plain = write_source(tmp_path / "s", 3, 3_000)
    before = Manifest.load(plain).digest()
    one = Manifest.load(with_masks(plain, 1)).digest()
    two = Manifest.load(with_masks(plain, 2)).digest()
    assert len({before, one, two}) == 3


def test_megatron_reads_the_pair_beside_a_mask(tmp_path: Path) -> None:
    source = open_source(masked(tmp_path / "s", 3), "s")
    files = sorted(path.name for path in source.path.iterdir())
    assert [name for name in files if name.startswith("shard-00000")] == [
        "shard-00000.bin",
        "shard-00000.idx",
        "shard-00000.learned",
    ]
    bare = open_source(tmp_path / "s" / "shard-00000", "bare")
    first, second = np.empty(500, np.int64), np.empty(500, np.int64)
    source.read(0, first)
    bare.read(0, second)
    assert (first == second).all() and not bare.masked
