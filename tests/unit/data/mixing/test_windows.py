"""Sequences of several windows, and windows that shift from epoch to epoch: exact, complete, the same in every layout."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.loader.startup import write_many_shards
from megatron_synth.cli import main as cli
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import digest, load_file
from megatron_synth.config.schema import Config
from megatron_synth.data.loading.loader import Batch, Loader
from megatron_synth.data.loading.prefetch import Prefetcher
from megatron_synth.data.loading.run_data import open_data
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec, windows_in
from megatron_synth.data.mixing.schedule import Phase
from megatron_synth.data.shards.source import open_source
from megatron_synth.train.batch import LABELS, LOSS, SAMPLES, sums_per_source, to_device
from tests.support import SEQUENCE_LENGTH, write_config, write_corpus
from tests.unit.data.loading.test_loader import MemorySource

SHARES = (Fraction(1, 2), Fraction(1, 3), Fraction(1, 6))
LENGTH = 8
OFFSET = 10**6
"""Tokens of source k are k OFFSET + their place in its stream."""


def loader_of(number: int, *, shifted: bool = False, ranks: int = 1, rank: int = 0, micro: int = 2, **options: Any) -> Loader:
    """Three sources in windows of LENGTH tokens, `number` of them in a sequence."""
    sources = [MemorySource(name, size, OFFSET * k) for k, (name, size) in enumerate({"a": 5001, "b": 901, "c": 333}.items())]
    specs = [
        SourceSpec(
            source.name,
            share,
            windows_in(source.num_tokens, LENGTH, shifted=shifted),
            float("inf"),
            unique_windows=17 if source.name == "b" and not shifted else None,
            shift=LENGTH if shifted else 0,
        )
        for source, share in zip(sources, SHARES, strict=True)
    ]
    return Loader(
        MixturePlan(specs, 5),
        sources,
        sequence_length=number * LENGTH,
        windows_per_sequence=number,
        micro_batch_size=micro,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        **options,
    )


def delivered(batches: list[Batch], number: int) -> dict[int, list[int]]:
    """Tokens of each sample."""
    found: dict[int, list[int]] = {}
    for batch in batches:
        windows = batch.tokens.reshape(-1, LENGTH + 1)
        assert len(windows) == len(batch.samples) == len(batch.source_ids) == number * len(batch.tokens)
        for sample, source, tokens in zip(batch.samples.tolist(), batch.source_ids.tolist(), windows.tolist(), strict=True):
            assert tokens[0] // OFFSET == source and tokens == list(range(tokens[0], tokens[0] + LENGTH + 1))
            assert sample not in found
            found[sample] = tokens
    return found


@pytest.mark.slow
@given(
    st.sampled_from([1, 2, 3, 6, 8]),
    st.booleans(),
    st.sampled_from([1, 2, 3, 4, 7, 8]),
    st.integers(1, 8),
    st.sampled_from([0, 1]),
    st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 3)), min_size=1, max_size=3),
)
@settings(max_examples=50, deadline=None)
def test_every_layout_delivers_the_plan_from_any_stop(
    number: int, shifted: bool, ranks: int, micro: int, threads: int, runs: list[tuple[int, int]]
) -> None:
    size = 2 * ranks * micro * number
    plan = loader_of(number, shifted=shifted).plan
    parts = [
        Prefetcher(loader_of(number, shifted=shifted, ranks=ranks, rank=rank, micro=micro), size, threads=threads)
        for rank in range(ranks)
    ]
    for first, steps in runs:
        for step in range(first, first + steps):
            samples = np.arange(step * size, (step + 1) * size)
            found = delivered([b for part in parts for b in part.step(step * size)], number)
            sources, windows, offsets = plan.places(samples)
            begins = (sources * OFFSET + windows * LENGTH + offsets).tolist()
            assert {sample: found[sample][0] for sample in samples.tolist()} == dict(zip(samples.tolist(), begins, strict=True))
            assert len(found) == size
    for part in parts:
        part.close()


class Steps(torch.utils.data.Dataset[list[list[int]]]):
    """A rank's steps, for the workers of torch's DataLoader."""

    def __init__(self, loader: Loader, size: int):
        self.loader, self.size = loader, size

    def __len__(self) -> int:
        return 6

    def __getitem__(self, step: int) -> list[list[int]]:
        return [batch.tokens.tolist() for batch in self.loader.micro_batches(step * self.size, self.size)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing() -> None:
    steps = Steps(loader_of(3, shifted=True, ranks=2, rank=1), 24)
    expected = [steps[step] for step in range(len(steps))]
    for workers in range(5):
        how: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
        assert list(torch.utils.data.DataLoader(steps, batch_size=None, **how)) == expected


@pytest.mark.parametrize("number", [6, 12, 5])
def test_every_sequence_holds_the_sources_at_their_ratio(number: int) -> None:
    loader = loader_of(number, micro=4)
    places = np.zeros((number, 3))
    for step in range(50):
        for batch in loader.micro_batches(step * 16 * number, 16 * number):
            rows = batch.source_ids.reshape(-1, number)
            counts = np.stack([(rows == source).sum(axis=1) for source in range(3)], axis=1)
            off = np.abs(counts - number * np.array([float(share) for share in SHARES]))
            assert off.max() < (1e-9 if number % 6 == 0 else 2)  # the period is 6
            samples = np.sort(batch.samples.reshape(-1, number), axis=1)
            assert (samples[:, 0] % number == 0).all() and (np.diff(samples, axis=1) == 1).all()
            for source in range(3):
                places[:, source] += (rows == source).sum(axis=0)
    # no source has a place of its own: 800 sequences, five standard deviations
    share = places / 800
    assert np.abs(share - share.mean(axis=0)).max() < 5 * 0.5 / np.sqrt(800)


def test_a_label_is_the_next_token_of_its_own_source() -> None:
    loader = loader_of(6, micro=3, with_boundaries=True)
    section = {"sources": {"a": {"path": "a", "ratio": "1"}}, "document_masks": True, "eod_mask_loss": True}
    data = Config.model_validate(
        {"model": {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}, "data": section}
        | {"train": {"steps": 1, "global_batch_size": 1, "sequence_length": 48}}
    ).data
    for batch in loader.micro_batches(0, 36):
        moved = to_device(batch, torch.device("cpu"), data)
        assert moved.inputs.shape == moved.labels.shape == (3, 48)
        assert torch.equal(moved.labels, moved.inputs + 1)
        assert torch.equal(moved.inputs.reshape(-1, LENGTH)[:, 0] // OFFSET, moved.sources)
        # each window begins a document, in the line of all positions, in positions and in the loss
        assert moved.documents is not None and moved.loss_mask is not None
        assert set(range(0, 3 * 48, LENGTH)) <= set(moved.documents.cu_seqlens.tolist())
        assert moved.documents.position_ids.shape == moved.loss_mask.shape == (3, 48)
        assert not moved.documents.position_ids[:, ::LENGTH].any()
        starts = moved.inputs.reshape(-1, LENGTH)[:, 0] % OFFSET // LENGTH % LENGTH  # where MemorySource has a document begin
        masked = [(row, start - 1) for row, start in enumerate(starts.tolist()) if start]
        expected = torch.ones(18, LENGTH, dtype=torch.bool)
        expected[tuple(zip(*masked, strict=True))] = False
        assert torch.equal(moved.loss_mask.reshape(18, LENGTH), expected)
        # sums by source, window by window
        losses = torch.rand(3, 48)
        sums, _ = sums_per_source(losses, None, moved, 3)
        for source in range(3):
            own = (moved.sources == source)[:, None] & expected
            assert sums[LABELS, source] == own.sum() and sums[SAMPLES, source] == (moved.sources == source).sum()
            torch.testing.assert_close(sums[LOSS, source], losses.reshape(18, LENGTH)[own].double().sum())


@given(st.integers(2, 400), st.integers(1, 20), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_shifted_epoch_is_each_window_once_at_an_offset_of_its_own(num_tokens: int, length: int, seed: int) -> None:
    windows, plain = windows_in(num_tokens, length, shifted=True), windows_in(num_tokens, length)
    assert plain - 1 <= windows <= plain
    spec = SourceSpec("web", Fraction(1), windows, float("inf"), shift=length)
    if windows < 1:
        with pytest.raises(UserError, match="shift_windows"):
            MixturePlan([spec], seed)
        return
    plan = MixturePlan([spec], seed)
    _, found, offsets = plan.places(np.arange(30 * windows))
    np.testing.assert_array_equal(np.sort(found.reshape(30, windows), axis=1), np.tile(np.arange(windows), (30, 1)))
    by_epoch = offsets.reshape(30, windows)
    assert (by_epoch == by_epoch[:, :1]).all() and offsets.min() >= 0 and offsets.max() < length
    assert (found * length + offsets).max() + length + 1 <= num_tokens
    assert length < 4 or len(np.unique(offsets)) > 1
    plain_plan = MixturePlan([SourceSpec("web", Fraction(1), windows, float("inf"))], seed)
    assert plan.digest() != plain_plan.digest() and not plain_plan.places(np.arange(50))[2].any()


@given(st.integers(1, 40), st.sampled_from([2, 3, 6]), st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_a_limited_source_never_leaves_its_windows(unique: int, number: int, seed: int) -> None:
    """Windows in sequences, over phases: those of the subset, each once in every pass."""
    half, third = (Fraction(1, 2), Fraction(1, 2)), (Fraction(1, 3), Fraction(2, 3))
    specs = [SourceSpec("a", Fraction(0), 50, float("inf"), unique), SourceSpec("b", Fraction(0), 9, float("inf"))]
    plan = MixturePlan(specs, seed, [Phase(700, half), Phase(600, half, third, 7), Phase(None, third)])
    total = 900 * number
    sources, windows = plan.locate(np.arange(total))
    seen = windows[sources == 0]
    assert len(set(seen.tolist())) == min(unique, len(seen))
    whole = seen[: len(seen) // unique * unique].reshape(-1, unique)
    np.testing.assert_array_equal(np.sort(whole, axis=1), np.tile(np.sort(whole[0]), (len(whole), 1)))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    return write_config(folder / "config.yaml", write_corpus(folder / "corpus"))


def test_what_cannot_be_is_refused(config: Path) -> None:
    with pytest.raises(UserError, match=r"windows_per_sequence: 5 does not divide train.sequence_length = 32; nearest: 2 or 4"):
        load_file(Config, config, ["data.windows_per_sequence=5"])
    with pytest.raises(UserError, match=r"web.shift_windows: true would show tokens beside the windows that unique_tokens"):
        load_file(Config, config, ["data.sources.web.shift_windows=true", "data.sources.web.unique_tokens=640"])


def test_digests_tell_how_windows_are_cut(config: Path) -> None:
    cuts: tuple[list[str], ...] = (
        [],
        ["data.windows_per_sequence=4"],
        ["data.windows_per_sequence=2"],
        ["data.sources.qa.shift_windows=true"],
    )
    configs = [load_file(Config, config, one) for one in cuts]
    opened = [open_data(one) for one in configs]
    assert len({digest(one) for one in configs}) == len({one.digest for one in opened}) == 4
    assert len({one.prefix_digest(100) for one in opened}) == 4
    assert digest(load_file(Config, config, ["data.windows_per_sequence=1"])) == digest(configs[0])


@pytest.mark.parametrize("sample", [0, 5, 639])
def test_show_finds_the_tokens_of_a_shifted_window(sample: int, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data.windows_per_sequence=4", "data.sources.web.shift_windows=true", "data.sources.qa.shift_windows=true"]
    assert cli.main(["mix", "plan", str(config), *arguments]) == 0
    assert "640 samples of 8 tokens in sequences of 4 = 5,120 tokens" in capsys.readouterr().out
    assert cli.main(["mix", "show", str(config), str(sample), *arguments]) == 0
    out = capsys.readouterr().out
    data = open_data(load_file(Config, config, arguments))
    source, window, offset = (int(part[0]) for part in data.plan.places([sample]))
    begin = window * (SEQUENCE_LENGTH // 4) + offset
    first = sample // 4 * 4
    assert f"beside samples {first} to {first + 3} in its sequence" in out
    assert f"begin at token {offset} in this epoch: tokens {begin} to {begin + 8} of the source" in out
    assert f"source   {data.plan.names[source]}" in out


@pytest.mark.parametrize("shards", [1, 100, 10_000])
def test_memory_does_not_grow_with_the_run_whatever_the_number_of_shards(shards: int, tmp_path: Path) -> None:
    source = open_source(write_many_shards(tmp_path / "s", shards, 600), "s")
    spec = SourceSpec("s", Fraction(1), source.num_windows(64), float("inf"))
    loader = Loader(
        MixturePlan([spec], 1), [source], sequence_length=64, micro_batch_size=8, data_parallel_rank=0, data_parallel_size=1
    )
    list(loader.micro_batches(10**5 // 64 * 64, 64))
    tracemalloc.start()
    try:
        for total in (10**7, 10**9, 10**12):
            for step in range(2):
                for batch in loader.micro_batches((total // 64 + step) * 64, 64):
                    assert batch.tokens.shape == (8, 65)
        assert tracemalloc.get_traced_memory()[1] < 4 * 4e6  # the loader keeps some tables of rows, whatever the run
    finally:
        tracemalloc.stop()
