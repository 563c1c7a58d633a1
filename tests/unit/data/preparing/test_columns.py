"""Columns of documents, from records of the input to the shards: the same for every way that the documents take."""

import json

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.data.preparing.readers.values import document_id
from megatron_synth.data.shards.columns import text_id
from megatron_synth.data.shards.manifest import Manifest
from megatron_synth.data.shards.source import open_source
from tests.unit.data.preparing.support import SHUFFLED_AND_PACKED, TEXTS, lengths_of, stored_texts, tree

COLUMNS = {
    "score": "float32",
    "year": {"type": "int32", "field": "meta.year"},
    "kind": "category",
    "site": {"type": "host", "field": "url"},
    "parent": {"type": "parent", "field": "parents.0"},
    "own": "text_id",
}


def records():
    """TEXTS with values, of which some are missing; by text what each column should hold."""
    found, expected = [], {}
    for number, text in enumerate(TEXTS):
        record = {"text": text, "score": number / 7, "meta": {"year": 2000 + number % 20}, "parents": [f"p{number % 5}", "x"]}
        record["kind"] = ["qa", "web", "żółw"][number % 3]
        record["url"] = f"https://Site{number % 4}.example.org:80/a?b"
        if number % 4 == 1:
            del record["score"], record["meta"]
            record["parents"] = []
        if number % 6 == 2:
            record["kind"] = record["url"] = None
        found.append(record)
        unscored, unkind = number % 4 == 1, number % 6 == 2
        expected[text] = {
            "score": None if unscored else np.float32(number / 7),
            "year": None if unscored else 2000 + number % 20,
            "kind": None if unkind else ["qa", "web", "żółw"][number % 3],
            "site": None if unkind else f"site{number % 4}.example.org",
            "parent": None if unscored else text_id(f"p{number % 5}"),
            "own": text_id(document_id(text)),
        }
    return found, expected


def write(folder, ending):
    found, _ = records()
    path = folder / f"web{ending}"
    if ending == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(found), path, row_group_size=17)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in found))
    return str(path)


def stored(folder, tokenizer_path):
    """By document of a source, in order: its text and the values of its columns; padding is no document."""
    source = open_source(folder, "web")
    columns = {column.name: source.column(column.name) for column in source.columns}
    values = []
    for number in range(len(source.manifest.shards)):
        for place in range(source.manifest.shards[number].documents):
            one = {}
            for name, (column, of_shards) in columns.items():
                value = of_shards[number][place]
                missing = column.is_missing(of_shards[number])[place]
                one[name] = None if missing else column.categories[value] if column.type == "category" else value
            values.append(one)
    return list(zip(stored_texts(folder, tokenizer_path), values, strict=True)), lengths_of(source)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("settings", [{}, {"shuffle": {"seed": 5}}, SHUFFLED_AND_PACKED, {"packing": {"sequence_length": 64}}])
def test_each_document_keeps_its_values(make, tmp_path, tokenizer_path, ending, settings):
    source = {"input": write(tmp_path, ending), "columns": COLUMNS, "holdout": "1/5"}
    config = make(source, shard_tokens=900, **settings)
    prepare(config, workers=1)
    _, expected = records()
    for name in ("web", "web-valid"):
        found, lengths = stored(tmp_path / "out" / name, tokenizer_path)
        pad = [length == 1 for length in lengths]
        assert len(found) == len(lengths)
        whole = 0
        for (text, values), padding in zip(found, pad, strict=True):
            if padding:
                assert values == dict.fromkeys(COLUMNS)
            elif text in expected:
                whole += 1
                assert values == expected[text], text
            else:  # cut by packing: its parts have its values
                assert "packing" in settings and any(text in one and values == expected[one] for one in expected), text
        assert whole > 3
    manifest = Manifest.load(tmp_path / "out" / "web")
    assert [column.type for column in manifest.columns] == ["float32", "int32", "category", "category", "id", "id"]
    assert [column.parent for column in manifest.columns] == [False] * 4 + [True, False]
    assert manifest.columns[2].categories == ("qa", "web", "żółw")
    if settings or ending == ".parquet":
        return
    first = tree(tmp_path / "out")
    prepare(config.model_copy(update={"output": str(tmp_path / "again")}), workers=2)
    again = tree(tmp_path / "again")
    assert {name: data for name, data in first.items() if ".json" not in name} == {
        name: data for name, data in again.items() if ".json" not in name
    }


def test_a_value_of_another_type_is_named_with_its_line(make, tmp_path):
    path = tmp_path / "web.jsonl"
    cases = {
        "score": ({"score": "high"}, "float32"),
        "year": ({"year": 2.5}, "int32"),
        "kind": ({"kind": ["qa"]}, "category"),
        "n": ({"n": 2**31}, "int32"),
    }
    for name, (record, kind) in cases.items():
        good = {"text": "good text here", name: "3" if kind == "int32" else 3}
        path.write_text(json.dumps(good) + "\n" + json.dumps({"text": "some text", **record}) + "\n")
        with pytest.raises(UserError, match=rf"web.jsonl, line 2: '{name}' holds .* for column '{name}'"):
            prepare(make({"input": str(path), "columns": {name: kind}}), force=True)
        (one,) = prepare(make({"input": str(path), "columns": {name: kind}, "on_error": "skip"}), force=True)
        assert one.manifest.counts.documents == 1 and len(one.skipped) == 1


def test_a_column_that_no_document_has_is_refused(make, tmp_path):
    path = write(tmp_path, ".jsonl")
    with pytest.raises(UserError, match=r"sources.web.columns.language: no document has it; set `field`"):
        prepare(make({"input": path, "columns": {"language": "category"}}))


def test_outputs_without_columns_are_written_as_before(make, tmp_path):
    prepare(make())
    text = (tmp_path / "out" / "web" / "manifest.json").read_text()
    record = (tmp_path / "out" / "prepare.json").read_text()
    assert not any(f'"{key}' in one for one in (text, record) for key in ("columns", "fim"))
    assert prepare(make()) is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"class": "int32"}, "no word of Python"),
        ({"a-b": "int32"}, "use a letter"),
        ({"score": "float64"}, "float64"),
        ({"own": {"type": "text_id", "field": "text"}}, "leave the field out"),
    ],
)
def test_columns_that_cannot_be_are_refused(make, columns, message):
    with pytest.raises(ValueError, match=message):
        make({"columns": columns})
