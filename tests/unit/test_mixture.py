"""The plan: a function of n alone, each window once per epoch, and a refusal when a source is too small."""

from __future__ import annotations

import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_synth.config.errors import UserError
from megatron_synth.data.mixture import MixturePlan, SourceSpec


def spec(name: str, ratio: str, num_windows: int = 1000, max_epochs: float = 100.0) -> SourceSpec:
    return SourceSpec(name, Fraction(ratio), num_windows, max_epochs)


WEB_QA = [spec("web", "2/3", 70), spec("qa", "1/3", 11)]


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 60)), min_size=1, max_size=6),
    st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_each_epoch_is_each_window_once_in_a_new_order(sources: list[tuple[int, int]], seed: int) -> None:
    total = sum(weight for weight, _ in sources)
    plan = MixturePlan([SourceSpec(f"s{i}", Fraction(w, total), n) for i, (w, n) in enumerate(sources)], seed)
    ids, windows = plan.locate(np.arange(3 * max(n * total // w + total for w, n in sources)))
    for source, (_, num_windows) in enumerate(sources):
        seen = windows[ids == source]
        epochs = seen[: len(seen) // num_windows * num_windows].reshape(-1, num_windows)
        assert len(epochs) >= 2
        np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(num_windows), (len(epochs), 1)))
        if num_windows > 20:
            assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)


def test_locate_is_a_function_of_the_sample_alone() -> None:
    plan = MixturePlan([spec("web", "0.67"), spec("qa", "0.2", 50), spec("books", "0.1", 3), spec("code", "0.03", 1)], 7)
    ids, windows = plan.locate(np.arange(40_000))
    order = np.random.default_rng(0).permutation(40_000)
    for part in np.split(order, [1, 100, 20_000]):
        some_ids, some_windows = plan.locate(part)
        np.testing.assert_array_equal(some_ids, ids[part])
        np.testing.assert_array_equal(some_windows, windows[part])
    for samples in (0, 1, 99, 12_345):
        np.testing.assert_array_equal(plan.counts(samples), np.bincount(ids[:samples], minlength=4))
    again = pickle.loads(pickle.dumps(plan))
    np.testing.assert_array_equal(again.locate(order)[1], windows[order])
    assert plan.locate(np.arange(0))[0].shape == (0,)


def test_the_order_of_a_source_depends_on_its_name_and_the_seed_only() -> None:
    def windows_of_web(*sources: SourceSpec, seed: int = 1) -> np.ndarray:
        plan = MixturePlan(sources, seed)
        ids, windows = plan.locate(np.arange(4000))
        return windows[ids == plan.names.index("web")][:300]

    alone = windows_of_web(spec("web", "1", 70))
    np.testing.assert_array_equal(alone, windows_of_web(spec("web", "1/2", 70), spec("qa", "1/2", 9)))
    np.testing.assert_array_equal(alone, windows_of_web(spec("a", "1/7"), spec("web", "4/7", 70), spec("b", "2/7")))
    assert not np.array_equal(alone, windows_of_web(spec("web", "1", 70), seed=2))
    # sources with equal sizes have orders of their own
    plan = MixturePlan([spec("web", "1/2", 70), spec("qa", "1/2", 70)], 1)
    ids, windows = plan.locate(np.arange(140))
    assert not np.array_equal(windows[ids == 0], windows[ids == 1])


def test_digest_names_what_determines_the_order() -> None:
    base = MixturePlan(WEB_QA, 1).digest()
    assert base == MixturePlan([spec("web", "2/3", 70, 1.0), spec("qa", "1/3", 11, 1.0)], 1).digest()
    others = [
        MixturePlan(WEB_QA, 2),
        MixturePlan(WEB_QA[::-1], 1),
        MixturePlan([spec("web", "1/2", 70), spec("qa", "1/2", 11)], 1),
        MixturePlan([spec("web", "2/3", 71), spec("qa", "1/3", 11)], 1),
        MixturePlan([spec("web", "2/3", 70), spec("textbook", "1/3", 11)], 1),
    ]
    assert len({base, *(plan.digest() for plan in others)}) == 6
    assert base == GOLDEN_DIGEST


GOLDEN_DIGEST = "76250f8c3388f7a5"


def test_all_small_sources_are_named_with_numbers_and_the_advice_holds() -> None:
    sources = [spec("web", "0.5", 10_000, 1.0), spec("qa", "0.3", 400, 2.5), spec("books", "0.2", 99, 4.0)]
    plan = MixturePlan(sources, 1)
    assert plan.required_windows(5000) == {"web": 2500, "qa": 1500, "books": 1000}
    with pytest.raises(UserError) as caught:
        plan.check(5000, sequence_length=4096)
    message = str(caught.value)
    assert "web" not in message
    for fragment in (
        "qa: has 400 windows (1638400 tokens); ratio 3/10 of 5000 samples needs 1500, 3.750 epochs; ",
        "max_epochs 2.5 allows 1000. ",
        "Lower its ratio to 0.2 or set max_epochs to 3.75",
        "books: has 99 windows",
        "needs 1000, 10.101 epochs; max_epochs 4 allows 396. Lower its ratio to 0.0792 or set max_epochs to 10.102",
    ):
        assert fragment in message
    longest = int(message.split("or train at most ")[1].split()[0])
    plan.check(longest)
    with pytest.raises(UserError):
        plan.check(longest + 1)
    MixturePlan([spec("web", "0.7208", 10_000, 1.0), spec("qa", "0.2", 400, 2.5), spec("books", "0.0792", 99, 4.0)], 1).check(
        5000
    )
    MixturePlan([sources[0], spec("qa", "0.3", 400, 3.75), spec("books", "0.2", 99, 10.102)], 1).check(5000)


def test_epochs_are_the_decimal_that_was_typed() -> None:
    assert spec("web", "1", 100, 0.29).allowed_samples == 29  # 0.29 * 100 = 28.999999999999996 in binary
    assert spec("web", "1", 3, 0.34).allowed_samples == 1
    MixturePlan([spec("web", "1", 1, float("inf"))], 1).check(10**9)


def test_wrong_mixtures_are_refused() -> None:
    with pytest.raises(UserError, match=r"web 2/3, qa 333/1000\): the ratios sum to 2999/3000 .*difference is -1/3000"):
        MixturePlan([spec("web", "2/3"), spec("qa", "0.333")], 1)
    with pytest.raises(UserError, match="qa, books: not one full window"):
        MixturePlan([spec("web", "1/2"), spec("qa", "1/4", 0), spec("books", "1/4", 0)], 1)
    with pytest.raises(UserError, match="more than once: web"):
        MixturePlan([spec("web", "1/2"), spec("web", "1/2")], 1)
