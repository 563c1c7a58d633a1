"""Columns of documents and `where`: what is chosen, held against a plain loop over the documents."""

from __future__ import annotations

import json
import math
import pickle
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.config.expression import parse
from megatron_synth.data.loading import shared_content
from megatron_synth.data.loading.loader import Loader
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec, windows_in
from megatron_synth.data.shards import native, places
from megatron_synth.data.shards.checksums import BlockChecker, verify
from megatron_synth.data.shards.columns import SUFFIX, text_id
from megatron_synth.data.shards.indexed import ShardWriter
from megatron_synth.data.shards.manifest import ShardInfo
from megatron_synth.data.shards.selection import SelectedSource, select, shared_tokens
from megatron_synth.data.shards.source import Source, open_source
from megatron_synth.data.staging.copies import stage
from tests.support import with_columns
from tests.unit.data.mixing.test_apportionment import largest_deviation

LENGTH = 64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return with_columns(tmp_path_factory.mktemp("corpus") / "web", 5)


def documents_of(source: Source) -> list[tuple[np.ndarray, dict]]:
    """Every document with its tokens and values, None where it has none: read the plain way."""
    columns = {column.name: source.column(column.name) for column in source.columns}
    found = []
    for number in range(len(source.manifest.shards)):
        shard = source.shard(number)
        edges = np.append(shard.document_starts(0, shard.num_tokens), shard.num_tokens)
        for place, (begin, end) in enumerate(pairwise(edges.tolist())):
            values = {}
            for name, (column, of_shards) in columns.items():
                value = of_shards[number][place]
                missing = bool(column.is_missing(of_shards[number])[place])
                shown = column.categories[value] if column.type == "category" and not missing else value.item()
                values[name] = None if missing else shown
            found.append((np.array(shard.tokens[begin:end]), values))
    return found


EXPRESSIONS = {
    "score >= 0.5": lambda d: d["score"] is not None and np.float32(d["score"]) >= np.float32(0.5),
    "0.2 <= score < 0.4": lambda d: d["score"] is not None and 0.2 <= d["score"] < 0.4,
    "kind == 'qa' and year > 2005": lambda d: d["kind"] == "qa" and d["year"] > 2005,
    "kind != 'qa'": lambda d: d["kind"] is not None and d["kind"] != "qa",
    "not kind == 'qa'": lambda d: d["kind"] != "qa",
    "kind in ('qa', 'code') or score is None": lambda d: d["kind"] in ("qa", "code") or d["score"] is None,
    "kind not in ['qa']": lambda d: d["kind"] not in ("qa", None),
    "kind is not None and (year < 1995 or year >= 2020)": lambda d: d["kind"] and not 1995 <= d["year"] < 2020,
    "parent == '3'": lambda d: d["parent"] == text_id("3"),
    "parent in ('3', 5)": lambda d: d["parent"] in (text_id("3"), text_id("5")),
    "year == 2000 or kind == 'none of these'": lambda d: d["year"] == 2000,
    "score > -1": lambda d: d["score"] is not None,
}


@pytest.mark.parametrize("text", EXPRESSIONS)
@pytest.mark.parametrize("compiled", [True, False])
def test_a_choice_is_a_plain_loop_over_the_documents(corpus, tmp_path, monkeypatch, text, compiled):
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    source = open_source(corpus, "web")
    chosen = select(source, parse(text), tmp_path, "data.sources.web.where")
    kept = [tokens for tokens, values in documents_of(source) if EXPRESSIONS[text](values)]
    assert 1 < len(kept) < source.num_documents or text == "score > -1"
    stream = np.concatenate(kept)
    assert (chosen.num_documents, chosen.num_tokens) == (len(kept), stream.size)
    read = np.empty(stream.size, np.int64)
    chosen.read(0, read)
    np.testing.assert_array_equal(read, stream)
    starts = np.cumsum([0, *map(len, kept)])[:-1]
    begins = np.arange(chosen.num_windows(LENGTH)) * LENGTH
    offsets, counts = chosen.document_starts_of(begins, LENGTH)
    expected = [starts[(starts >= begin) & (starts <= begin + LENGTH)] - begin for begin in begins.tolist()]
    np.testing.assert_array_equal(offsets, np.concatenate(expected))
    assert counts.tolist() == list(map(len, expected))


@pytest.mark.parametrize("memory_map", [True, False])
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_the_loader_hands_out_the_stream_of_the_choice(corpus, tmp_path, memory_map, dtype):
    texts = ("kind == 'qa'", "score < 0.3", "year >= 1990")
    sources = []
    for number, text in enumerate(texts):
        source = open_source(corpus, f"s{number}", memory_map=memory_map)
        if not memory_map:
            source.check_before_reading(BlockChecker(source.path, source.manifest).check)
        sources.append(select(source, parse(text), tmp_path, "w"))
    streams = [np.empty(source.num_tokens, np.int64) for source in sources]
    for source, stream in zip(sources, streams, strict=True):
        source.read(0, stream)
    specs = [
        SourceSpec(source.name, ratio, windows_in(source.num_tokens, LENGTH, shifted=shift > 0), math.inf, shift=shift)
        for source, ratio, shift in zip(sources, map(Fraction, ("1/2", "1/3", "1/6")), (0, LENGTH, 0), strict=True)
    ]
    plan = MixturePlan(specs, 7)
    loader = Loader(
        plan,
        sources,
        sequence_length=LENGTH,
        micro_batch_size=4,
        data_parallel_rank=0,
        data_parallel_size=1,
        with_boundaries=True,
        dtype=dtype,
    )
    for step in range(12):
        for batch in loader.micro_batches(step * 16, 16):
            found, windows, offsets = plan.places(batch.samples)
            np.testing.assert_array_equal(found, batch.source_ids)
            for row, (number, window, offset) in enumerate(zip(found, windows, offsets, strict=True)):
                begin = window * LENGTH + offset
                np.testing.assert_array_equal(batch.tokens[row], streams[number][begin : begin + LENGTH + 1])


def test_sixty_four_choices_are_as_exact_as_sources(corpus, tmp_path):
    source_of = {}
    for number in range(64):
        low, high = number / 64, (number + 20) / 64
        text = f"{low} <= score < {high} or year == {1990 + number % 36}"
        source_of[f"s{number}"] = select(open_source(corpus, f"s{number}"), parse(text), tmp_path, "w")
    for seed, most in ((3, 1000), (4, 50), (5, 2)):
        weights = np.random.default_rng(seed).integers(1, most, 64).tolist()
        specs = [
            SourceSpec(name, Fraction(weight, sum(weights)), source.num_windows(LENGTH), math.inf)
            for (name, source), weight in zip(source_of.items(), weights, strict=True)
        ]
        plan, samples = MixturePlan(specs, 11), min(2 * sum(weights), 6_000)
        ids, windows = plan.locate(np.arange(samples))
        assert largest_deviation([spec.ratio for spec in specs], ids) <= 1 - Fraction(1, 2 * 64 - 2)
        assert plan.counts(samples).tolist() == np.bincount(ids, minlength=64).tolist()
        for number, spec in enumerate(specs):  # each epoch shows each window once
            own = windows[ids == number]
            for epoch in range(0, len(own), spec.num_windows):
                assert len(set(own[epoch : epoch + spec.num_windows].tolist())) == len(own[epoch : epoch + spec.num_windows])


def test_an_index_is_made_once_and_made_again_where_it_is_not_what_was_written(corpus, tmp_path):
    def chosen() -> SelectedSource:
        return select(open_source(corpus, "web"), parse("score>=0.5"), tmp_path, "w")

    first = chosen()
    (path,) = tmp_path.iterdir()
    made = path.stat().st_mtime_ns
    # another spelling is the same choice
    again = select(open_source(corpus, "web"), parse("(score >= 0.5)"), tmp_path, "w")
    assert again.digest == first.digest and path.stat().st_mtime_ns == made
    sound = path.read_bytes()
    for damaged in (sound[:-8], sound[:100] + b"\xff" + sound[101:], b"", b"x" * len(sound)):
        path.unlink()
        path.write_bytes(damaged)
        assert chosen().num_tokens == first.num_tokens
        assert path.read_bytes() == sound
    copy = pickle.loads(pickle.dumps(first))
    one, two = np.empty(500, np.int64), np.empty(500, np.int64)
    first.read(70, one)
    copy.read(70, two)
    np.testing.assert_array_equal(one, two)


def test_an_index_with_a_right_checksum_and_wrong_places_is_not_used(corpus, tmp_path):
    import xxhash

    from megatron_synth.data.shards.selection import HEADER, MAGIC

    first = select(open_source(corpus, "web"), parse("score>=0.5"), tmp_path, "w")
    (path,) = tmp_path.iterdir()
    sound = path.read_bytes()
    documents, runs, tokens = first.num_documents, len(first.index.shards), first.num_tokens
    for place, value in ((documents, -1), (documents + runs + 1, 99), (documents + 2 * runs + 1, 2**40), (0, 5)):
        arrays = np.frombuffer(sound[HEADER.size :], np.int64).copy()
        arrays[place] = value
        header = HEADER.pack(MAGIC, xxhash.xxh3_64_intdigest(arrays.tobytes()), documents, runs, tokens)
        path.unlink()
        path.write_bytes(header + arrays.tobytes())
        select(open_source(corpus, "web"), parse("score>=0.5"), tmp_path, "w")
        assert path.read_bytes() == sound


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os')", "expected comparisons"),
        ("score", "expected comparisons"),
        ("score > year", "between a column and a value"),
        ("1 < 2", "between a column and a value"),
        ("score.real > 1", "between a column and a value"),
        ("kind in 'qa'", "expected column in"),
        ("kind in (x for x in y)", "expected column in"),
        ("score > (1).real", "expected a number"),
        ("score > 1 +", "no expression"),
        ("score is 1", "column is None"),
        ("(lambda: 1) == score", "expected a number"),
        ("score == None", "expected a number"),
        ("not " * 2000 + "score > 1", "characters"),
        ("(" * 500 + "score > 1" + ")" * 500, "no expression|nested"),
        ("score > b'x'", "expected a number"),
        ("", "no expression"),
    ],
)
def test_what_is_no_expression_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("language == 'en'", "no column 'language', its columns are: score, year, kind, parent, own"),
        ("score == 'qa'", "holds numbers"),
        ("kind > 'qa'", "no order"),
        ("kind == 0.5", "holds texts"),
        ("year > 3000", "no document of .* is left"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(corpus, tmp_path, text, message):
    with pytest.raises(UserError, match=f"data.sources.web.where: .*{message}"):
        select(open_source(corpus, "web"), parse(text), tmp_path, "data.sources.web.where")


def test_a_folder_that_cannot_be_written_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*set data.cache to another"):
        select(open_source(corpus, "web"), parse("year > 2000"), tmp_path / "file" / "cache", "w")


def test_damaged_columns_are_found_before_they_are_used(tmp_path):
    folder = with_columns(tmp_path / "web", 2, 3_000, shards=1)
    file = folder / f"shard-00000{SUFFIX}"
    sound = file.read_bytes()
    assert not verify([folder], workers=1).faults
    file.write_bytes(sound[:20] + bytes([sound[20] ^ 1]) + sound[21:])
    with pytest.raises(UserError, match=r"shard-00000.columns: altered"):
        select(open_source(folder, "web"), parse("year > 2000"), tmp_path, "w")
    (fault,) = verify([folder], workers=1).faults
    assert "altered" in str(fault) and fault.file == str(file)
    file.write_bytes(sound[:-8])
    with pytest.raises(UserError, match=r"shard-00000.columns: manifest.json announces"):
        open_source(folder, "web")


def test_a_manifest_whose_columns_do_not_fit_is_refused(tmp_path):
    folder = with_columns(tmp_path / "web", 2, 3_000, shards=1)
    file = folder / "manifest.json"
    sound = json.loads(file.read_text())
    for change in (
        lambda data: data["shards"][0].update(columns_bytes=5),
        lambda data: data["shards"][0].pop("columns_sha256"),
        lambda data: data["columns"].append(data["columns"][0]),
        lambda data: data["columns"][0].update(name="__class__"),
        lambda data: data["columns"][2].update(categories=["b", "a", "c"]),
        lambda data: data["columns"][0].update(type="int8"),
        lambda data: data.update(columns=[]),
    ):
        data = json.loads(json.dumps(sound))
        change(data)
        file.write_text(json.dumps(data))
        with pytest.raises(UserError, match=r"manifest.json"):
            open_source(folder, "web")


def test_a_copy_on_another_disk_has_the_columns(corpus, tmp_path):
    copy = open_source(stage(corpus, tmp_path / "disk"), "web")
    original = open_source(corpus, "web")
    text = parse("kind == 'qa'")
    assert select(copy, text, tmp_path, "w").digest == select(original, text, tmp_path, "w").digest


def test_choices_from_one_text_say_what_they_share(corpus, tmp_path):
    def chosen(name: str, text: str) -> SelectedSource:
        return select(open_source(corpus, name), parse(text), tmp_path, "w")

    low, high, all_ = chosen("low", "score < 0.5"), chosen("high", "score >= 0.5"), open_source(corpus, "all")
    wide = chosen("wide", "score >= 0.4")
    assert shared_tokens(low, high) == 0 and shared_content.notes([low, high], {}) == []
    expected = chosen("both", "0.4 <= score < 0.5").num_tokens
    assert shared_tokens(low, wide) == shared_tokens(wide, low) == expected
    (note,) = shared_content.notes([low, wide], {})
    assert f"share {expected:,} tokens" in note
    assert shared_tokens(all_, low) == low.num_tokens
    (note,) = shared_content.notes([low], {"v": wide})
    assert "what is evaluated is trained on" in note


def test_places_name_the_documents_of_a_window(corpus, tmp_path):
    chosen = select(open_source(corpus, "web"), parse("kind == 'qa'"), tmp_path, "w")
    for begin in (0, 1_000, chosen.num_tokens - 200):
        spans = places.spans(chosen, begin, begin + 200)
        read = np.empty(200, np.int64)
        chosen.read(begin, read)
        found = np.concatenate([np.array(span.shard.tokens[span.begin : span.end]) for span in spans])
        np.testing.assert_array_equal(found, read)
        assert "documents" in places.described(chosen, begin, begin + 200)


def test_a_bare_pair_and_a_packed_source_are_refused(tmp_path):
    writer = ShardWriter(tmp_path / "x", np.dtype(np.uint16))
    writer.add(np.arange(50, dtype=np.uint16), np.array([50]))
    ShardInfo(name="x", **vars(writer.finish()))
    with pytest.raises(UserError, match="bare pair without columns"):
        select(open_source(tmp_path / "x", "x"), parse("year > 1"), tmp_path, "w")
