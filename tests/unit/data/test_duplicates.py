"""Shared documents and n-grams against brute force on small sources."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_synth.cli.main import main as cli_main
from megatron_synth.cli.prepare import duplicates as prepare_duplicates
from megatron_synth.cluster import slurm
from megatron_synth.config.errors import UserError
from megatron_synth.data.overlap import contamination, minhash, ngrams
from megatron_synth.data.overlap.minhash import find_duplicates
from megatron_synth.data.overlap.ngrams import Batch, hashes
from megatron_synth.data.shards.indexed import ShardWriter
from megatron_synth.data.shards.manifest import (
    Counts,
    Manifest,
    PackingInfo,
    Provenance,
    ShardInfo,
    TokenizerInfo,
)

EOD = 0


def make(folder, documents, split="train", fingerprint="f" * 64, per_shard=7):
    """A source of documents, lists of tokens without the end-of-document token."""
    folder.mkdir(parents=True)
    infos = []
    for number, first in enumerate(range(0, len(documents), per_shard)):
        writer = ShardWriter(folder / f"shard-{number:05d}", np.dtype(np.uint16))
        for tokens in documents[first : first + per_shard]:
            writer.add(np.array([*tokens, EOD], np.uint16), np.array([len(tokens) + 1]))
        infos.append(ShardInfo(name=f"shard-{number:05d}", **vars(writer.finish())))
    Manifest(
        name=folder.name,
        kind="natural",
        generator=None,
        split=split,
        dtype="uint16",
        tokenizer=TokenizerInfo(path="../tokenizer.json", fingerprint=fingerprint, vocab_size=60_000, eod_id=EOD),
        counts=Counts(documents=len(documents), tokens=sum(map(len, documents)) + len(documents), text_bytes=1),
        shards=tuple(infos),
        made=Provenance(program="test", config_digest="0" * 64, inputs={}, holdout="0"),
    ).save(folder)
    return folder


def random_documents(seed, count, length=300):
    random = np.random.default_rng(seed)
    return [random.integers(1, 60_000, length).tolist() for _ in range(count)]


def shared(report):
    return {(one.source, one.other): (one.exact, one.near) for one in report.shared}


@settings(deadline=None, max_examples=60)
@given(
    documents=st.lists(st.lists(st.integers(1, 5), max_size=30), min_size=1, max_size=6),
    size=st.integers(1, 17),
)
def test_equal_ngrams_have_equal_hashes_and_others_do_not(documents, size):
    tokens = np.concatenate([[*document, EOD] for document in documents]).astype(np.uint16)
    stops = np.cumsum([len(document) + 1 for document in documents])
    starts = np.concatenate([[0], stops[:-1]])
    values, rows = hashes(Batch(0, tokens, starts, stops - 1), size)
    expected = [
        (row, tuple(document[at : at + size]))
        for row, document in enumerate(documents)
        for at in range(len(document) - size + 1)
    ]
    assert rows.tolist() == [row for row, _ in expected]
    by_gram = {}
    for value, (_, gram) in zip(values.tolist(), expected, strict=True):
        assert by_gram.setdefault(gram, value) == value
    assert len(set(by_gram.values())) == len(by_gram)


def test_exact_duplicates_within_and_between_sources(tmp_path, monkeypatch):
    a, b = random_documents(1, 30), random_documents(2, 20)
    web = [*a, a[3], a[3], a[5]]
    book = [*b, a[5], a[7], b[0]]
    folders = [make(tmp_path / "web", web), make(tmp_path / "book", book)]
    for partition in (2**20, 64):  # records in one file, in many
        monkeypatch.setattr(minhash, "PARTITION_BYTES", partition)
        report = find_duplicates(folders)
        found = shared(report)
        assert found["web", "web"] == (5, 5)  # three of a[3], two of a[5]
        assert found["book", "book"] == (2, 2)
        assert found["web", "book"] == (3, 3)  # two of a[5], a[7]
        assert found["book", "web"] == (2, 2)
        assert report.redundant == 2 + 1 + 1 + 1 + 1
        assert report.sources == {"web": 33, "book": 23}


def test_near_duplicates_follow_the_similarity(tmp_path):
    """A document with a share of tokens replaced at its end: Jaccard is (1 - s) / (1 + s)."""
    base = random_documents(3, 200, 400)
    other = random_documents(4, 200, 400)
    for share, expected in ((0.02, (0.97, 1.0)), (0.4, (0.0, 0.02))):
        cut = int(400 * (1 - share))
        changed = [one[:cut] + two[cut:] for one, two in zip(base, other, strict=True)]
        folder = tmp_path / str(share)
        found = shared(find_duplicates([make(folder / "a", base), make(folder / "b", changed)]))
        for pair in (("a", "b"), ("b", "a")):
            assert found[pair][0] == 0
            assert expected[0] <= found[pair][1] / 200 <= expected[1]
        assert found["a", "a"] == (0, 0)


def test_short_documents_are_no_near_duplicates_of_each_other(tmp_path):
    folder = make(tmp_path / "a", [[1, 2], [3, 4], [], [5]])
    assert shared(find_duplicates([folder])) == {("a", "a"): (0, 0)}


@pytest.mark.parametrize("limit", [2**20, 100, 3])
def test_contamination_equals_brute_force(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(contamination, "VALIDATION_NGRAMS", limit)
    monkeypatch.setattr(ngrams, "BATCH_TOKENS", 1000)
    monkeypatch.setattr(ngrams, "BATCH_DOCUMENTS", limit)
    train, other, valid = random_documents(5, 40), random_documents(6, 10), random_documents(7, 12)
    valid[0] = train[2][10:30] + valid[0]  # eight 13-grams
    valid[1] = train[4][:200] + valid[1][:100]  # more than half
    valid[2] = train[5][50:62] + valid[2]  # twelve tokens: one too few
    valid[3] = train[6][-6:] + train[7][:7] + valid[3]  # across a border of documents
    valid[4] = [7, 8, 9]  # too short
    valid[5] = other[0]
    folders = [
        make(tmp_path / "train", train),
        make(tmp_path / "other", other),
        make(tmp_path / "valid", valid, split="validation"),
    ]
    report = find_duplicates(folders)
    found = {(one.validation, one.training): one for one in report.contamination}
    assert found.keys() == {("valid", "train"), ("valid", "other")}
    for name, documents in (("train", train), ("other", other)):
        grams = {tuple(one[at : at + 13]) for one in documents for at in range(len(one) - 12)}
        hits = [[tuple(one[at : at + 13]) in grams for at in range(len(one) - 12)] for one in valid if len(one) >= 13]
        one = found["valid", name]
        assert one.documents == 11
        assert one.any == sum(map(any, hits))
        assert one.half == sum(2 * sum(hit) >= len(hit) for hit in hits)
        assert (one.ngrams, one.ngrams_seen) == (sum(map(len, hits)), sum(map(sum, hits)))
    assert (found["valid", "train"].any, found["valid", "train"].half) == (2, 1)
    assert (found["valid", "other"].any, found["valid", "other"].half) == (1, 1)


def test_sources_of_different_tokenizers_are_refused(tmp_path):
    folders = [make(tmp_path / "a", [[1]]), make(tmp_path / "b", [[1]], fingerprint="e" * 64)]
    with pytest.raises(UserError, match=r"b/manifest\.json: made with another tokenizer than .*/a"):
        find_duplicates(folders)


def test_the_verb_prints_a_table_and_writes_json(tmp_path, capsys):
    documents = random_documents(8, 10)
    make(tmp_path / "out" / "web", [*documents, documents[0]])
    make(tmp_path / "out" / "valid", documents[:3], split="validation")
    assert prepare_duplicates.main([str(tmp_path / "out"), "--json", str(tmp_path / "r.json")]) == 0
    printed = capsys.readouterr().out
    assert "itself, again" in printed and "2 (18.18 %)" in printed
    assert "3 (100.00 %)" in printed and "4 documents to remove" in printed
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["redundant"] == 4 and data["contamination"][0]["any"] == 3
    with pytest.raises(UserError, match="--threshold: expected a number above 0"):
        prepare_duplicates.main([str(tmp_path / "out"), "--threshold", "0"])


def test_packed_sources_are_compared_without_their_padding(tmp_path):
    """Padding is no text, and there are more entries in the index than documents."""
    folder = make(tmp_path / "a", [*random_documents(1, 3), *[[]] * 5, *random_documents(1, 2)], per_shard=100)
    manifest = Manifest.load(folder)
    packing = PackingInfo(sequence_length=300, padding_tokens=5, cut_documents=0, cut_without=0)
    counts = manifest.counts.model_copy(update={"documents": 4})
    manifest.model_copy(update={"packing": packing, "counts": counts}).save(folder)
    report = find_duplicates([folder])
    assert report.sources == {"a": 5} and report.redundant == 2
    assert shared(report) == {("a", "a"): (4, 4)}


def in_shares(folders, work, number, *more):
    arguments = [*map(str, folders), "--work", str(work), *more]
    for share in range(number):
        assert cli_main(["prepare", "duplicates", *arguments, "--share", f"{share}/{number}"]) == 0
    assert cli_main(["prepare", "duplicates", *arguments, "--json", str(work / "report.json")]) == 0
    return (work / "report.json").read_bytes()


def test_the_report_s_bytes_are_equal_for_any_number_of_shares(tmp_path, monkeypatch, capsys):
    """Also for one process without shares, and where the last command does those that are lacking."""
    base = random_documents(7, 60, 120)
    near = [[*document[:-1], 9] for document in base[:20]]
    folders = [make(tmp_path / "a", base + base[:5]), make(tmp_path / "b", near + base[50:] + random_documents(8, 9))]
    folders.append(make(tmp_path / "v", [base[3][:90] + base[4][:40], *random_documents(9, 5)], split="validation"))
    monkeypatch.setattr(contamination, "VALIDATION_NGRAMS", 200)
    monkeypatch.setattr(contamination, "FILTER_BITS", 10)
    alone = tmp_path / "alone.json"
    assert cli_main(["prepare", "duplicates", *map(str, folders), "--json", str(alone)]) == 0
    report = json.loads(alone.read_bytes())
    assert report["redundant"] > 10 and report["contamination"][0]["any"] == 1
    assert any(one["near"] >= 20 for one in report["shared"])
    for number in (1, 2, 5, 40):  # 40: more than shards
        assert in_shares(folders, tmp_path / f"work-{number}", number) == alone.read_bytes(), number
    work = tmp_path / "work-5"
    shutil.rmtree(work / "share-00003-of-00005")  # as if its task had been killed
    (work / ".share-00003-of-00005.abc").mkdir()
    (work / "share-notes-of-lunch").mkdir()  # somebody's own
    assert cli_main(["prepare", "duplicates", *map(str, folders), "--work", str(work), "--json", str(alone)]) == 0
    assert alone.read_bytes() == (work / "report.json").read_bytes()
    assert "share 3/5 was there" not in capsys.readouterr().out


def test_work_of_others_is_refused(tmp_path, capsys):
    folders, work = [make(tmp_path / "a", random_documents(1, 9))], tmp_path / "work"
    in_shares(folders, work, 2)
    for arguments, message in (
        ((*folders, "--ngram", "9", "--work", work), "plan.json: of other sources or settings"),
        ((make(tmp_path / "b", random_documents(2, 9)), "--work", work), "plan.json: of other sources or settings"),
        ((*folders, "--share", "0/2"), "--share: where do shares put what they gather"),
        ((*folders, "--work", tmp_path / "none"), "expected shares of one number, found none"),
    ):
        assert cli_main(["prepare", "duplicates", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    signatures = work / "share-00001-of-00002" / "signatures"
    signatures.write_bytes(signatures.read_bytes()[:-1])
    assert cli_main(["prepare", "duplicates", str(folders[0]), "--work", str(work)]) == 2
    assert "share-00001-of-00002/signatures: cut off" in capsys.readouterr().err
    in_shares(folders, work / "again", 3)
    (work / "share-00000-of-00003").mkdir()
    assert cli_main(["prepare", "duplicates", str(folders[0]), "--work", str(work)]) == 2
    assert "expected shares of one number, found 2, 3" in capsys.readouterr().err


def test_a_dry_run_shows_the_array_and_the_comparison(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(slurm, "available", lambda: False)
    folder = make(tmp_path / "a", random_documents(1, 3))
    base = ["prepare", "duplicates", str(folder), "--work", str(tmp_path / "work")]
    assert cli_main([*base, "--slurm", "--tasks", "3", "--partition", "cpu", "--part-mib", "64", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for part in ("--array=0-2", "--partition=cpu", "--share 2/3", "--part-mib 64", f"--json {tmp_path}/work/report.json"):
        assert part in said, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    for more, message in (
        (["--slurm"], "--tasks: say how many shares"),
        (["--tasks", "3"], "--tasks: is for --slurm"),
        (["--slurm", "--tasks", "3", "--share", "0/3"], "--share: not with --slurm"),
        (["--slurm", "--tasks", "100001"], "--tasks: at most 100,000"),
    ):
        assert cli_main([*base, *more]) == 2
        assert message in capsys.readouterr().err
    assert cli_main([*base[:3], "--slurm", "--tasks", "2"]) == 2
    assert "--slurm: where do shares put what they gather" in capsys.readouterr().err
