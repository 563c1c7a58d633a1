"""A corpus as a source of `prepare`: its text, and the record of how it was made."""

from __future__ import annotations

import json

import pytest

from benchmarks.synthesis.stub import RunningStub
from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.synthesis.run import run


def settings(folder, corpus, **source):
    sources = {"rephrased": {"kind": "rephrased", "synthesized": str(corpus), **source}}
    return PrepareConfig.model_validate(
        {"output": str(folder / "prepared"), "tokenizer": {"train": {"vocab_size": 300}}, "sources": sources}
    )


@pytest.fixture
def corpus(synthesis):
    with RunningStub() as stub:
        config = synthesis(stub.url)
        run(config)
    return config.folder


def test_the_record_goes_into_the_manifest(corpus, tmp_path):
    found = prepare(settings(tmp_path, corpus))
    assert found is not None
    (one,) = found
    record = json.loads((corpus / "synthesis.json").read_text())
    manifest = json.loads((tmp_path / "prepared" / "rephrased" / "manifest.json").read_text())
    assert manifest["generator"] == "stub"
    assert manifest["kind"] == "rephrased"
    assert manifest["made"]["inputs"]["record"] == record
    assert record["account"]["asked"] > record["documents"] == one.manifest.counts.documents > 10
    assert prepare(settings(tmp_path, corpus)) is None  # it is up to date


@pytest.mark.parametrize(
    ("harm", "source", "expected"),
    [
        (lambda folder: (folder / "synthesis.json").unlink(), {}, "no finished corpus"),
        (lambda folder: None, {"kind": "qa"}, "holds text of kind rephrased, found qa"),
        (
            lambda folder: (folder / "corpus" / "part-00000.jsonl").write_text('{"text": "x"}\n'),
            {},
            "altered since it was made",
        ),
        (lambda folder: (folder / "synthesis.json").write_text("{"), {}, "damaged: not valid JSON"),
    ],
)
def test_a_corpus_that_is_not_what_it_says_is_refused(corpus, tmp_path, harm, source, expected):
    harm(corpus)
    with pytest.raises(UserError, match=expected):
        prepare(settings(tmp_path, corpus, **source))
    assert not (tmp_path / "prepared").exists()
