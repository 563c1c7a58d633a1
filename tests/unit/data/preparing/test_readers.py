"""Input that is easy to read wrongly or in part: names, links, marks, records; each is read whole or refused."""

import gzip
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import PrepareConfig, PrepareSource
from megatron_synth.data.preparing import pipeline, progress
from megatron_synth.data.preparing import prepare as preparing
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.data.preparing.readers import files
from megatron_synth.data.preparing.readers.files import Files, format_of
from megatron_synth.data.preparing.readers.formats import FileFormat
from megatron_synth.data.preparing.readers.inputs import read_documents, reader_of
from megatron_synth.data.preparing.readers.jsonl import JsonLines
from megatron_synth.data.preparing.readers.parquet import Parquet
from megatron_synth.data.preparing.readers.text import Text
from megatron_synth.data.shards.manifest import Manifest
from megatron_synth.data.tokenizer import train_tokenizer


def source(input_, **settings):
    return PrepareSource.model_validate({"kind": "natural", "input": input_, **settings})


def texts(input_, **settings):
    return [document.text for document, _ in read_documents(reader_of("web", source(str(input_), **settings)))]


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def config_of(folder, sources, **settings):
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        train_tokenizer(["some text to train on"], 270, "<eod>").save(tokenizer)
    defaults = {"output": str(folder / "out"), "tokenizer": {"path": str(tokenizer), "eod": "<eod>"}}
    return PrepareConfig.model_validate({**defaults, "sources": sources, **settings})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", Text), ("a.jsonl.clean.txt", Text), ("a.txt.gz", Text), ("a.jsonl", JsonLines), ("a.txt.jsonl", JsonLines),
        ("a.parquet.jsonl.zst", JsonLines), ("a.parquet", Parquet), ("a.jsonl.parquet", Parquet), ("a.parquet.gz", None),
        ("jsonl", None), ("a.jsonl.bz2", None), ("a.json", None), ("a.gz", None),
    ],
)  # fmt: skip
def test_the_end_of_a_name_decides_the_format(name, kind):
    assert format_of(Path(name)) is kind


def test_a_text_file_is_one_document_whatever_else_is_in_its_name(tmp_path):
    path = tmp_path / "corpus.jsonl.clean.txt"
    path.write_text("the only document, line\n" * 80_000)
    (split,) = Files("web", source(str(path))).splits()
    assert len(split.segments) == 1 and texts(path) == [path.read_text()]


def test_a_new_format_is_one_class(tmp_path, monkeypatch):
    class Upper(Text):
        ending = ".upper"

        def text_of(self, place, line):
            return super().text_of(place, line).upper()

    monkeypatch.setattr(files, "FORMATS", (*files.FORMATS, Upper))
    (tmp_path / "a.upper.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    assert texts(tmp_path / "*.upper.gz", text_as="line") == ["ONE", "TWO"]
    assert issubclass(Upper, FileFormat)


def test_a_file_is_read_once_under_whatever_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    lines(Path("in/a.jsonl"), [{"text": "x"}])
    Path("in/link.jsonl").symlink_to("a.jsonl")
    os.link("in/a.jsonl", "in/hard.jsonl")
    Path("other").symlink_to("in")
    every = source(["in/a.jsonl", f"{tmp_path}/in/a.jsonl", "in/../in/a.jsonl", "in/*.jsonl", "other/*", "**/*.jsonl"])
    assert [document.text for document, _ in read_documents(reader_of("web", every))] == ["x"]


def test_patterns_find_what_glob_finds(tmp_path, monkeypatch):
    import glob

    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b/a.txt", "b/.hidden.txt", "b/c/d.txt", "b/c/[x].txt", ".git/e.txt", "b/c/f.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x")
    (Path("b/c/up")).symlink_to("../..")  # a loop
    for pattern in (
        "*.txt",
        "b/*.txt",
        "*/*.txt",
        "*/*/*.txt",
        "b/c/[!x]*.*",
        "b/.h*.txt",
        "./a.txt",
        f"{tmp_path}/b/c/*.jsonl",
    ):
        found = sorted(map(os.path.realpath, files.find(pattern, "web")))
        assert found == sorted(map(os.path.realpath, glob.glob(pattern))), pattern  # noqa: PTH207 (what ours is held against)
    names = {path.name for path in files.find("**/*.txt", "web")}
    assert names == {"a.txt", "d.txt", "[x].txt"}
    assert {path.name for path in files.find("b/**", "web")} == {"a.txt", "d.txt", "[x].txt", "f.jsonl"}


def test_input_that_cannot_be_reached_is_refused(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    lines(tmp_path / "one" / "a.jsonl", [{"text": "x"}])
    dangling = tmp_path / "one" / "b.jsonl"
    dangling.symlink_to("/nowhere/blob")
    with pytest.raises(UserError, match=r"b\.jsonl: a link to nothing \(/nowhere/blob\)"):
        texts(tmp_path / "one" / "*.jsonl")
    dangling.unlink()
    dangling.mkdir()
    with pytest.raises(UserError, match=r"b\.jsonl: a folder: name its files"):
        texts(tmp_path / "one" / "*.jsonl")
    dangling.rmdir()
    real = os.listdir

    def listdir(folder):
        if Path(folder).name == "two":
            raise PermissionError(13, "Permission denied")
        return real(folder)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "listdir", listdir)
        for pattern in ("*/*.jsonl", "**/*.jsonl", "**"):
            with pytest.raises(UserError, match=r"sources\.web\.input: .*two: Permission denied; every folder"):
                texts(tmp_path / pattern)
        assert texts(tmp_path / "one" / "*.jsonl") == ["x"]

    def forbidden(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", forbidden, raising=False)
        with pytest.raises(UserError, match=r"a\.jsonl: Permission denied; every file"):
            reader_of("web", source(str(tmp_path / "one" / "a.jsonl"))).describe()
    with open(os.fsencode(tmp_path) + b"/one/\xff.jsonl", "w"):
        pass
    with pytest.raises(UserError, match="its name is not UTF-8; rename the file"):
        texts(tmp_path / "one" / "*.jsonl")


@pytest.mark.parametrize("kind", ["plain", "gz"])
def test_a_byte_order_mark_is_no_text(tmp_path, kind):
    def write(name, data):
        path = tmp_path / (name if kind == "plain" else f"{name}.gz")
        path.write_bytes(data if kind == "plain" else gzip.compress(data))
        return path

    mark = b"\xef\xbb\xbf"
    path = write("a.txt", mark + b"hello\nwor" + mark + b"ld\n")
    assert texts(path) == ["hello\nwor\ufeffld\n"]
    assert texts(path, text_as="line") == ["hello", "wor\ufeffld"]
    assert texts(write("b.jsonl", mark + b'{"text": "x"}\n{"text": "y"}\n')) == ["x", "y"]


def test_numbers_of_any_length_are_read_and_deep_nests_are_one_message(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": "y", "id": ' + "1" * 5000 + "}\n")
    assert texts(path) == ["x", "y"]
    path.write_text('{"text": "x"}\n{"text": "y", "m": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: JSON nested too deeply"):
        texts(path)


def test_a_field_or_column_that_is_there_twice_is_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "says \\"text\\" and", "m": {"text": 1, "text": 2}}\n{"text": "a", "id": 1, "text": "b"}\n')
    with pytest.raises(UserError, match=r"line 2: the field 'text' stands there more than once"):
        texts(path)
    column = pyarrow.array(["a"])
    parquet.write_table(pyarrow.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="2 columns 'text', expected one"):
        texts(tmp_path / "a.parquet")


BAD = ['{"text": null}', "{broken", '{"body": "x"}', '{"text": "\\ud800"}']


def test_bad_records_are_skipped_counted_and_listed(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": f"text {n}"}) for n in range(8)]
    path.write_text("\n".join([good[0], *BAD, *good[1:]]) + "\n")
    web = {"kind": "natural", "input": str(path)}
    with pytest.raises(UserError, match=r"line 2: 'text' holds NoneType, expected text; .* or on_error to skip"):
        prepare(config_of(tmp_path, {"web": web}))
    (one,) = prepare(config_of(tmp_path, {"web": {**web, "on_error": "skip"}}))
    manifest = Manifest.load(tmp_path / "out" / "web")
    assert manifest.counts.documents == 8 and manifest.made.skipped_records == len(one.skipped) == 4
    listed = (tmp_path / "out" / "web" / "skipped.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in listed] == [f"{path}, line {n}" for n in (2, 3, 4, 5)]
    with pytest.raises(UserError, match=r"more than max_errors = 3 records are no text; the first are\n.*line 2"):
        prepare(config_of(tmp_path, {"web": {**web, "on_error": "skip", "max_errors": 3}}), force=True)
    (one,) = prepare(config_of(tmp_path, {"web": {**web, "on_error": "skip", "max_bytes": 6}}), force=True)
    assert one.manifest.counts.documents == 1 and one.skipped == (), "what comes after the limit is not read"


def test_without_bad_records_manifest_and_digest_are_as_before(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "x"}])
    prepare(config_of(tmp_path, {"web": {"kind": "natural", "input": str(path)}}))
    assert "skipped_records" not in (tmp_path / "out" / "web" / "manifest.json").read_text()
    assert "on_error" not in (tmp_path / "out" / "prepare.json").read_text()


def test_documents_of_which_the_tokenizer_leaves_nothing_are_left_out(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["<eod>", *alphabet])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<eod>"])
    backend.normalizer = normalizers.Replace("\u200b", "")
    backend.save(str(tmp_path / "tokenizer.json"))
    path = lines(tmp_path / "a.jsonl", [{"text": text} for text in ("a", "\u200b", "b\u200b")])
    (one,) = prepare(config_of(tmp_path, {"web": {"kind": "natural", "input": str(path)}}))
    assert (one.manifest.counts.documents, one.manifest.counts.tokens) == (2, 4)
    assert one.manifest.counts.text_bytes == len("ab\u200b".encode())
    lines(path, [{"text": "\u200b"}])
    with pytest.raises(UserError, match="no text in"):
        prepare(config_of(tmp_path, {"web": {"kind": "natural", "input": str(path)}}), force=True)


def test_max_bytes_stops_in_a_compressed_file(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "CHUNK_CHARACTERS", 1000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps({"text": f"text {n:06d}"}).encode() + b"\n" for n in range(3000))))
    read = []
    real = JsonLines.text_of
    monkeypatch.setattr(JsonLines, "text_of", lambda self, place, line: read.append(place.number) or real(self, place, line))
    (one,) = prepare(config_of(tmp_path, {"web": {"kind": "natural", "input": str(path), "max_bytes": 110}}))
    assert one.manifest.counts.documents == 10 and len(read) == 10


@pytest.mark.parametrize(("holdout", "empty"), [("1/1000000", "web-valid"), ("999999/1000000", "web")])
def test_an_empty_split_is_known_before_anything_is_tokenized(tmp_path, monkeypatch, holdout, empty):
    monkeypatch.setattr(pipeline, "tokenize_task", lambda *arguments: pytest.fail("tokenized"))
    path = lines(tmp_path / "a.jsonl", [{"text": f"text {n}"} for n in range(50)])
    with pytest.raises(UserError, match=f"of 50 documents leaves none for '{empty}'"):
        prepare(config_of(tmp_path, {"web": {"kind": "natural", "input": str(path), "holdout": holdout}}))


def test_one_file_in_two_sources_is_said(tmp_path, capsys):
    path = lines(tmp_path / "a.jsonl", [{"text": "x"}])
    (tmp_path / "b.jsonl").symlink_to(path)
    one, two = {"kind": "natural", "input": str(path)}, {"kind": "natural", "input": str(tmp_path / "b.jsonl")}
    prepare(config_of(tmp_path, {"a": one, "b": two}))
    assert f"note: sources.b reads {tmp_path}/b.jsonl, which sources.a reads too (there {path}): its text is there twice" in (
        capsys.readouterr().err
    )
    prepare(config_of(tmp_path, {"a": one, "b": {**two, "split": "validation"}}), force=True)
    assert "validation text is trained on" in capsys.readouterr().err


def test_the_sizes_of_a_small_need_are_told(tmp_path, monkeypatch):
    class Usage:
        free = 1

    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda folder: Usage)
    path = lines(tmp_path / "a.jsonl", [{"text": "x" * 5000}])
    with pytest.raises(UserError, match=r"needs about 2\.51k bytes for 5\.01k bytes of text, 1 bytes are free"):
        prepare(config_of(tmp_path, {"web": {"kind": "natural", "input": str(path)}}))


@pytest.mark.parametrize(
    ("source", "shuffle", "needed"),
    [
        ({}, None, 500_000),
        ({"prompt": "question"}, None, 531_250),  # 250,000 tokens, a bit for each
        ({"messages": "messages"}, None, 531_250),
        ({"columns": {"score": "float32", "own": "text_id"}}, None, 506_000),  # 500 documents, 4 and 8 bytes for each
        ({"columns": {"host": "host"}, "prompt": "question"}, {"seed": 1}, 2 * 533_250),
        ({"columns": {"host": "host"}, "max_bytes": 100_000}, None, 50_200),
    ],
)
def test_the_space_for_masks_and_columns_is_counted(tmp_path, monkeypatch, source, shuffle, needed):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * (1_000_000 - len('{"text": ""}') - 1)}) + "\n")
    config = config_of(tmp_path, {"web": {"kind": "natural", "input": str(path), **source}}, shuffle=shuffle)
    for free in (needed - 1, needed):
        monkeypatch.setattr(preparing.shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        readers = {name: reader_of(name, one) for name, one in config.sources.items()}
        if free < needed:
            with pytest.raises(UserError, match="are free in"):
                preparing._check_space(config, readers, tmp_path / "out", np.dtype(np.uint16))
        else:
            preparing._check_space(config, readers, tmp_path / "out", np.dtype(np.uint16))


def test_progress_in_a_log_is_a_line_now_and_then(capsys, monkeypatch):
    now = iter(np.arange(0.0, 1000.0, 20.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    with progress.progress("web", 4000) as shown:
        for _ in range(4):
            shown.update(1000)
    assert capsys.readouterr().err.splitlines() == [
        "web: 2.00k of about 4.00k bytes after 40 s",
        "web: 4.00k of about 4.00k bytes after 80 s",
    ]
