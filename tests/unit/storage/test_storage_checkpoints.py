"""Checkpoints in a bucket: seen when whole, the newest sound one fetched, and those of another run left alone."""

from __future__ import annotations

import json

import fsspec
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import CheckpointConfig
from megatron_synth.train.checkpoint import files
from megatron_synth.train.checkpoint.bucket import Bucket, Uploader
from tests.object_store import BUCKET, Reply
from tests.support import snapshot

URL = f"s3://{BUCKET}/runs/a"


def checkpoint(run, step, content=b"weights"):
    """A whole checkpoint of a run, as far as files tell."""
    folder = run / "checkpoints" / files.name_of(step)
    folder.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"id": "12345678"}))
    (run / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
    state = json.dumps({"step": step, "format": 2}).encode()
    written = {name: files.write_hashed(folder / name, data) for name, data in (("w.distcp", content), ("trainer.json", state))}
    files.write_manifest(folder, written)
    return folder


def find(at=""):
    return fsspec.filesystem("s3", use_listings_cache=False).find(f"{BUCKET}/runs/a{at}")


def test_the_newest_comes_back_as_it_was_and_older_ones_go_as_on_the_disk(store, tmp_path) -> None:
    bucket, run = Bucket(URL), tmp_path / "run"
    told: list[str] = []
    uploader = Uploader(bucket, CheckpointConfig(keep_last=2), told.append)
    beside = ("branch.json", "events.log", "nodes.json", "times.jsonl")
    run.mkdir()
    for name in beside:
        (run / name).write_text(name)
    for step in (10, 20, 30):
        uploader.offer(checkpoint(run, step, b"x" * step))
        assert uploader.wait(60) and uploader.steps == ()
    assert [name.name for name in sorted((run / "checkpoints").iterdir())][-1] == files.name_of(30)
    assert bucket.candidates() == [files.name_of(30), files.name_of(20)] and not told
    there = tmp_path / "elsewhere"
    assert bucket.fetch_newest(there, told.append) == there / "checkpoints" / files.name_of(30)
    assert snapshot(there / "checkpoints" / files.name_of(30)) == snapshot(run / "checkpoints" / files.name_of(30))
    assert (there / "metrics.jsonl").read_text() == '{"step": 30}\n'
    assert [(there / name).read_text() for name in beside] == list(beside)
    assert bucket.fetch_newest(there, told.append) is None and not told  # it is there
    assert not list((there / "checkpoints").glob("*.tmp"))


def test_one_without_a_manifest_is_not_seen_and_a_damaged_one_is_passed_over(store, tmp_path) -> None:
    bucket, run = Bucket(URL), tmp_path / "run"
    for step in (10, 20, 30):
        bucket.upload(checkpoint(run, step))
    remote = fsspec.filesystem("s3", use_listings_cache=False)
    folder = f"{BUCKET}/runs/a/checkpoints"
    remote.rm_file(f"{folder}/{files.name_of(30)}/manifest.json")
    remote.pipe_file(f"{folder}/{files.name_of(20)}/w.distcp", b"weightX")
    told: list[str] = []
    fetched = bucket.fetch_newest(tmp_path / "new", told.append)
    assert fetched is not None and fetched.name == files.name_of(10)
    assert len(told) == 1 and "step_00000020: damaged: w.distcp has the checksum" in told[0]
    remote.pipe_file(f"{folder}/{files.name_of(10)}/w.distcp", b"short")
    with pytest.raises(UserError, match=r"no checkpoint there can be used:(.|\n)*w.distcp has 5 bytes, expected 7"):
        bucket.fetch_newest(tmp_path / "other", told.append)
    assert not list((tmp_path / "other" / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "a/b", "x\u0000y"])
def test_a_hostile_manifest_names_no_file_elsewhere(store, tmp_path, name) -> None:
    bucket = Bucket(URL)
    bucket.upload(checkpoint(tmp_path / "run", 10))
    listed = {"files": {"trainer.json": {"bytes": 1, "xxh3": "0"}, name: {"bytes": 1, "xxh3": "0"}}}
    at = f"{BUCKET}/runs/a/checkpoints/{files.name_of(10)}/manifest.json"
    fsspec.filesystem("s3", use_listings_cache=False).pipe_file(at, json.dumps(listed).encode())
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        bucket.fetch_newest(tmp_path / "new", lambda text: None)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and "run" not in path.parts) == [
        "metrics.jsonl",
        "run.json",
    ]


def test_the_folder_of_another_run_is_refused(store, tmp_path) -> None:
    bucket = Bucket(URL)
    bucket.upload(checkpoint(tmp_path / "run", 10))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text(json.dumps({"id": "abcdefgh"}))
    with pytest.raises(UserError, match=r"checkpoint.upload_to: .*/runs/a holds run '12345678', and .*/other is run abcdefgh"):
        bucket.fetch_newest(tmp_path / "other", lambda text: None)


def test_an_upload_that_fails_is_told_and_the_next_one_tries_again(store, tmp_path) -> None:
    bucket, told = Bucket(URL), []
    uploader = Uploader(bucket, CheckpointConfig(), told.append)
    with store.failing(lambda method, path: Reply(403, "AccessDenied") if method == "PUT" else None):
        uploader.offer(checkpoint(tmp_path / "run", 10))
        with pytest.raises(
            UserError, match=r"could not upload it: access is denied \(AccessDenied\).*the same command tries again"
        ):
            uploader.wait(60)
    assert len(told) == 1 and told[0].endswith("Training goes on") and find("/checkpoints") == []
    uploader.offer(checkpoint(tmp_path / "run", 20))
    assert uploader.wait(60) and bucket.candidates() == [files.name_of(20)]
