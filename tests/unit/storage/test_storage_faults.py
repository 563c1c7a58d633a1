"""Ten faults of object storage: each is survived, or one message names the object, what was done and what to do."""

from __future__ import annotations

import errno
import os
import time
from email.utils import formatdate

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.data.shards.source import open_source
from megatron_synth.data.staging import copies
from megatron_synth.storage import objects
from megatron_synth.storage.remote import remote
from tests.object_store import BUCKET, SECRET, Reply, Store, first
from tests.support import write_source

CONTENT = bytes(range(256)) * 64
PLACE = remote(f"s3://{BUCKET}/in/part.jsonl")


@pytest.fixture
def object_there(store: Store) -> Store:
    objects.write(PLACE, CONTENT)
    return store


def refused(message: str) -> None:
    """Reading ends with one message that names the object and the action, and shows no secret."""
    with pytest.raises(UserError, match=rf"^{PLACE}: could not read it: {message}") as caught:
        objects.read(PLACE)
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


def test_denied(object_there) -> None:
    with object_there.failing(lambda *_: Reply(403, "AccessDenied")) as requests:
        refused(r"access is denied \(AccessDenied\); check the credentials")
    assert len(requests) <= 3  # asked once, and once more for the reason


def test_a_bucket_that_is_missing_and_an_object_that_is_missing(store) -> None:
    with pytest.raises(
        UserError, match=r"^s3://no-such-bucket/a: could not find it: there is no bucket 'no-such-bucket'; make it"
    ):
        objects.look(remote("s3://no-such-bucket/a"))
    refused("there is no such object; check the name")


def test_truncated(object_there) -> None:
    with object_there.failing(first(9, Reply(forward=True, short=1000), within="part.jsonl")):
        refused("what came is not what the store says that it holds, by its checksum, in 4 attempts; copy it there again")
    with object_there.failing(first(1, Reply(forward=True, short=1000), within="part.jsonl")):
        assert objects.read(PLACE) == CONTENT
    expected = (
        rf"^{PLACE}: could not read it: it is truncated, 8000 bytes were expected and it ends after 1000; copy it there again"
    )
    with (
        object_there.failing(first(9, Reply(forward=True, short=1000), within="part.jsonl")),
        pytest.raises(UserError, match=expected),
    ):
        objects.read_range(PLACE, 0, 8000)  # of a range there is no checksum


def test_a_changed_etag(object_there) -> None:
    seen = objects.look(PLACE)
    objects.write(PLACE, CONTENT[::-1])
    with pytest.raises(UserError, match=rf"^{PLACE}: could not read it: it has changed since it was first looked at"):
        objects.open_binary(seen)


def test_throttled_for_a_while_is_survived_and_for_ever_is_told(object_there) -> None:
    with object_there.failing(first(2, Reply(503, "SlowDown"))) as requests:
        assert objects.read(PLACE) == CONTENT
    assert len(requests) >= 4
    with object_there.failing(lambda *_: Reply(503, "SlowDown")):
        refused("the store asked to slow down, in 4 attempts; start again later")


def test_an_answer_that_does_not_come_in_time(object_there, monkeypatch) -> None:
    monkeypatch.setattr(objects, "READ_TIMEOUT_S", 0.4)
    with object_there.failing(first(1, Reply(forward=True, delay_s=1.0), within="part.jsonl")):
        assert objects.read(PLACE) == CONTENT
    with object_there.failing(lambda *_: Reply(forward=True, delay_s=1.0)):
        refused("no answer came in 4 attempts; check the network")


def test_a_clock_that_is_off(object_there) -> None:
    theirs = {"Date": formatdate(time.time() - 3600, usegmt=True)}
    for code in ("RequestTimeTooSkewed", "AccessDenied"):  # an answer to HEAD has no code at all
        with object_there.failing(lambda *_, code=code: Reply(403, code, headers=theirs)):
            refused(r"refused: the clock of this machine is off by 36\d\d s; set it \(NTP\)")


def test_a_bucket_in_another_region(object_there) -> None:
    there = {"x-amz-bucket-region": "eu-north-1"}
    with object_there.failing(lambda *_: Reply(400, "AuthorizationHeaderMalformed", headers=there)):
        refused(r"the bucket 'corpora' is in another region \(eu-north-1\); set AWS_DEFAULT_REGION to eu-north-1")


def test_a_connection_that_is_cut_in_the_middle(object_there) -> None:
    with object_there.failing(first(2, Reply(forward=True, cut=5000), within="part.jsonl")):
        assert objects.read(PLACE) == CONTENT
    with object_there.failing(first(99, Reply(forward=True, cut=5000), within="part.jsonl")):
        refused("the connection failed in 4 attempts; check the network")


def test_a_full_disk_of_copies_and_a_damaged_shard(store, tmp_path, monkeypatch) -> None:
    write_source(tmp_path / "web", 1, 3000)
    for path in (tmp_path / "web").iterdir():
        objects.upload(path, remote(f"s3://{BUCKET}/corpus/web") / path.name)
    source = remote(f"s3://{BUCKET}/corpus/web")
    real = os.fdopen

    class Full:
        def __init__(self, file):
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(copies.os, "fdopen", lambda *arguments, **more: Full(real(*arguments, **more)))
        with pytest.raises(
            UserError, match=r"local/web-\w+: No space left on device while s3://corpora/corpus/web was copied to"
        ):
            copies.stage(source, tmp_path / "local")
    copy = copies.stage(source, tmp_path / "local")  # goes on where there is room
    found, expected = np.empty((2, 3000), np.int64)
    open_source(copy, "web").read(0, found)
    open_source(tmp_path / "web", "web").read(0, expected)
    np.testing.assert_array_equal(found, expected)
    with store.failing(lambda *_: Reply(403, "AccessDenied")), pytest.raises(UserError, match="could not read it: access is"):
        copies.stage(source, tmp_path / "local")
    damaged = bytearray((tmp_path / "web" / "shard-00001.bin").read_bytes())
    damaged[100] ^= 1
    objects.write(source / "shard-00001.bin", bytes(damaged))
    with pytest.raises(UserError, match=r"s3://corpora/corpus/web/shard-00001.bin: altered: its checksum is not that of"):
        copies.stage(source, tmp_path / "fresh")
    objects.write(source / "shard-00001.bin", bytes(damaged[:-2]))
    with pytest.raises(UserError, match=r"shard-00001.bin: manifest.json announces \d+ bytes, found \d+; copy it again"):
        copies.stage(source, tmp_path / "fresh")


def test_a_manifest_in_a_bucket_is_checked_as_one_on_a_disk(store, tmp_path) -> None:
    with pytest.raises(UserError, match=r"web/manifest.json: no such object; expected a prepared source"):
        copies.stage(remote(f"s3://{BUCKET}/web"), tmp_path)
    objects.write(remote(f"s3://{BUCKET}/web/manifest.json"), b'{"format_version": 2, "shards": [{"name": "../evil"}]}')
    with pytest.raises(UserError, match=r"s3://corpora/web/manifest.json: "):
        copies.stage(remote(f"s3://{BUCKET}/web"), tmp_path)
    assert list(tmp_path.iterdir()) == []
