"""Text from a bucket becomes the same shards as from a disk, and a change of an object is noticed."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys

import fsspec
import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.config.load import load_file
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.config.schema import Config
from megatron_synth.config.validation import validate
from megatron_synth.data.loading.run_data import open_data
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.storage import objects
from megatron_synth.storage.remote import remote
from megatron_synth.train.dryrun import dry_run
from tests.object_store import BUCKET, SECRET, Reply, first
from tests.support import child_environment, with_columns, with_masks, write_config, write_corpus

PREPARE = """
import sys
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.data.preparing.prepare import prepare
prepare(PrepareConfig.model_validate_json(sys.argv[1]), workers=int(sys.argv[2]))
"""

TEXTS = [f"Document {n}: the {n * n} quick foxes jump over {'naïve ' * (n % 7)}dogs. 狐 {n}" for n in range(400)]


def written(folder):
    """The same texts in all formats."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    with pyarrow.output_stream(str(folder / "c.jsonl.zst"), compression="zstd") as file:
        file.write(lines.encode())
    parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "d.parquet", row_group_size=64)
    (folder / "e.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    return folder


def config_for(output, pattern, **more):
    tokenizer = {"train": {"vocab_size": 400}}
    source = {"kind": "natural", "input": pattern, "holdout": "1/10"}
    return PrepareConfig.model_validate({"output": str(output), "tokenizer": tokenizer, "sources": {"s": source}, **more})


def shards(output):
    return {(at, path.name): path.read_bytes() for at in ("s", "s-valid") for path in sorted((output / at).glob("shard*"))}


def uploaded(folder, at):
    files = fsspec.filesystem("s3", use_listings_cache=False)
    for path in sorted(folder.iterdir()):
        files.put_file(str(path), f"{BUCKET}/{at}/{path.name}")


@pytest.mark.parametrize("workers", [1, 2])
def test_text_in_a_bucket_becomes_the_same_shards(store, tmp_path, workers) -> None:
    uploaded(written(tmp_path / "in"), "in")
    prepare(config_for(tmp_path / "local", str(tmp_path / "in" / "*")), workers=workers)
    # workers have the environment in which their parent began, which in this process may have been another test's
    config = config_for(tmp_path / "remote", f"s3://{BUCKET}/in/*").model_dump_json()
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, config, str(workers)], env=child_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "remote") == shards(tmp_path / "local") and len(shards(tmp_path / "local")) == 4
    record = json.loads((tmp_path / "remote" / "s" / "manifest.json").read_text())["made"]["inputs"]
    assert record["files"] == [f"s3://{BUCKET}/in/*"] and record["count"] == 5
    assert prepare(config_for(tmp_path / "remote", f"s3://{BUCKET}/in/*")) is None
    for path in (tmp_path / "remote").rglob("*.json"):
        assert SECRET not in path.read_text()


def test_another_content_of_the_same_name_and_size_is_noticed(store, tmp_path) -> None:
    uploaded(written(tmp_path / "in"), "in")
    config = config_for(tmp_path / "out", f"s3://{BUCKET}/in/a.jsonl")
    prepare(config)
    changed = (tmp_path / "in" / "a.jsonl").read_bytes().replace(b"quick", b"quiet")
    fsspec.filesystem("s3", use_listings_cache=False).pipe_file(f"{BUCKET}/in/a.jsonl", changed)
    with pytest.raises(UserError, match="was prepared from other settings or inputs"):
        prepare(config)


def test_an_object_that_is_exchanged_while_it_is_read_ends_the_run(store, tmp_path) -> None:
    place = remote(f"s3://{BUCKET}/in/a.txt")
    objects.write(place, b"one\ntwo\n")
    seen = objects.look(place)
    objects.write(place, b"one\nTWO\n")
    with pytest.raises(UserError, match=r"a\.txt: could not read it: it has changed since .* \(8 bytes, ETag"):
        objects.open_binary(seen)
    uploaded(written(tmp_path / "in"), "in")
    config = config_for(tmp_path / "out", f"s3://{BUCKET}/in/a.jsonl")
    changed = (tmp_path / "in" / "a.jsonl").read_bytes().replace(b"quick", b"quiet")
    real = objects.read_range

    def then_change(place, begin, end, action="read it"):
        data = real(place, begin, end, action)
        objects.write(place, changed)
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "read_range", then_change)
        with pytest.raises(UserError, match=r"has changed|changed while they were read"):
            prepare(config)
    assert not (tmp_path / "out").exists()


def test_what_a_pattern_does_not_find_and_names_that_are_not_plain_are_refused(store, tmp_path) -> None:
    with pytest.raises(UserError, match=rf"sources.s.input: s3://{BUCKET}/none/\*.jsonl: no such object"):
        prepare(config_for(tmp_path / "out", f"s3://{BUCKET}/none/*.jsonl"))
    with pytest.raises(UserError, match=rf"sources.s.input: s3://{BUCKET}/none.jsonl: no such object"):
        prepare(config_for(tmp_path / "out", f"s3://{BUCKET}/none.jsonl"))
    objects.write(remote(f"s3://{BUCKET}/in/x.csv"), b"a,b")
    with pytest.raises(UserError, match=r"x.csv: unknown format"):
        prepare(config_for(tmp_path / "out", f"s3://{BUCKET}/in/*"))
    fsspec.filesystem("s3", use_listings_cache=False).pipe_file(f"{BUCKET}/in/..\\evil.jsonl", b"{}")
    with pytest.raises(UserError, match="expected a bucket and plain names"):
        prepare(config_for(tmp_path / "out", f"s3://{BUCKET}/in/*.jsonl"))
    with pytest.raises(UserError, match="the web has no listings"):
        prepare(config_for(tmp_path / "out", "https://example.org/*.jsonl"))


def test_a_tokenizer_in_a_bucket_and_a_slow_store(store, tmp_path) -> None:
    uploaded(written(tmp_path / "in"), "in")
    prepare(config_for(tmp_path / "one", f"s3://{BUCKET}/in/a.jsonl"))
    objects.upload(tmp_path / "one" / "tokenizer.json", remote(f"s3://{BUCKET}/tokenizer.json"))
    given = config_for(tmp_path / "two", f"s3://{BUCKET}/in/a.jsonl", tokenizer={"path": f"s3://{BUCKET}/tokenizer.json"})
    with store.failing(first(3, Reply(forward=True, delay_s=0.3), within="a.jsonl")):
        prepare(given)
    assert shards(tmp_path / "two") == shards(tmp_path / "one")


def test_plans_read_manifests_alone_and_a_run_reads_copies(store, tmp_path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    plain = load_file(Config, write_config(tmp_path / "run.yaml", corpus))
    fsspec.filesystem("s3", use_listings_cache=False).put(str(corpus), f"{BUCKET}/corpus", recursive=True)
    names = {"sources": ("web", "qa"), "validation": ("val", "val2")}
    paths = [f"data.{kind}.{name}.path=s3://{BUCKET}/corpus/{name}" for kind, found in names.items() for name in found]
    with pytest.raises(UserError, match=r"source 'web': s3://corpora/corpus/web is in object storage: set data.staging"):
        open_data(load_file(Config, tmp_path / "run.yaml", paths))
    staging = [f"data.staging={tmp_path / 'local'}"]
    config = load_file(Config, tmp_path / "run.yaml", [*paths, *staging])
    with store.failing(lambda *_: None) as requests:
        planned = open_data(config)
        told = dry_run(config, 1).splitlines()
    assert not any(".bin" in path or ".idx" in path for _, path in requests)
    local = open_data(plain)
    assert planned.digest == local.digest and told[3:] == dry_run(plain, 1).splitlines()[3:]
    copied = open_data(config, staged=True)
    assert copied.digest == local.digest and copied.checked_tokenizer() is not None
    for ours, theirs in zip(copied.sources, local.sources, strict=True):
        found, expected = np.empty((2, 33), np.int64)
        ours.read_window(7, found)
        theirs.read_window(7, expected)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("chooses", ["where", "exclude_parents_of"])
def test_documents_are_chosen_by_the_index_and_the_columns_alone(store, tmp_path, chooses) -> None:
    for number, name in enumerate(("web", "held")):
        with_masks(with_columns(tmp_path / name, number + 5), number)
        fsspec.filesystem("s3", use_listings_cache=False).put(str(tmp_path / name), f"{BUCKET}/{name}", recursive=True)

    def config(root, **more):
        web, held = {"path": f"{root}/web", "ratio": 1}, {"path": f"{root}/held"}
        if chooses == "where":
            web["where"], held["where"] = "score >= 0.5", "kind == 'qa'"
        else:
            more["exclude_parents_of"] = "validation"
        data = {"sources": {"web": web}, "validation": {"held": held}, "cache": str(tmp_path / "cache"), **more}
        model = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 1}
        train = {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "sequence_length": 64}
        return validate(Config, {"model": model, "data": data, "train": train, "optim": {"lr": 1e-3}}, "test")

    local = open_data(config(tmp_path))
    assert 0 < local.sources[0].num_tokens < local.sources[0].base.num_tokens
    shutil.rmtree(tmp_path / "cache")
    remotely = config(f"s3://{BUCKET}", staging=str(tmp_path / "local"))
    with store.failing(lambda *_: None) as requests:
        planned, told = open_data(remotely), dry_run(remotely, 1).splitlines()
    assert any(".idx" in path for _, path in requests)
    assert not any(suffix in path for _, path in requests for suffix in (".bin", ".learned"))
    assert planned.digest == local.digest and told[3:] == dry_run(config(tmp_path), 1).splitlines()[3:]
    with store.failing(lambda *_: None) as requests:
        copied = open_data(remotely, staged=True)
    assert any(".bin" in path for _, path in requests) and not any("GET" in verb and ".idx" in path for verb, path in requests)
    assert copied.digest == local.digest
    pairs = ((copied.sources[0], local.sources[0]), (copied.validation["held"], local.validation["held"]))
    for ours, theirs in pairs:
        found, expected = np.empty(ours.num_tokens, np.int64), np.empty(theirs.num_tokens, np.int64)
        ours.read(0, found)
        theirs.read(0, expected)
        np.testing.assert_array_equal(found, expected)
        learned = [np.empty(len(found), np.bool_) for _ in range(2)]
        ours.read_learned(0, learned[0])
        theirs.read_learned(0, learned[1])
        np.testing.assert_array_equal(*learned)
        assert 0 < learned[0].sum() < len(found)
    needed = int((tmp_path / "web" / "shard-00000.idx").stat().st_size)
    few = config(f"s3://{BUCKET}", staging=str(tmp_path / "few"), staging_bytes=needed)
    with pytest.raises(UserError, match=r"data.staging_bytes: the copies of this run take \d+ bytes"):
        open_data(few)
