"""Names of objects: what is plain is taken, all else is refused before it is asked for, and no secret is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_synth.cli import train
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import load_file
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.config.schema import Config
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.storage.faults import scrubbed
from megatron_synth.storage.remote import is_remote, location_of, remote
from tests.support import write_config


def test_a_path_with_a_scheme_is_remote_and_all_else_is_a_file() -> None:
    found = location_of("s3://bucket/corpus/web.jsonl.gz")
    assert str(found) == "s3://bucket/corpus/web.jsonl.gz" and found.name == "web.jsonl.gz" and found.suffix == ".gz"
    assert str(remote("s3://bucket/corpus/") / "a") == "s3://bucket/corpus/a"
    assert location_of("data/web") == Path("data/web") and not is_remote("data/s3:/x") and not is_remote(Path("s3://x"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/file", r"data.sources.web.path: ftp://host/file: expected a path, or one that begins with s3://"),
        ("http://host/file", r"http://host/file: expected a path, or one that begins with"),
        ("s3://bucket/../other/file", r"expected a bucket and plain names"),
        ("s3://bucket//file", r"expected a bucket and plain names"),
        ("s3://bucket/a\nb", r"expected a bucket and plain names"),
        ("s3://bucket/a\\b", r"expected a bucket and plain names"),
        ("s3://", r"expected a bucket and plain names"),
        ("s3://bucket/" + 3000 * "x", r"in at most 2048 characters"),
    ],
)
def test_what_is_not_plain_is_refused(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        remote(url, "data.sources.web.path")


@pytest.mark.parametrize(
    "url", ["https://user:hidden@host/a.jsonl", "https://host/a.jsonl?X-Amz-Signature=hidden", "s3://k:hidden@bucket/a"]
)
def test_credentials_in_a_name_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UserError, match="credentials come from the environment") as caught:
        remote(url)
    assert "hidden" not in str(caught.value)


def test_what_is_written_in_place_needs_a_disk(tmp_path) -> None:
    write_config(tmp_path / "run.yaml", tmp_path)
    with pytest.raises(UserError, match=r"--run-dir: s3:/bucket/run: expected a folder on a disk; .* checkpoint.upload_to"):
        train.main([str(tmp_path / "run.yaml"), "--run-dir", "s3://bucket/run"])
    source = {"kind": "natural", "builtin": "natural"}
    settings = {"output": "s3://bucket/out", "tokenizer": {"train": {"vocab_size": 300}}, "sources": {"s": source}}
    with pytest.raises(UserError, match=r"output: s3://bucket/out is in object storage: prepare to a folder on a disk"):
        prepare(PrepareConfig.model_validate(settings))


@pytest.mark.parametrize(
    "setting",
    [
        "data.staging=s3://bucket/a",
        "data.cache=s3://bucket/a",
        "data.answers.facts.path=s3://bucket/a.jsonl",
    ],
)
def test_settings_that_need_a_disk_refuse_a_scheme(tmp_path, setting: str) -> None:
    write_config(tmp_path / "run.yaml", tmp_path)
    with pytest.raises(UserError, match=rf"{setting.partition('=')[0]}: expected a path on a disk, not one in object storage"):
        load_file(Config, tmp_path / "run.yaml", [setting])


def test_an_error_that_quotes_a_secret_is_shown_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    assert scrubbed("signed with very-secret, refused") == "signed with ..., refused"
