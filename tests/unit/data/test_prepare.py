"""`prepare`: every input format, equal bytes, all or nothing, and each mistake as one clear message."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_synth.cli import prepare as verb
from megatron_synth.cli.prepare.verify import source_folders
from megatron_synth.config.errors import ConfigError, UserError
from megatron_synth.config.load import load_file
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.data.overlap.minhash import find_duplicates
from megatron_synth.data.preparing import assembly, pipeline, shuffle, splits
from megatron_synth.data.preparing import prepare as preparing
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.data.preparing.readers.documents import is_held_out
from megatron_synth.data.preparing.readers.files import fingerprint
from megatron_synth.data.shards.manifest import Manifest
from megatron_synth.data.shards.source import open_source
from megatron_synth.data.tokenizer import load_tokenizer, train_tokenizer
from tests.support import ROOT

EOD = "<|endoftext|>"
TEXTS = [f"Document {n}: the {n * n} quick foxes\njump over {'naïve ' * (n % 7)}dogs. 狐 {n}" for n in range(60)]
TEXTS[5] = f"A text that says {EOD} in the middle."


@pytest.fixture(autouse=True)
def no_syncs(monkeypatch):
    """Thousands of tiny files need not reach the disk; that they do is for test_prepare_crashes.py."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS * 3, 400, EOD).save(path)
    return path


@pytest.fixture
def make(tmp_path, tokenizer_path):
    """A PrepareConfig with one source `web`, by default from a .jsonl of TEXTS."""

    def build(source=None, **settings):
        if source is None or not {"input", "hf", "builtin"} & set(source):
            source = {"input": str(jsonl(tmp_path / "web.jsonl")), **(source or {})}
        data = {
            "output": str(tmp_path / "out"),
            "tokenizer": {"path": str(tokenizer_path)},
            "sources": {"web": {"kind": "natural", **source}},
            **settings,
        }
        return PrepareConfig.model_validate(data)

    return build


def jsonl(path, texts=TEXTS, key="text"):
    path.write_text("".join(json.dumps({"id": n, key: text}) + "\n" for n, text in enumerate(texts)), encoding="utf-8")
    return path


def stored_texts(folder, tokenizer_path):
    """The documents of a prepared source, decoded."""
    source, tokenizer = open_source(folder, "s"), load_tokenizer(tokenizer_path, EOD)
    tokens = np.concatenate([shard.tokens for shard in source._shards])
    ends = np.flatnonzero(tokens == tokenizer.eod_id)
    assert ends.size == source.num_documents and ends[-1] == tokens.size - 1
    starts = np.concatenate([[0], ends[:-1] + 1])
    assert starts.tolist() == np.concatenate([[0], np.cumsum(lengths_of(source))[:-1]]).tolist()
    return [tokenizer.decode(tokens[start:end]) for start, end in zip(starts, ends, strict=True)]


def lengths_of(source):
    return [
        length
        for shard in source._shards
        for length in np.diff([*shard.document_starts(0, shard.num_tokens).tolist(), shard.num_tokens])
    ]


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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
def test_portions_of_any_size_give_the_same_documents(tmp_path, make, tokenizer_path, monkeypatch, ending, shuffled):
    """Cut as finely as can be: a line may straddle two ranges, a file may be streamed, row groups are taken apart."""
    (tmp_path / "in").mkdir()
    source = write_format(tmp_path / "in", ending) | {"holdout": "1/4"}
    shuffle = {"seed": 3} if shuffled else None
    whole = PrepareConfig.model_validate(make(source, shuffle=shuffle, shard_tokens=700).model_dump())
    prepare(whole)
    for size in (1, 100, 1000):
        monkeypatch.setattr(splits, "PORTION_BYTES", size)
        monkeypatch.setattr(splits, "STREAMED_ABOVE", size)
        monkeypatch.setattr(splits, "STREAMED_BYTES", size)
        monkeypatch.setattr(pipeline, "CHUNK_CHARACTERS", size)
        monkeypatch.setattr(pipeline, "PIECE_BYTES", size)
        if shuffled:  # the shuffle depends on the portions; what it holds does not
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


SHUFFLED_AND_PACKED = {"shuffle": {"seed": 5}, "packing": {"sequence_length": 64}}


@pytest.mark.parametrize("order", [{}, SHUFFLED_AND_PACKED])
def test_bytes_do_not_depend_on_the_workers_nor_on_the_place(tmp_path, monkeypatch, order):
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 2000)
    monkeypatch.setattr(pipeline, "CHUNK_CHARACTERS", 500)  # many pieces
    monkeypatch.setattr(pipeline, "PIECE_BYTES", 400)
    monkeypatch.setattr(splits, "SMALL_PORTION", 1500)  # many portions, so that they could come out of order
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


def test_again_is_up_to_date_changed_is_refused_and_force_replaces(tmp_path, make, capsys):
    config = make()
    assert prepare(config) is not None
    before = tree(tmp_path / "out")
    assert prepare(config) is None
    with pytest.raises(UserError, match="other settings or inputs; use --force"):
        prepare(make({"kind": "other"}))
    jsonl(tmp_path / "web.jsonl", [text.swapcase() for text in TEXTS])  # as many bytes as before
    with pytest.raises(UserError, match="other settings or inputs; use --force"):
        prepare(config)
    assert tree(tmp_path / "out") == before
    assert prepare(config, force=True) is not None
    assert tree(tmp_path / "out") != before
    os.truncate(tmp_path / "out" / "web" / "shard-00000.bin", 10)
    with pytest.raises(UserError, match="is damaged, use --force"):
        prepare(config)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_is_no_prepared_output_is_never_replaced(tmp_path, make):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is no prepared output"):
        prepare(make(), force=True)
    assert tree(tmp_path / "out") == {"thesis.tex": b"years of work"}


def test_killed_in_the_middle_leaves_nothing_that_opens_and_no_worker(tmp_path, make):
    big = jsonl(tmp_path / "big.jsonl", (f"{text} {copy}" for copy in range(4000) for text in TEXTS[:25]))
    settings = make({"input": str(big)}, shard_tokens=20_000).model_dump_json()
    code = (
        "import sys\n"
        "from megatron_synth.config.prepare import PrepareConfig\n"
        "from megatron_synth.data.preparing.prepare import prepare\n"
        "if __name__ == '__main__': prepare(PrepareConfig.model_validate_json(sys.argv[1]), workers=2)"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(script), settings], env=environment)
    deadline = time.monotonic() + 300  # to end, not to judge: it takes a second
    while not list(tmp_path.glob(".out.partial-*/web/shard-00002.bin")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    (partial,) = tmp_path.glob(".out.partial-*")
    for folder in (tmp_path / "out" / "web", partial / "web"):
        with pytest.raises(UserError):
            open_source(folder, "web")
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, "workers outlive their parent"
    prepare(make())
    assert not partial.exists(), "the next run clears what the killed one left"
    assert open_source(tmp_path / "out" / "web", "web").num_documents == len(TEXTS)


STEPS = ["_tokenize_task", "write_shard", "plan_shards", "_count"]


class Killed(KeyboardInterrupt):
    """What a kill looks like to a run in this process: no handler but the last one."""


@pytest.mark.parametrize("order", [{}, SHUFFLED_AND_PACKED])
@pytest.mark.parametrize("step", STEPS)
def test_a_run_stopped_anywhere_is_continued_to_the_same_bytes(tmp_path, make, monkeypatch, capsys, step, order):
    for name, size in (("CHUNK_CHARACTERS", 300), ("PIECE_BYTES", 200)):
        monkeypatch.setattr(pipeline, name, size)
    monkeypatch.setattr(splits, "SMALL_PORTION", 900)
    monkeypatch.setattr(splits, "PORTION_BYTES", 900)
    source = {"holdout": "1/4", "max_bytes": 2500}
    settings = {"shard_tokens": 150, "tokenizer": {"train": {"vocab_size": 300}}, **order}
    prepare(make(source, **settings))
    expected = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")

    real = getattr(pipeline, step)
    calls, limit = 0, 0

    def stopping(*arguments):
        nonlocal calls
        calls += 1
        if calls > limit:
            raise Killed
        return real(*arguments)

    total = 0
    monkeypatch.setattr(pipeline, step, stopping)
    for limit in range(1, 200):  # noqa: B007  # each attempt may do one thing more than the last before it is stopped
        calls = 0
        try:
            prepare(make(source, **settings))
            break
        except Killed:
            total += 1
            assert not (tmp_path / "out").exists()
            (partial,) = tmp_path.glob(".out.partial-*")
            with open(partial / "journal.jsonl", "a") as file:
                file.write('{"kind": "portion", "sou')  # a line torn by the kill
    assert total >= 1 and "continuing a run that was stopped" in capsys.readouterr().err
    assert tree(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".out*"))


def test_what_is_done_is_not_done_again(tmp_path, make, monkeypatch):
    monkeypatch.setattr(splits, "SMALL_PORTION", 900)
    monkeypatch.setattr(splits, "PORTION_BYTES", 900)
    done = {"tokenize": [], "shard": []}
    real_tokenize, real_shard = pipeline._tokenize_task, pipeline.write_shard

    def tokenize(tokenizer, task):
        done["tokenize"].append(task[1])
        if task[1] == 3 and done["tokenize"].count(3) == 1:
            raise Killed
        return real_tokenize(tokenizer, task)

    def shard(tokenizer, task):
        done["shard"].append(task.prefix.name)
        if task.prefix.name == "shard-00002" and done["shard"].count("shard-00002") == 1:
            raise Killed
        return real_shard(tokenizer, task)

    monkeypatch.setattr(pipeline, "_tokenize_task", tokenize)
    monkeypatch.setattr(pipeline, "write_shard", shard)
    for _ in range(2):
        with pytest.raises(Killed):
            prepare(make(shard_tokens=300))
    assert prepare(make(shard_tokens=300)) is not None
    assert done["tokenize"][:5] == [0, 1, 2, 3, 3] and sorted(set(done["tokenize"][4:])) == done["tokenize"][4:]
    assert done["shard"][:4] == ["shard-00000", "shard-00001", "shard-00002", "shard-00002"]
    assert len(set(done["shard"])) == len(done["shard"]) - 1


def test_a_stopped_run_of_other_settings_or_with_a_damaged_piece_is_not_trusted(tmp_path, make, monkeypatch):
    monkeypatch.setattr(splits, "SMALL_PORTION", 900)
    monkeypatch.setattr(splits, "PORTION_BYTES", 900)
    real = pipeline._count
    prepare(make(shard_tokens=300))
    expected = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")

    def stop(*arguments):
        raise Killed

    monkeypatch.setattr(pipeline, "_count", stop)
    with pytest.raises(Killed):
        prepare(make(shard_tokens=300))
    monkeypatch.setattr(pipeline, "_count", real)
    (partial,) = tmp_path.glob(".out.partial-*")
    victim = sorted((partial / pipeline.STAGING / "web").glob("*.piece"))[1]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    prepare(make(shard_tokens=300))
    assert tree(tmp_path / "out") == expected
    shutil.rmtree(tmp_path / "out")

    monkeypatch.setattr(pipeline, "_count", stop)
    with pytest.raises(Killed):
        prepare(make({"kind": "other"}, shard_tokens=300))
    monkeypatch.setattr(pipeline, "_count", real)
    prepare(make(shard_tokens=300))
    assert tree(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".out*"))


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


def test_a_line_number_counts_from_the_start_of_the_file_wherever_the_portion_begins(tmp_path, make, monkeypatch):
    monkeypatch.setattr(splits, "SMALL_PORTION", 400)
    monkeypatch.setattr(splits, "PORTION_BYTES", 400)
    path = jsonl(tmp_path / "a.jsonl")
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(UserError, match=r"a.jsonl, line 61: broken JSON"):
        prepare(make({"input": str(path)}))


def test_a_failing_run_leaves_nothing(tmp_path, make):
    path = jsonl(tmp_path / "a.jsonl")
    path.write_text(path.read_text() + "{broken\n")
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"a.jsonl, line 61: broken JSON"):
            prepare(make({"input": str(path)}, shard_tokens=100), workers=workers)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl"]


def test_a_full_disk_is_refused_before_and_cleaned_after(tmp_path, make, monkeypatch):
    class Usage:
        free = 100

    with monkeypatch.context() as patch:
        patch.setattr(preparing.shutil, "disk_usage", lambda folder: Usage)
        with pytest.raises(UserError, match=r"needs about .* are free in"):
            prepare(make())
        assert prepare(make({"max_bytes": 100})) is not None, "max_bytes bounds the estimate"

    def no_space(self, tokens, lengths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assembly.ShardWriter, "add", no_space)
    with pytest.raises(UserError, match=r"web/shard-00000\.bin: No space left on device at byte 0; nothing was kept"):
        prepare(make(), force=True)
    assert Manifest.load(tmp_path / "out" / "web").counts.documents < len(TEXTS), "the old output is untouched"
    assert not list(tmp_path.glob(".out*"))


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


def test_the_quickstart_makes_the_folders_that_its_training_reads():
    config = load_file(PrepareConfig, ROOT / "configs" / "data" / "quickstart.yaml")
    assert config.output == "data/quickstart"
    made = {name: (source.kind, source.split, source.holdout is not None) for name, source in config.sources.items()}
    assert made == {
        "natural": ("natural", "train", True),
        "qa": ("qa", "train", True),
        "unseen": ("natural", "validation", False),
    }


def test_missing_columns_of_tables_name_what_is_there(tmp_path, make):
    (tmp_path / "in").mkdir()
    for ending in (".parquet", "disk"):
        source = write_format(tmp_path / "in", ending)
        with pytest.raises(UserError, match=r"no column 'body', found .*'text'"):
            prepare(make({**source, "text_key": "body"}))
    with pytest.raises(UserError, match="no split 'x', found"):
        source = write_format(tmp_path / "in", "disk-splits")
        prepare(make({"hf": {**source["hf"], "split": "x"}}))


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
    with pytest.raises(UserError, match="--workers: expected at least 1, got 0"):
        verb.main([str(file), "--workers", "0"])


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
