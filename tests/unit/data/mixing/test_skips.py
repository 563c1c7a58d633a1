"""Samples left out: a plan with ranges is the plan without, less those samples, whatever is asked of it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_synth.config.errors import UserError
from megatron_synth.data.mixing.ledger import Ledger
from megatron_synth.data.mixing.mixture import MixturePlan, SourceSpec
from megatron_synth.data.mixing.schedule import Phase
from megatron_synth.data.mixing.skips import Skips

LENGTH = 400
THIRD = (Fraction(2, 3), Fraction(1, 3))
PHASES = (Phase(90, THIRD), Phase(110, (Fraction(0), Fraction(1)), ramp_to=THIRD, blocks=7), Phase(None, THIRD[::-1]))
ranges = st.lists(st.tuples(st.integers(0, LENGTH), st.integers(0, 60)).map(lambda one: (one[0], one[0] + one[1])), max_size=6)


def plan(skips: list[tuple[int, int]], phases: tuple[Phase, ...] = (), max_epochs: float = 50) -> MixturePlan:
    specs = [SourceSpec("web", THIRD[0], 40, max_epochs), SourceSpec("qa", THIRD[1], 17, max_epochs)]
    return MixturePlan(specs, 5, phases, skips)


@given(ranges, st.sampled_from([(), PHASES]))
def test_it_is_the_plan_without_those_samples(skips: list[tuple[int, int]], phases: tuple[Phase, ...]) -> None:
    whole, left = plan([], phases), plan(skips, phases)
    gone = {number for first, last in skips for number in range(first, last + 1)}
    stay = np.array([number for number in range(LENGTH + 500) if number not in gone], dtype=np.int64)
    assert left.skips.total == len(gone)
    assert np.array_equal(left.skips.numbers(np.arange(LENGTH)), stay[:LENGTH])
    assert all(left.skips.holds(number) == (number in gone) for number in range(LENGTH))
    assert all(left.skips.position(number) == int(np.searchsorted(stay, number)) for number in range(LENGTH))
    sources, _ = whole.locate(stay[:LENGTH])
    for consumed in {0, 1, 2, 57, 90, 143, 200, 333, LENGTH}:
        counted = np.bincount(sources[:consumed], minlength=2)
        assert np.array_equal(left.counts(consumed), counted)
        assert abs(sum(left.due(consumed)) - consumed) == 0
        prefix = [one for one in Skips(skips).ranges if consumed and one[0] < stay[consumed - 1]]
        # what begins later does not count, what lies before does
        assert left.prefix_digest(consumed) == plan(prefix, phases).prefix_digest(consumed)
        assert (left.prefix_digest(consumed) == whole.prefix_digest(consumed)) is (not prefix)
    for name, place in (("web", 0), ("qa", 1)):
        capped = plan(skips, phases, max_epochs=2)
        allowed = capped.sources[place].allowed_samples
        longest = capped.longest_run(place)
        assert allowed is not None and longest is not None, name
        assert int(capped.counts(longest)[place]) <= allowed < int(capped.counts(longest + 1)[place])


def test_a_ledger_of_what_was_not_learned() -> None:
    left = plan([(3, 5)])
    ledger = Ledger.of(left, 32)
    ledger.merge(left.counts(8))
    ledger.merge(left.counts(16) - left.counts(8), learned=False)
    ledger.verify(left, 16)
    content = ledger.to_json()
    assert content["samples"] == 16 and content["unlearned"]["samples"] == 8
    again = Ledger.of(left, 32)
    again.load_state_dict(ledger.state_dict(), ledger.unlearned)
    assert again.to_json() == content
    assert "unlearned" not in Ledger.planned(left, 32, 8).to_json()


def test_the_end_of_phases_counts_what_stays() -> None:
    phases = (Phase(100, THIRD),)
    assert plan([], phases).samples == 100 and plan([(90, 120)], phases).samples == 90
    plan([(90, 120)], phases).check(90)
    with pytest.raises(UserError, match=r"data\.phases: end after 90 samples"):
        plan([(90, 120)], phases).check(91)
