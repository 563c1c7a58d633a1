"""Mixtures that change: every phase within its bound at every prefix, and the past untouched by what follows."""

from __future__ import annotations

import dataclasses
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_synth.config.errors import ConfigError, UserError
from megatron_synth.config.load import validate
from megatron_synth.config.rules import check
from megatron_synth.config.schema import Config, DataConfig
from megatron_synth.data.mixing.apportionment import apportionment
from megatron_synth.data.mixing.schedule import Phase, Schedule, phases_of, whole_samples


@st.composite
def mixtures(draw: st.DrawFn, sources: int) -> tuple[Fraction, ...]:
    """Ratios of which some may be 0."""
    weights = draw(st.lists(st.integers(0, 30), min_size=sources, max_size=sources).filter(any))
    return tuple(Fraction(weight, sum(weights)) for weight in weights)


@st.composite
def schedules(draw: st.DrawFn, last_open: bool = False) -> list[Phase]:
    """One to four phases over one to five sources."""
    sources = draw(st.integers(1, 5))
    phases = []
    for _ in range(draw(st.integers(1, 4))):
        samples = draw(st.integers(1, 150))
        if draw(st.booleans()):
            ramp_to, blocks = draw(mixtures(sources)), draw(st.integers(1, min(samples, 40)))
            phases.append(Phase(samples, draw(mixtures(sources)), ramp_to, blocks))
        else:
            phases.append(Phase(samples, draw(mixtures(sources))))
    if last_open:
        phases.append(Phase(None, draw(mixtures(sources))))
    return phases


def bound_of(phase: Phase) -> Fraction:
    """Largest deviation within a phase, from its start."""
    if phase.ramp_to is not None:
        return Fraction(2)
    return 1 - Fraction(1, max(1, 2 * sum(ratio > 0 for ratio in phase.ratios) - 2))


def line(phase: Phase) -> list[tuple[Fraction, ...]]:
    """[L] exact ratios of each sample of a phase, from the definition."""
    assert phase.samples is not None
    if phase.ramp_to is None:
        return [phase.ratios] * phase.samples
    rows = []
    for block in range(phase.blocks):
        first, last = (int(Fraction(i * phase.samples, phase.blocks) + Fraction(1, 2)) for i in (block, block + 1))
        middle = Fraction(2 * block + 1, 2 * phase.blocks)
        rows += [tuple(a + (b - a) * middle for a, b in zip(phase.ratios, phase.ramp_to, strict=True))] * (last - first)
    return rows


@given(schedules())
@example([Phase(7, (Fraction(1, 2), Fraction(1, 2)), (Fraction(0), Fraction(1)), 7), Phase(3, (Fraction(1), Fraction(0)))])
@settings(max_examples=150, deadline=None)
def test_every_prefix_is_within_its_bound(phases: list[Phase]) -> None:
    schedule = Schedule(phases)
    number = len(phases[0].ratios)
    total = schedule.samples
    assert total is not None
    sources, occurrences = schedule.locate(np.arange(total))
    counts, due = np.zeros(number, dtype=np.int64), [Fraction(0)] * number
    at = 0
    for index, phase in enumerate(phases):
        assert schedule.starts[index] == at
        before, due_before, bound = counts.copy(), list(due), bound_of(phase)
        for ratios in line(phase):
            assert schedule.phase_of(at) == index
            source = int(sources[at])
            assert occurrences[at] == counts[source]
            counts[source] += 1
            at += 1
            due = [share + ratio for share, ratio in zip(due, ratios, strict=True)]
            for j in range(number):
                in_phase = abs(int(counts[j] - before[j]) - (due[j] - due_before[j]))
                assert in_phase < bound if phase.ramp_to is not None else in_phase <= bound
                assert abs(int(counts[j]) - due[j]) < index + 2
            if at % 37 == 0 or at == total:
                assert schedule.due(at) == tuple(due)
                np.testing.assert_array_equal(schedule.counts(at), counts)
        for j in range(number):  # a source that a phase does not use does not come in it
            if phase.ratios[j] == 0 and (phase.ramp_to is None or phase.ramp_to[j] == 0):
                assert counts[j] == before[j]


@given(schedules(), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_any_order_of_asking_gives_the_same(phases: list[Phase], seed: int) -> None:
    schedule = Schedule(phases)
    assert schedule.samples is not None
    sources, occurrences = schedule.locate(np.arange(schedule.samples))
    some = np.random.default_rng(seed).integers(0, schedule.samples, 50)
    fresh = pickle.loads(pickle.dumps(Schedule(phases)))
    for found, expected in zip(fresh.locate(some), (sources, occurrences), strict=True):
        np.testing.assert_array_equal(found, expected[some])
    for prefix in some.tolist():
        fresh = Schedule(phases)
        np.testing.assert_array_equal(fresh.counts(prefix), np.bincount(sources[:prefix], minlength=len(phases[0].ratios)))


@given(schedules(last_open=True), schedules(last_open=True), st.integers(0, 1500))
@settings(max_examples=150, deadline=None)
def test_what_follows_changes_nothing_before(phases: list[Phase], others: list[Phase], samples: int) -> None:
    """A phase that begins at or after `samples`, whatever it is, leaves the first `samples` as they were."""
    schedule = Schedule(phases)
    index = schedule.phase_of(max(samples - 1, 0))
    running = phases[index]
    if running.ramp_to is not None:
        kept, start = phases[: index + 1], schedule.starts[index + 1]
    else:
        start = max(samples, schedule.starts[index] + 1)
        kept = [*phases[:index], dataclasses.replace(running, samples=start - schedule.starts[index])]
    width = max(len(phases[0].ratios), len(others[0].ratios))  # sources may join

    def wide(ratios: tuple[Fraction, ...] | None) -> tuple[Fraction, ...] | None:
        return None if ratios is None else ratios + (Fraction(0),) * (width - len(ratios))

    follow = [dataclasses.replace(p, ratios=wide(p.ratios), ramp_to=wide(p.ramp_to)) for p in [*kept, *others]]
    changed = Schedule(follow)
    assert samples <= start
    np.testing.assert_array_equal(changed.locate(np.arange(samples)), schedule.locate(np.arange(samples)))
    names = "abcde"
    narrow = schedule.describe_until(samples, names[: len(phases[0].ratios)])
    assert changed.describe_until(samples, names[:width]) == narrow


@given(schedules(last_open=True), st.integers(0, 3), st.integers(-2, 2), st.integers(1, 500))
@settings(max_examples=150, deadline=None)
def test_a_past_that_differs_is_described_differently(phases: list[Phase], index: int, longer: int, samples: int) -> None:
    """Drop a phase, or move its end: where that changes one of the first samples, the description of them changes."""
    index %= len(phases) - 1
    changed = phases[index]
    assert changed.samples is not None
    length = changed.samples + longer
    kept = [dataclasses.replace(changed, samples=length)] if longer and length >= max(1, changed.blocks) else []
    one, two = Schedule(phases), Schedule([*phases[:index], *kept, *phases[index + 1 :]])
    names = "abcde"[: len(changed.ratios)]
    if not np.array_equal(one.locate(np.arange(samples)), two.locate(np.arange(samples))):
        assert one.describe_until(samples, names) != two.describe_until(samples, names)


def test_whole_periods_leave_nothing_over() -> None:
    """Phases of whole periods are exact at their ends, so that deviations do not add up."""
    thirds, halves = (Fraction(1, 3), Fraction(2, 3)), (Fraction(1, 2), Fraction(1, 2))
    schedule = Schedule([Phase(300, thirds), Phase(400, halves), Phase(None, thirds)])
    assert schedule.counts(300).tolist() == [100, 200] and schedule.counts(700).tolist() == [300, 400]
    far = 700 + 3 * 10**14
    assert schedule.counts(far).tolist() == [300 + 10**14, 400 + 2 * 10**14]
    sources, occurrences = schedule.locate(np.arange(far, far + 6))
    assert np.bincount(sources).tolist() == [2, 4]
    assert occurrences[sources == 0].tolist() == [300 + 10**14, 301 + 10**14]


def test_a_ramp_follows_the_line_over_thousands_of_blocks() -> None:
    """10,000 blocks, 12 sources: built from blocks and not from samples, near the line at every block, the mean exact."""
    start = tuple(Fraction(1 if j == 0 else 0) for j in range(12))
    end = tuple(Fraction(j + 1, 78) for j in range(12))
    length, blocks = 10**9, 10_000
    # a table of every sample would take gigabytes
    schedule = Schedule([Phase(length, start, end, blocks), Phase(None, end)])
    schedule.counts(length)
    assert schedule.due(length) == tuple(length * (a + b) / 2 for a, b in zip(start, end, strict=True))
    for block in range(0, blocks, 499):
        at = block * length // blocks
        position = Fraction(at, length)
        ideal = [at * (a + (b - a) * position / 2) for a, b in zip(start, end, strict=True)]
        assert schedule.due(at) == tuple(ideal)
        assert all(abs(int(count) - share) < 1 for count, share in zip(schedule.counts(at), ideal, strict=True))


def test_a_fixed_mixture_as_one_phase_is_the_mixture() -> None:
    ratios = (Fraction(67, 100), Fraction(20, 100), Fraction(10, 100), Fraction(3, 100))
    expected = apportionment(ratios).locate(np.arange(5000))
    for phases in ([Phase(None, ratios)], [Phase(5000, ratios)]):
        for found, due in zip(Schedule(phases).locate(np.arange(5000)), expected, strict=True):
            np.testing.assert_array_equal(found, due)


# ---- from the configuration


def config(phases: object, sources: dict[str, object] | None = None) -> Config:
    return validate(
        Config,
        {
            "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4},
            "data": {"sources": sources or {"web": {"path": "a"}, "qa": {"path": "b"}}, "phases": phases},
            "train": {"steps": 10, "global_batch_size": 8, "sequence_length": 100},
        },
        "test",
    )


def data(phases: object, sources: dict[str, object] | None = None) -> DataConfig:
    found = config(phases, sources)
    assert not check(found)
    return found.data


def test_ends_are_the_nearest_samples_since_the_start() -> None:
    web, qa = {"web": 1}, {"web": "1/3", "qa": "2/3"}
    phases = phases_of(
        data([{"tokens": 149, "ratios": web}, {"tokens": 1e2, "ratios": qa}, {"until": 949, "ratios": web}]), 100
    )
    # 149 -> 1, 249 -> 2 (not 1 + 1 by luck: 1.49 + 1.00 = 2.49), 949 -> 9
    assert [phase.samples for phase in phases] == [1, 1, 7]
    assert [whole_samples(tokens, 100) for tokens in (0, 49, 50, 149, 150)] == [0, 0, 1, 1, 2]
    assert phases[1].ratios == (Fraction(1, 3), Fraction(2, 3))
    many = data([{"tokens": 130, "ratios": web if number % 2 else qa} for number in range(1000)])
    assert sum(phase.samples or 0 for phase in phases_of(many, 100)) == 1300  # 1.3 rounds to 1; the sum does not drift
    with pytest.raises(UserError, match=r"data\.phases\.1: ends at token 149, which is sample 1 .* begins at sample 1"):
        phases_of(data([{"tokens": 120, "ratios": web}, {"tokens": 29, "ratios": qa}, {"ratios": web}]), 100)


def test_a_phase_may_take_the_ratios_of_the_sources_and_a_ramp_names_both_ends() -> None:
    sources: dict[str, object] = {
        "web": {"path": "a", "ratio": "2/3"},
        "qa": {"path": "b", "ratio": "1/3"},
        "new": {"path": "c"},
    }
    ramp = {"from": {"web": "2/3", "qa": "1/3"}, "to": {"new": 1}, "blocks": 4}
    first, second, third = phases_of(
        data([{"until": 800}, {"tokens": 4000, "ramp": ramp}, {"ratios": {"new": 1}}], sources), 100
    )
    third_, two = Fraction(1, 3), Fraction(2, 3)
    assert first == Phase(8, (two, third_, Fraction(0)))
    assert second == Phase(40, (two, third_, Fraction(0)), (Fraction(0), Fraction(0), Fraction(1)), 4)
    assert third == Phase(None, (Fraction(0), Fraction(0), Fraction(1)))
    assert phases_of(data([], {"web": {"path": "a", "ratio": 1}}), 100) == ()


@pytest.mark.parametrize(
    ("phases", "path", "message"),
    [
        ([{"ratios": {"web": 1}}, {"ratios": {"qa": 1}}], "data.phases.0", "only the last phase may have no end"),
        ([{"tokens": 5, "until": 5, "ratios": {"web": 1}}], "data.phases.0", "has both `tokens` .* and `until`"),
        (
            [{"tokens": 500, "ratios": {"web": 1}}, {"until": 500, "ratios": {"qa": 1}}],
            "data.phases.1.until",
            "500 is not after",
        ),
        ([{"ratios": {"web": "1/3", "qa": "1/3"}}], "data.phases.0.ratios", r"web 1/3 \+ qa 1/3 = 2/3"),
        ([{"ratios": {"web": 1, "code": 0}}], "data.phases.0.ratios.code", "no source .* known: web, qa"),
        ([{"ramp": {"from": {"web": 1}, "to": {"qa": 1}}}], "data.phases.0", "a ramp needs an end"),
        ([{"tokens": 9, "ramp": {"from": {"web": 1}, "to": {"qa": 0.9}}}], "data.phases.0.ramp.to", "sum to exactly 1"),
        (
            [{"tokens": 9, "ratios": {"web": 1}, "ramp": {"from": {"web": 1}, "to": {"qa": 1}}}],
            "data.phases.0",
            "both `ratios` and `ramp`",
        ),
        ([{}], "data.phases.0", "neither `ratios` nor `ramp`"),
        ([], "data.sources.web.ratio", "required, but not set"),
    ],
)
def test_wrong_phases_are_told_by_their_key(phases: list[object], path: str, message: str) -> None:
    problems = {problem.path: problem.message for problem in check(config(phases))}
    assert path in problems, problems
    assert re.search(message, problems[path]), problems[path]


def test_a_ratio_that_no_phase_uses_is_refused() -> None:
    sources: dict[str, object] = {"web": {"path": "a", "ratio": "2/3"}, "qa": {"path": "b", "ratio": "1/3"}}
    problems = check(config([{"ratios": {"qa": 1}}], sources))
    assert [problem.path for problem in problems] == ["data.sources.web.ratio", "data.sources.qa.ratio"]
    assert not check(config([{"until": 400}, {"ratios": {"qa": 1}}], sources))


def test_keys_and_values_of_phases_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"data\.phases\.0\.tokns: unknown key; did you mean 'data\.phases\.0\.tokens'"):
        config([{"tokns": 5}])
    with pytest.raises(ConfigError, match=r"data\.phases\.0\.tokens: must be at least 1"):
        config([{"tokens": 0}])
    ramp = {"from": {"web": "1/999983"}, "to": {"web": "1/999979"}}
    with pytest.raises(ConfigError, match=r"data\.phases\.0\.ramp\.blocks: expected a whole number"):
        config([{"ramp": {**ramp, "blocks": 1.5}}])


def test_ramps_that_cannot_be_made_are_refused_with_numbers() -> None:
    ends = {"from": {"web": 1}, "to": {"web": "1/999983", "qa": "999982/999983"}}
    with pytest.raises(UserError, match=r"data\.phases\.0: 2 x 1000 blocks x 999983, .* use fewer blocks"):
        phases_of(data([{"tokens": 10**9, "ramp": {**ends, "blocks": 1000}}]), 100)
    with pytest.raises(UserError, match=r"data\.phases\.0: 50 blocks, but only 49 samples"):
        phases_of(data([{"tokens": 4900, "ramp": {**ends, "blocks": 50}}]), 100)
