"""Fixtures of the tests of `prepare`."""

import os

import pytest

from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.data.tokenizer import train_tokenizer
from tests.unit.data.preparing.support import EOD, TEXTS, jsonl


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
