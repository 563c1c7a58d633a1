"""Packing: every token once, short documents whole, little padding; and through `prepare` to the windows of a run."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_synth.cli.prepare import main
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.data.loading.loader import Loader, validation_batches
from megatron_synth.data.loading.run_data import open_data
from megatron_synth.data.preparing.packing import PADDING, arrange, cut_documents, pack
from megatron_synth.data.shards.source import open_source
from megatron_synth.train.batch import needs_boundaries, to_device

EOD = 0


@settings(deadline=None, max_examples=300)
@given(lengths=st.lists(st.integers(1, 70), max_size=60), sequence_length=st.integers(1, 30))
def test_every_token_once_and_short_documents_whole(lengths, sequence_length):
    lengths = np.array(lengths, dtype=np.int32)
    packed = pack(lengths, sequence_length)
    # token t of document d is the number d * 100 + t + 1
    tokens = np.concatenate([np.arange(length) + 100 * d + 1 for d, length in enumerate(lengths)] or [np.empty(0, np.int64)])
    stream, entries, _ = arrange(packed, 0, None, tokens, lengths, EOD)
    assert sorted(stream[stream != EOD].tolist()) == sorted(tokens.tolist())
    assert entries.sum() == stream.size == packed.sizes.sum() and not (packed.sizes % sequence_length).any()
    windows = [set((row[row != EOD] - 1) // 100) for row in stream.reshape(-1, sequence_length)]
    for document, length in enumerate(lengths.tolist()):
        # as few windows as can be: only documents longer than a window are in more than one
        assert sum(document in window for window in windows) == -(-length // sequence_length)
    ends = np.cumsum(entries)
    for start, end in zip(ends - entries, ends, strict=True):
        part = stream[start:end]
        assert (np.diff(part) == 1).all(), "an entry is a run of one document, or one token of padding"
        assert part.size == 1 or EOD not in part
    # bins can be asked for in any parts
    cut = len(packed.sizes) // 2
    parts = [arrange(packed, 0, cut, tokens, lengths, EOD), arrange(packed, cut, None, tokens, lengths, EOD)]
    np.testing.assert_array_equal(np.concatenate([part for part, *_ in parts]), stream)
    # no two bins could have been one
    rests = packed.sizes - np.add.reduceat(np.append(packed.documents == PADDING, False), packed.bins[:-1])
    used = np.sort(rests[packed.sizes == sequence_length])
    assert len(used) < 2 or used[0] + used[1] > sequence_length


def test_padding_is_small_for_documents_as_they_are():
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(6, 1, 5000), 2, None).astype(np.int32)
    padding = pack(lengths, 2048).sizes.sum() - lengths.sum()
    assert 0 <= padding < 0.001 * lengths.sum() + 2048
    assert cut_documents(lengths, 2048) > 1000 > (lengths > 2048).sum()


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), length=st.integers(1, 20), offset=st.integers(0, 50))
def test_cut_documents_counts_what_a_plain_stream_cuts(lengths, length, offset):
    places = np.repeat(np.arange(len(lengths)), lengths)
    windows = (offset + np.arange(places.size)) // length
    expected = sum(len(set(windows[places == document])) > 1 for document in range(len(lengths)))
    assert cut_documents(np.array(lengths), length, offset) == expected


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Outputs of the same text: packed by one worker and by two, shuffled and not, and end to end."""
    folder = tmp_path_factory.mktemp("packed")
    generator = np.random.default_rng(1)
    texts = [" ".join(map(str, generator.integers(0, 99, words))) for words in generator.integers(1, 60, 900)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "prepare.yaml").write_text(
        f"""
output: {folder}/plain
tokenizer: {{train: {{vocab_size: 300}}}}
sources:
  web: {{kind: natural, input: {folder}/text.jsonl, holdout: 1/10}}
shard_tokens: 9000
"""
    )
    for name, *settings_ in (
        ("plain",),
        ("one", "packing.sequence_length=64"),
        ("two", "packing.sequence_length=64", "--workers", "2"),
        ("shuffled", "packing.sequence_length=64", "shuffle.seed=3"),
    ):
        assert main([str(folder / "prepare.yaml"), f"output={folder}/{name}", "--workers", "1", *settings_]) == 0
    return folder


def shards_of(source):
    return [source.shard(number) for number in range(len(source.manifest.shards))]


@pytest.mark.parametrize("name", ["one", "shuffled"])
def test_windows_of_a_packed_source_begin_with_a_document_or_go_on_with_a_long_one(prepared, name):
    source, plain = open_source(prepared / name / "web", "web"), open_source(prepared / "plain" / "web", "web")
    packing = source.manifest.packing
    assert plain.manifest.packing is None
    assert source.manifest.counts.documents == plain.manifest.counts.documents
    assert source.num_tokens == plain.num_tokens + packing.padding_tokens == source.manifest.counts.tokens
    # and one token, the label that the last window would lack
    assert source.num_tokens % 64 == 1 and source.num_windows(64) == source.num_tokens // 64
    assert len(source.manifest.shards) > 2
    lengths = np.concatenate([np.diff([*s.document_starts(0, s.num_tokens).tolist(), s.num_tokens]) for s in shards_of(plain)])
    assert packing.cut_documents == (lengths > 64).sum() > 0
    if name == "one":
        assert packing.cut_without == cut_documents(lengths, 64) > packing.cut_documents
    begin = [source.document_starts(window, 64)[:1].tolist() for window in range(source.num_windows(64))]
    # a long document's later windows have no start at all
    assert all(starts in ([0], []) for starts in begin)
    assert begin.count([]) == (lengths[lengths > 64] // 64 - 1).sum()
    # the same tokens, padding apart
    stored = [np.concatenate([shard.tokens for shard in shards_of(one)]) for one in (source, plain)]
    eod = source.manifest.tokenizer.eod_id
    counts = [np.bincount(tokens, minlength=300) for tokens in stored]
    counts[1][eod] += packing.padding_tokens
    assert counts[0].tolist() == counts[1].tolist()


def test_any_number_of_workers_packs_alike_and_validation_is_left_as_it_is(prepared):
    def shards(name, source):
        return [path.read_bytes() for path in sorted((prepared / name / source).glob("shard-*"))]

    assert shards("one", "web") == shards("two", "web") != shards("plain", "web")
    assert shards("one", "web-valid") == shards("plain", "web-valid")
    assert open_source(prepared / "one" / "web-valid", "v").manifest.packing is None


def test_another_sequence_length_is_refused(prepared):
    path = prepared / "run.yaml"
    path.write_text(
        f"""
model: {{hidden_size: 32, num_layers: 2, num_attention_heads: 2, ffn_hidden_size: 64}}
data: {{sources: {{web: {{path: {prepared}/one/web, ratio: 1}}}}}}
train: {{steps: 2, global_batch_size: 2, micro_batch_size: 1, sequence_length: 64}}
optim: {{lr: 1e-3}}
"""
    )
    assert open_data(load_file(Config, path, [])).plan.num_windows[0] > 0
    with pytest.raises(UserError, match=r"was packed for windows of 64 tokens, train.sequence_length is 32"):
        open_data(load_file(Config, path, ["train.sequence_length=32"]))
    # windows of the packed length, several in a sequence, are whole; shifted ones are not
    assert open_data(load_file(Config, path, ["train.sequence_length=256", "data.windows_per_sequence=4"])).window_length == 64
    with pytest.raises(
        UserError, match=r"64 tokens, train.sequence_length / 4 \(data.windows_per_sequence\) is 16: .* to 256, or"
    ):
        open_data(load_file(Config, path, ["data.windows_per_sequence=4"]))
    with pytest.raises(UserError, match=r"web.shift_windows: .* was packed"):
        open_data(load_file(Config, path, ["data.sources.web.shift_windows=true"]))


@pytest.mark.parametrize("flags", ["", "document_masks: true", "document_masks: true, eod_mask_loss: true"])
def test_padding_is_in_no_loss_and_all_text_is(prepared, flags):
    """Each label of a packed source that is text of the document before it counts, with whatever masks; padding never does."""
    path = prepared / "run.yaml"
    path.write_text(
        f"""
model: {{hidden_size: 32, num_layers: 2, num_attention_heads: 2, ffn_hidden_size: 64}}
data: {{sources: {{web: {{path: {prepared}/one/web, ratio: 1, max_epochs: 1}}}}, {flags}}}
train: {{steps: 1, global_batch_size: 1, micro_batch_size: 1, sequence_length: 64}}
optim: {{lr: 1e-3}}
"""
    )
    config = load_file(Config, path, [])
    data = open_data(config)
    (source,) = data.sources
    windows = source.num_windows(64)
    assert needs_boundaries(config.data, data.sources)
    loader = Loader(
        data.plan, data.sources, sequence_length=64, micro_batch_size=1, data_parallel_rank=0, data_parallel_size=1,
        with_boundaries=True,
    )  # fmt: skip
    document = np.empty(source.num_tokens, np.int64)
    starts = np.concatenate([source.document_starts(window, 64) + 64 * window for window in range(windows + 1)])
    document[:] = np.searchsorted(starts, np.arange(source.num_tokens), side="right")
    lengths = np.bincount(document)
    trained = np.zeros(source.num_tokens, np.int64)
    for sample in range(windows):
        for batch in loader.micro_batches(sample, 1):
            found = to_device(batch, torch.device("cpu"), config.data)
            _, places, _ = data.plan.places(batch.samples)
            labels = np.arange(64) + int(places[0]) * 64 + 1
            trained[labels] += found.loss_mask.numpy()[0]
    same = np.concatenate([[False], document[1:] == document[:-1]])
    padding = lengths[document] == 1
    assert trained[same].tolist() == [1] * same.sum(), "each window once, the last included"
    assert not trained[padding].any()
    crossing = ~same & ~padding
    crossing[::64] = False  # the first token of a window is no label of the window before it
    assert set(trained[crossing].tolist()) == ({0} if "eod" in flags else {1})
    # and as domains of an evaluation
    for batch in validation_batches(source, 64, 1, 0, 1, with_boundaries=True):
        at = int(batch.samples[0]) * 64 + 1
        mask = to_device(batch, torch.device("cpu"), config.data, batch.valid).loss_mask.numpy()[0]
        assert mask.tolist() == trained[at : at + 64].astype(bool).tolist()
