"""The plan: a function of n alone, each window once per epoch, and a refusal when a source is too small."""

from __future__ import annotations

import itertools
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_synth.config.errors import UserError
from megatron_synth.data.loading.dealing import deal
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
from megatron_synth.data.mixing.schedule import Phase


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
        plan.check(5000, window_length=4096)
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


# ---- phases


WEB, HALF, QA = (Fraction(1), Fraction(0)), (Fraction(1, 2), Fraction(1, 2)), (Fraction(1, 5), Fraction(4, 5))
PHASES = [Phase(100, WEB), Phase(203, WEB, QA, 17), Phase(151, HALF), Phase(None, QA)]


@st.composite
def phased_plans(draw: st.DrawFn) -> MixturePlan:
    """Two to four sources, two to five phases, some sources with a limit of unique windows."""
    number = draw(st.integers(2, 4))

    def ratios() -> tuple[Fraction, ...]:
        weights = draw(st.lists(st.integers(0, 9), min_size=number, max_size=number).filter(any))
        return tuple(Fraction(weight, sum(weights)) for weight in weights)

    specs = []
    for source in range(number):
        windows = draw(st.integers(1, 80))
        unique = draw(st.none() | st.integers(1, windows))
        specs.append(SourceSpec(f"s{source}", Fraction(0), windows, 1.0, unique))
    phases = []
    for _ in range(draw(st.integers(1, 4))):
        samples = draw(st.integers(1, 200))
        ramp_to = ratios() if draw(st.booleans()) else None
        phases.append(Phase(samples, ratios(), ramp_to, draw(st.integers(1, min(9, samples))) if ramp_to else 1))
    return MixturePlan(specs, draw(st.integers(0, 99)), [*phases, Phase(None, ratios())])


@given(phased_plans())
@settings(max_examples=80, deadline=None)
def test_epochs_go_on_across_phases_and_never_leave_the_subset(plan: MixturePlan) -> None:
    ids, windows = plan.locate(np.arange(1500))
    for number, source in enumerate(plan.sources):
        seen = windows[ids == number]
        size = source.epoch_windows
        whole = len(seen) // size * size
        epochs = seen[:whole].reshape(-1, size)
        assert len({tuple(sorted(epoch)) for epoch in epochs.tolist()}) <= 1  # the same windows in every epoch
        assert all(len(set(epoch)) == size for epoch in epochs.tolist())  # each of them once
        assert len(set(seen[whole:].tolist())) == len(seen) - whole
        assert len(set(seen.tolist())) <= size
        assert seen.size == 0 or (seen.min() >= 0 and seen.max() < source.num_windows)


@given(phased_plans(), st.integers(1, 8), st.sampled_from([1, 2, 3, 4, 7, 8]), st.integers(1, 3), st.lists(st.integers(0, 4)))
@settings(max_examples=60, deadline=None)
def test_all_layouts_and_restarts_deliver_the_plan(
    plan: MixturePlan, micro: int, ranks: int, number: int, stops: list[int]
) -> None:
    """Every rank asks a fresh plan after each restart; together they get each sample of the plan once."""
    size = micro * ranks * number
    expected = np.stack(plan.locate(np.arange(5 * size)))
    found = np.full_like(expected, -1)
    for step in range(5):
        fresh = pickle.loads(pickle.dumps(plan)) if step in stops else plan
        for rank in range(ranks):
            samples = deal(
                plan.seed, step * size, size, micro_batch_size=micro, data_parallel_rank=rank, data_parallel_size=ranks
            ).reshape(-1)
            assert np.all(found[0, samples] == -1)
            found[:, samples] = fresh.locate(samples)
    np.testing.assert_array_equal(found, expected)


def test_extending_a_run_or_changing_its_future_keeps_the_past() -> None:
    """200 of 200 batches: a run made longer by a phase, and one whose last phase is cut and followed by another."""
    specs = [SourceSpec("web", Fraction(0), 700), SourceSpec("qa", Fraction(0), 300)]
    size, batches = 8, 200
    consumed = size * batches
    plan = MixturePlan(specs, 3, PHASES)
    cut = Phase(consumed - 454, QA)
    joined = [*specs[:1], SourceSpec("new", Fraction(0), 90), *specs[1:]]

    def with_new(ratios: tuple[Fraction, ...]) -> tuple[Fraction, ...]:
        return ratios[0], Fraction(0), ratios[1]

    third = Fraction(1, 3)
    wide = [Phase(p.samples, with_new(p.ratios), p.ramp_to and with_new(p.ramp_to), p.blocks) for p in [*PHASES[:-1], cut]]
    same, more = 0, MixturePlan(joined, 3, [*wide, Phase(None, (third, third, third))])
    for other in (MixturePlan(specs, 3, [*PHASES[:-1], cut, Phase(80, WEB)]), more):
        for batch in range(batches):
            samples = np.arange(batch * size, (batch + 1) * size)
            (ids, windows), (other_ids, other_windows) = plan.locate(samples), other.locate(samples)
            names = [plan.names[number] for number in ids], [other.names[number] for number in other_ids]
            same += names[0] == names[1] and np.array_equal(windows, other_windows)
        assert other.prefix_digest(consumed) == plan.prefix_digest(consumed)
        assert other.prefix_digest(consumed + 1) != plan.prefix_digest(consumed + 1)
        assert other.digest() != plan.digest()
    assert same == 2 * batches


def test_the_prefix_digest_names_what_determines_the_past() -> None:
    specs = [SourceSpec("web", Fraction(0), 700), SourceSpec("qa", Fraction(0), 300)]
    base = MixturePlan(specs, 3, PHASES)
    at = 200  # in the ramp
    others = [
        MixturePlan(specs, 4, PHASES),
        MixturePlan(specs[::-1], 3, PHASES),
        MixturePlan([SourceSpec("web", Fraction(0), 701), specs[1]], 3, PHASES),
        MixturePlan([specs[0], SourceSpec("qa", Fraction(0), 300, 1.0, 299)], 3, PHASES),
        MixturePlan(specs, 3, [Phase(101, WEB), *PHASES[1:]]),
        MixturePlan(specs, 3, [PHASES[0], Phase(204, WEB, QA, 17), *PHASES[2:]]),
        MixturePlan(specs, 3, [PHASES[0], Phase(203, WEB, QA, 16), *PHASES[2:]]),
        MixturePlan(specs, 3, [PHASES[0], Phase(203, WEB, HALF, 17), *PHASES[2:]]),
    ]
    assert len({base.prefix_digest(at), *(plan.prefix_digest(at) for plan in others)}) == len(others) + 1
    # what was not used yet may still change
    assert base.prefix_digest(100) == others[3].prefix_digest(100) == others[5].prefix_digest(100)
    assert base.prefix_names(100) == ("web",) and base.prefix_names(101) == ("web", "qa")
    # a mixture without phases is a first phase without end
    plain = MixturePlan([SourceSpec("web", Fraction(1, 2), 70), SourceSpec("qa", Fraction(1, 2), 11)], 1)
    first = MixturePlan(
        [SourceSpec("web", Fraction(0), 70), SourceSpec("qa", Fraction(0), 11)], 1, [Phase(50, HALF), Phase(9, QA)]
    )
    assert plain.prefix_digest(50) == first.prefix_digest(50) != first.prefix_digest(51)
    # all unique windows are the same as no limit
    all_unique = [SourceSpec("web", Fraction(1, 2), 70, 1.0, 70), SourceSpec("qa", Fraction(1, 2), 11)]
    assert MixturePlan(all_unique, 1).digest() == plain.digest()


def test_a_limit_of_unique_windows_is_nested_and_the_same_for_every_mixture() -> None:
    def subset(unique: int, ratio: str, seed: int = 1, windows: int = 500) -> set[int]:
        rest = SourceSpec("web", 1 - Fraction(ratio), 40, float("inf"))
        plan = MixturePlan([rest, SourceSpec("qa", Fraction(ratio), windows, float("inf"), unique)], seed)
        ids, found = plan.locate(np.arange(12 * unique))
        return set(found[ids == 1].tolist())

    sizes = [1, 7, 100, 499, 500]
    subsets = [subset(size, "1/2") for size in sizes]
    assert [len(windows) for windows in subsets] == sizes
    assert all(small < large for small, large in itertools.pairwise(subsets))
    assert subset(100, "1/5") == subsets[2] != subset(100, "1/2", seed=2)
    # spread over the whole source: 100 draws of 500, cut into fifths
    assert min(np.bincount([window // 100 for window in subsets[2]], minlength=5)) > 8


def test_limits_that_a_source_cannot_fill_are_refused() -> None:
    for unique in (0, 71):
        with pytest.raises(UserError, match=rf"web\.unique_tokens: gives {unique} whole windows, the source has 70"):
            MixturePlan([SourceSpec("web", Fraction(1), 70, 1.0, unique)], 1)


def test_epochs_are_counted_on_the_subset_and_in_phases() -> None:
    limited = MixturePlan([SourceSpec("web", Fraction(1), 70, 2.0, 10)], 1)
    limited.check(20)
    with pytest.raises(
        UserError, match=r"web: has 10 unique windows \(1280 tokens\).* needs 21, 2.100 epochs; max_epochs 2 allows 20"
    ):
        limited.check(21, 128)
    specs = [SourceSpec("web", Fraction(0), 700, 1.0), SourceSpec("qa", Fraction(0), 150, 1.0)]
    plan = MixturePlan(specs, 3, PHASES)
    longest = plan.longest_run(1)
    assert longest is not None
    assert plan.counts(longest)[1] == 150 < plan.counts(longest + 1)[1]
    with pytest.raises(
        UserError, match=rf"the phases need \d+ of 900 samples, .* Runs out after sample {longest}, in data.phases.2: "
    ):
        plan.check(900)
    plan.check(longest)
    ending = MixturePlan(specs, 3, PHASES[:-1])
    with pytest.raises(UserError, match=r"data.phases: end after 454 samples \(4540 tokens\), the run has 455 \(4550 tokens\)"):
        ending.check(455, 10)
    assert MixturePlan(specs, 3, [*PHASES[:2], Phase(None, WEB)]).longest_run(1) is None


@given(phased_plans())
@settings(max_examples=60, deadline=None)
def test_the_longest_run_is_the_longest(plan: MixturePlan) -> None:
    ids, _ = plan.locate(np.arange(3000))
    for number, source in enumerate(plan.sources):
        longest, allowed = plan.longest_run(number), source.allowed_samples
        where = np.flatnonzero(ids == number)
        assert allowed is not None
        if len(where) > allowed:
            assert longest == where[allowed]
        else:
            assert longest is None or longest >= 3000
