"""`prepare`: splits, tokenizers, tables of settings, and what the verbs say."""

import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.cli import prepare as verb
from megatron_synth.cli.prepare.verify import source_folders
from megatron_synth.config.errors import ConfigError, UserError
from megatron_synth.config.load import load_file
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.data.preparing.readers.documents import is_held_out
from megatron_synth.data.shards.manifest import Manifest
from megatron_synth.data.tokenizer import load_tokenizer, train_tokenizer
from tests.support import ROOT
from tests.unit.data.preparing.support import EOD, TEXTS, jsonl, stored_texts


def test_holdout_splits_by_text_and_not_by_place(tmp_path, make, tokenizer_path):
    share = Fraction(1, 4)
    held = {text for text in TEXTS if is_held_out(text, share)}
    config = make({"input": str(jsonl(tmp_path / "reversed.jsonl", TEXTS[::-1] + TEXTS[:3])), "holdout": "1/4"})
    prepare(config)
    train = stored_texts(tmp_path / "out" / "web", tokenizer_path)
    valid = stored_texts(tmp_path / "out" / "web-valid", tokenizer_path)
    assert set(valid) == held and set(train) == set(TEXTS) - held
    assert len(train) + len(valid) == len(TEXTS) + 3
    assert Manifest.load(tmp_path / "out" / "web").split == "train"
    assert Manifest.load(tmp_path / "out" / "web-valid").split == "validation"
    drawn = sum(is_held_out(f"document {number}", share) for number in range(20_000))
    assert abs(drawn - 5000) < 5 * (20_000 * 0.25 * 0.75) ** 0.5


def test_a_trained_tokenizer_has_seen_no_held_out_text(tmp_path, make):
    held = [text for text in TEXTS if is_held_out(text, Fraction(1, 4))]
    source = {"holdout": "1/4"}
    prepare(make(source, tokenizer={"train": {"vocab_size": 400}}))
    expected = train_tokenizer([text for text in TEXTS if text not in held], 400, EOD)
    assert load_tokenizer(tmp_path / "out" / "tokenizer.json", EOD).fingerprint == expected.fingerprint


def test_training_a_tokenizer_is_the_same_in_every_process(tmp_path):
    code = (
        "from megatron_synth.data.tokenizer import train_tokenizer as t; import json, sys;"
        "print(t(json.load(open(sys.argv[1])), 600, '<eod>').fingerprint)"
    )
    text = [path.read_text() for path in sorted((ROOT / "megatron_synth" / "data").rglob("*.py"))]
    (tmp_path / "texts.json").write_text(json.dumps(text))
    found = set()
    for threads in ("1", "3"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, "-c", code, str(tmp_path / "texts.json")]
        run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
        found.add(run.stdout)
    assert len(found) == 1


def test_fingerprint_ignores_how_the_file_is_written_and_nothing_else(tokenizer_path, tmp_path):
    one = load_tokenizer(tokenizer_path, EOD)
    data = json.loads(one.content)
    data["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]
    (tmp_path / "same.json").write_text(json.dumps(data, indent=1))
    same = load_tokenizer(tmp_path / "same.json", EOD)
    assert same.fingerprint == one.fingerprint
    assert same.encode(TEXTS, np.dtype(np.int32))[0].tolist() == one.encode(TEXTS, np.dtype(np.int32))[0].tolist()
    data["model"]["merges"].pop()
    (tmp_path / "other.json").write_text(json.dumps(data))
    assert load_tokenizer(tmp_path / "other.json", EOD).fingerprint != one.fingerprint


def test_a_document_longer_than_a_shard_and_empty_ones(tmp_path, make, tokenizer_path):
    texts = ["short one", "", " \n", "long " * 400, "short two"]
    prepare(make({"input": str(jsonl(tmp_path / "a.jsonl", texts))}, shard_tokens=50))
    manifest = Manifest.load(tmp_path / "out" / "web")
    assert [shard.documents for shard in manifest.shards] == [1, 1, 1]
    assert stored_texts(tmp_path / "out" / "web", tokenizer_path) == ["short one", "long " * 400, "short two"]


def test_max_bytes_stops_reading(make):
    (one,) = prepare(make({"max_bytes": 100}))
    sizes = np.cumsum([len(text.encode()) for text in TEXTS])
    assert one.manifest.counts.documents == int(np.searchsorted(sizes, 100)) + 1


def test_a_shuffle_is_told_in_the_manifest_and_depends_on_its_seed(tmp_path, make, tokenizer_path):
    orders = {}
    for seed in (1, 2, None):
        shuffle = None if seed is None else {"seed": seed}
        (one,) = prepare(make(shuffle=shuffle), force=True)
        assert one.manifest.made.shuffle_seed == seed
        orders[seed] = stored_texts(tmp_path / "out" / "web", tokenizer_path)
    assert orders[None] == TEXTS and sorted(orders[1]) == sorted(orders[2]) == sorted(TEXTS)
    assert orders[1] != orders[2] != TEXTS != orders[1]


def test_what_was_prepared_is_verified_block_by_block(tmp_path, make):
    prepare(make({"holdout": "1/4"}))
    assert verb.main(["verify", str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "web-valid" / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 4
    path.write_bytes(data)
    assert verb.main(["verify", str(tmp_path / "out")]) == 2
    assert verb.main(["duplicates", str(tmp_path / "out")]) == 0


def test_a_source_that_is_gone_is_missed_and_one_given_twice_is_looked_at_once(tmp_path, make):
    prepare(make({"holdout": "1/4"}))
    out = tmp_path / "out"
    (tmp_path / "link").symlink_to(out / "web")
    every = [str(out), str(out / "web"), f"{out}/../out/web", str(tmp_path / "link")]
    assert [folder.name for folder in source_folders(every)] == ["web", "web-valid"]
    shutil.rmtree(out / "web-valid")
    with pytest.raises(UserError, match=r"web-valid/manifest\.json: not there, though .*prepare\.json names this source"):
        verb.main(["verify", str(out)])
    assert verb.main(["verify", str(out / "web")]) == 0


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ({"input": "none/*.jsonl"}, {}, r"sources\.web\.input: none/\*\.jsonl: no such file"),
        ({"input": "."}, {}, r"sources\.web\.input: \.: a folder"),
        ({"input": str(Path(__file__))}, {}, r"unknown format, expected one of \.txt"),
        ({"text_key": "body"}, {}, r"line 1: no field 'body', found \['id', 'text'\]"),
        ({"holdout": "1/100000"}, {}, r"sources\.web\.holdout: 1/100000 of 60 documents leaves none for 'web-valid'"),
        ({}, {"tokenizer": {"path": "none.json"}}, r"none\.json: No such file"),
        ({}, {"tokenizer": {"path": __file__}}, r"not a tokenizer\.json"),
        (
            {},
            {"tokenizer": {"train": {"vocab_size": 70_000}}, "dtype": "uint16"},
            "uint16 cannot hold a vocabulary of 70000",
        ),
    ],
)
def test_wrong_settings_are_refused(tmp_path, make, source, settings, message):
    with pytest.raises(UserError, match=message):
        prepare(make(source, **settings))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_the_eod_token_names_those_that_it_has(make, tokenizer_path):
    with pytest.raises(UserError, match=r"has no end-of-document token '</s>'.*<\|endoftext\|>"):
        prepare(make(tokenizer={"path": str(tokenizer_path), "eod": "</s>"}))


def test_a_tokenizer_from_the_hub_is_its_file_and_a_failure_says_what_to_do(tmp_path, make, tokenizer_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(tokenizer_path))
    prepare(make(tokenizer={"name": "some/model"}))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer_path.read_bytes()

    def unreachable(name, file):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"tokenizer\.name 'some/model': cannot fetch .*no route.*set `tokenizer.path`"):
        prepare(make(tokenizer={"name": "some/model"}))


def test_the_quickstart_makes_the_folders_that_its_training_reads():
    config = load_file(PrepareConfig, ROOT / "configs" / "data" / "quickstart.yaml")
    assert config.output == "data/quickstart"
    made = {name: (source.kind, source.split, source.holdout is not None) for name, source in config.sources.items()}
    assert made == {
        "natural": ("natural", "train", True),
        "qa": ("qa", "train", True),
        "unseen": ("natural", "validation", False),
    }


@pytest.mark.parametrize(("dtype", "name"), [("auto", "uint16"), ("uint16", "uint16"), ("int32", "int32")])
def test_the_token_type_can_be_forced(tmp_path, make, tokenizer_path, dtype, name):
    prepare(make(dtype=dtype))
    assert Manifest.load(tmp_path / "out" / "web").dtype == name
    assert stored_texts(tmp_path / "out" / "web", tokenizer_path) == TEXTS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": None}, "exactly one of input, hf, builtin and synthesized, found none"),
        ({"builtin": "qa"}, "found input and builtin"),
        ({"holdout": "1/9", "split": "validation"}, "a validation source has no holdout"),
        ({"holdout": 0}, "holdout must lie between 0 and 1"),
        ({"kind": "fiction"}, "natural"),
    ],
)
def test_the_schema_refuses_what_cannot_be_meant(tmp_path, change, message):
    lines = {"kind": "natural", "input": "a.jsonl", **change}
    file = tmp_path / "prepare.yaml"
    file.write_text(json.dumps({"output": "o", "tokenizer": {"name": "gpt2"}, "sources": {"web": lines}}))
    with pytest.raises(ConfigError, match=message):
        load_file(PrepareConfig, file)


@pytest.mark.parametrize("name", ["../web", "", "a/b", "tokenizer.json", ".hidden"])
def test_source_names_are_folder_names(name):
    source = {"kind": "natural", "input": "a.jsonl"}
    with pytest.raises(ValueError, match="as in a folder's name"):
        PrepareConfig.model_validate({"output": "o", "tokenizer": {"name": "gpt2"}, "sources": {name: source}})


def test_the_verb_prints_a_table_then_up_to_date(tmp_path, make, capsys):
    file = tmp_path / "prepare.yaml"
    file.write_text(make().model_dump_json())
    out = str(tmp_path / "elsewhere")
    assert verb.main([str(file), f"output={out}", "--workers", "1", "sources.web.holdout=1/4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "source", "split", "documents", "tokens", "bytes", "bytes/token", "shards", "seconds", "tokens/s",
    ]  # fmt: skip
    rows = {line.split()[0]: line.split() for line in lines[1:3]}
    for name, split in (("web", "train"), ("web-valid", "validation")):
        counts = Manifest.load(Path(out) / name).counts
        shown = [split, f"{counts.documents:,}", f"{counts.tokens:,}", f"{counts.text_bytes:,}"]
        assert rows[name][1:5] == shown
    assert verb.main([str(file), f"output={out}", "sources.web.holdout=1/4"]) == 0
    assert capsys.readouterr().out == f"{out}: up to date\n"
    with pytest.raises(SystemExit, match="2"):
        verb.main([str(file), "--workers", "0"])
    assert "--workers: expected a whole number of 1 or more, found '0'" in capsys.readouterr().err
