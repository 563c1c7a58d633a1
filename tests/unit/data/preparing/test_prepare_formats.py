"""`prepare` on every input format: the same documents, the same bytes, and each broken file as one clear message."""

import gzip
import os
from fractions import Fraction

import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.data.overlap.minhash import find_duplicates
from megatron_synth.data.preparing import pipeline, shuffle, splits
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.data.preparing.readers.documents import is_held_out
from megatron_synth.data.preparing.readers.files import fingerprint
from megatron_synth.data.shards.manifest import Manifest
from tests.unit.data.preparing.support import SHUFFLED_AND_PACKED, TEXTS, jsonl, stored_texts, tree


def write_format(folder, ending):
    """TEXTS as a file (or data set) of the format; the source that reads it."""
    path = folder / f"web{ending}"
    if ending == ".txt":
        for number, text in enumerate(TEXTS):
            (folder / f"{number:03d}.txt").write_bytes(text.encode())
        return {"input": str(folder / "*.txt")}
    if ending == "lines.txt.gz":
        path.write_bytes(gzip.compress("\n".join(text.replace("\n", " ") for text in TEXTS).encode()))
        return {"input": [str(path)], "text_as": "line"}
    if ending.startswith(".jsonl"):
        data = jsonl(folder / "plain", key="body").read_bytes()
        half = data.index(b"\n", len(data) // 2) + 1
        if ending == ".jsonl.gz":  # two members, as `cat a.gz b.gz` makes
            data = gzip.compress(data[:half]) + gzip.compress(data[half:])
        elif ending == ".jsonl.zst":
            data = zstd(data[:half]) + zstd(data[half:])
        path.write_bytes(data)
        return {"input": str(path), "text_key": "body"}
    if ending == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS}), path, row_group_size=17)
        return {"input": str(path)}
    import datasets

    data = datasets.Dataset.from_dict({"text": TEXTS})
    if ending == "disk-splits":
        datasets.DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(str(path))
        return {"hf": {"path": str(path), "split": "test"}}
    data.save_to_disk(str(path))
    return {"hf": {"path": str(path)}}


def zstd(data):
    import pyarrow

    return pyarrow.compress(data, codec="zstd", asbytes=True)


FORMATS = [".txt", "lines.txt.gz", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", "disk", "disk-splits"]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("ending", FORMATS)
def test_splits_of_any_size_give_the_same_documents(tmp_path, make, tokenizer_path, monkeypatch, ending, shuffled):
    """Cut as finely as can be: a line may straddle two ranges, a file may be streamed, row groups are taken apart."""
    (tmp_path / "in").mkdir()
    source = write_format(tmp_path / "in", ending) | {"holdout": "1/4"}
    shuffle = {"seed": 3} if shuffled else None
    whole = PrepareConfig.model_validate(make(source, shuffle=shuffle, shard_tokens=700).model_dump())
    prepare(whole)
    for size in (1, 100, 1000):
        monkeypatch.setattr(splits, "SPLIT_BYTES", size)
        monkeypatch.setattr(splits, "STREAMED_ABOVE", size)
        monkeypatch.setattr(splits, "STREAMED_BYTES", size)
        monkeypatch.setattr(pipeline, "CHUNK_CHARACTERS", size)
        monkeypatch.setattr(pipeline, "RUN_BYTES", size)
        if shuffled:  # the shuffle depends on the splits; what it holds does not
            prepare(whole, force=True)
            for name in ("web", "web-valid"):
                found = stored_texts(tmp_path / "out" / name, tokenizer_path)
                held = [text for text in expected_texts(ending) if is_held_out(text, Fraction(1, 4)) == (name != "web")]
                assert sorted(found) == sorted(held)
            assert stored_texts(tmp_path / "out" / "web", tokenizer_path) != [
                text for text in expected_texts(ending) if not is_held_out(text, Fraction(1, 4))
            ]
        else:
            before = tree(tmp_path / "out")
            prepare(whole, force=True)
            assert tree(tmp_path / "out") == before


def expected_texts(ending):
    return [text.replace("\n", " ") for text in TEXTS] if "lines" in ending else TEXTS


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_gives_its_documents_in_order(tmp_path, make, tokenizer_path, ending):
    (tmp_path / "in").mkdir()
    config = make(write_format(tmp_path / "in", ending), shard_tokens=700)
    (one,) = prepare(config)
    expected = [text.replace("\n", " ") for text in TEXTS] if "lines" in ending else TEXTS
    assert stored_texts(tmp_path / "out" / "web", tokenizer_path) == expected
    manifest = Manifest.load(tmp_path / "out" / "web")
    assert manifest == one.manifest
    assert manifest.counts.documents == len(TEXTS)
    assert manifest.counts.text_bytes == sum(len(text.encode()) for text in expected)
    assert len(manifest.shards) > 1 and all(shard.tokens <= 700 for shard in manifest.shards)


@pytest.mark.parametrize("order", [{}, SHUFFLED_AND_PACKED])
def test_bytes_do_not_depend_on_the_workers_nor_on_the_place(tmp_path, monkeypatch, order):
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 2000)
    monkeypatch.setattr(pipeline, "CHUNK_CHARACTERS", 500)  # many runs
    monkeypatch.setattr(pipeline, "RUN_BYTES", 400)
    monkeypatch.setattr(splits, "SMALL_SPLIT", 1500)  # many splits, so that they could come out of order
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "web.jsonl")
    for number, workers in enumerate([1, 2, 4]):
        config = PrepareConfig.model_validate(
            {
                "output": f"deep/out{number}",
                "tokenizer": {"train": {"vocab_size": 350}},
                "shard_tokens": 300,
                "sources": {"web": {"kind": "natural", "input": "web.jsonl", "holdout": "1/5"}},
                **order,
            }
        )
        prepare(config, workers=workers)
    trees = [tree(tmp_path / "deep" / f"out{number}") for number in range(3)]
    assert trees[0] == trees[1] == trees[2]
    assert {path.split("/")[0] for path in trees[0]} == {"web", "web-valid", "tokenizer.json", "prepare.json"}
    assert sorted(os.listdir(tmp_path / "deep")) == ["out0", "out1", "out2"]
    reports = [
        find_duplicates([tmp_path / "deep" / f"out{number}" / name for name in ("web", "web-valid")]) for number in (0, 2)
    ]
    assert reports[0] == reports[1]


def test_a_line_number_counts_from_the_start_of_the_file_wherever_the_split_begins(tmp_path, make, monkeypatch):
    monkeypatch.setattr(splits, "SMALL_SPLIT", 400)
    monkeypatch.setattr(splits, "SPLIT_BYTES", 400)
    path = jsonl(tmp_path / "a.jsonl")
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(UserError, match=r"a.jsonl, line 61: broken JSON"):
        prepare(make({"input": str(path)}))


def corrupt(kind, folder):
    """An input file with one fault; the source that reads it."""
    path = folder / f"bad.{'txt' if 'utf8' in kind else 'jsonl'}"
    good = jsonl(folder / "good.jsonl").read_bytes()
    if kind in ("gz", "zst"):
        path = folder / f"bad.jsonl.{kind}"
        path.write_bytes({"gz": gzip.compress, "zst": zstd}[kind](good * 50)[:-20])
    elif kind == "gz-not":
        path = folder / "bad.jsonl.gz"
        path.write_bytes(good)
    elif kind == "parquet":
        path = folder / "bad.parquet"
        path.write_bytes(b"PAR1" + bytes(100))
    else:
        path.write_bytes(
            {
                "utf8": b"fine\nalso fine\nnot \xff fine\n",
                "json": good + b'{"text": \n',
                "key": good + b'{"body": "x"}\n',
                "list": good + b'["x"]\n',
                "type": good + b'{"text": null}\n',
                "surrogate": good + b'{"text": "\\ud800"}\n',
                "empty": b'{"text": ""}\n\n{"text": " "}\n',
            }[kind]
        )
    return {"input": str(path)}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("utf8", r"bad\.txt, line 3: not UTF-8, invalid start byte at byte 4"),
        ("json", r"bad\.jsonl, line 61: broken JSON"),
        ("key", r"bad\.jsonl, line 61: no field 'text', found \['body'\]; set text_key"),
        ("list", r"bad\.jsonl, line 61: no field 'text'"),
        ("type", r"bad\.jsonl, line 61: 'text' holds NoneType, expected text"),
        ("surrogate", r"bad\.jsonl, line 61: not valid Unicode"),
        ("gz", r"bad\.jsonl\.gz: cannot be read after line \d+: Compressed file ended"),
        ("gz-not", r"bad\.jsonl\.gz: cannot be read after line 0: Not a gzipped file"),
        ("zst", r"bad\.jsonl\.zst: cannot be read after line \d+: "),
        ("parquet", r"bad\.parquet: cannot be read after row 0"),
        ("empty", r"sources\.web: no text in .*bad\.jsonl"),
    ],
)
def test_unreadable_text_names_file_and_place(tmp_path, make, kind, message):
    with pytest.raises(UserError, match=message):
        prepare(make(corrupt(kind, tmp_path)))
    assert not (tmp_path / "out").exists()


def test_a_data_set_that_breaks_off_says_after_how_many_records(tmp_path, make, monkeypatch):
    import datasets

    def stream():
        yield {"text": TEXTS[0]}
        yield {"text": TEXTS[1]}
        raise ConnectionError("reset by peer")

    broken = datasets.IterableDataset.from_generator(stream)
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: broken)
    with pytest.raises(UserError, match=r"sources\.web\.hf: reading failed after 2 records: reset by peer"):
        prepare(make({"hf": {"path": "some/corpus"}}))
    assert not list(tmp_path.glob("*out*"))


def test_missing_columns_of_tables_name_what_is_there(tmp_path, make):
    (tmp_path / "in").mkdir()
    for ending in (".parquet", "disk"):
        source = write_format(tmp_path / "in", ending)
        with pytest.raises(UserError, match=r"no column 'body', found .*'text'"):
            prepare(make({**source, "text_key": "body"}))
    with pytest.raises(UserError, match="no split 'x', found"):
        source = write_format(tmp_path / "in", "disk-splits")
        prepare(make({"hf": {**source["hf"], "split": "x"}}))


def test_files_are_told_apart_by_all_of_their_content(tmp_path):
    path = tmp_path / "a.txt"
    found = set()
    for at in (None, 0, 300, 500, 999):
        data = bytearray(1000)
        if at is not None:
            data[at] = 1
        path.write_bytes(data)
        found.add(fingerprint([path]))
    assert len(found) == 5
