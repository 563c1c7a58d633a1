"""The learning-rate schedules at their corners, and the properties that hold for every setting."""

from __future__ import annotations

import itertools
import math

import pytest

from megatron_synth.config.schema import OptimConfig
from megatron_synth.train.schedule import learning_rate


def curve(total_steps: int, **optim: object) -> list[float]:
    config = OptimConfig.model_validate({"lr": 1e-3, "min_lr": 1e-4, **optim})
    return [learning_rate(step, config, total_steps) for step in range(total_steps)]


def test_cosine_corners() -> None:
    lr = curve(101, schedule="cosine", warmup_steps=1)
    assert lr[0] == 1e-3 and lr[-1] == 1e-4
    assert lr[50] == pytest.approx((1e-3 + 1e-4) / 2)
    assert lr[25] == pytest.approx(1e-4 + 9e-4 * (1 + math.sqrt(0.5)) / 2)


def test_warmup_is_linear_and_starts_at_its_first_fraction() -> None:
    for schedule in ("cosine", "wsd", "linear", "inverse_sqrt", "constant"):
        lr = curve(40, schedule=schedule, warmup_steps=8)
        assert lr[:8] == pytest.approx([1e-3 * k / 8 for k in range(1, 9)])
        assert lr[7] == 1e-3


def test_wsd_is_flat_then_a_straight_line_of_the_given_length() -> None:
    lr = curve(100, schedule="wsd", warmup_steps=5, decay_steps=20)
    assert set(lr[4:80]) == {1e-3}
    falls = [a - b for a, b in itertools.pairwise(lr[79:])]
    assert len(falls) == 20 and falls == pytest.approx([9e-4 / 20] * 20)
    assert lr[-1] == 1e-4


def test_wsd_decays_over_a_tenth_by_default() -> None:
    assert curve(200, schedule="wsd") == curve(200, schedule="wsd", decay_steps=20)


def test_wsd_decay_longer_than_the_run_begins_after_warmup() -> None:
    lr = curve(20, schedule="wsd", warmup_steps=10, decay_steps=500)
    assert lr[9] == 1e-3 and lr[-1] == 1e-4
    assert [a - b for a, b in itertools.pairwise(lr[9:])] == pytest.approx([9e-5] * 10)


def test_linear_is_one_straight_line() -> None:
    lr = curve(20, schedule="linear", warmup_steps=5)
    assert lr[4] == 1e-3 and lr[-1] == 1e-4
    assert [a - b for a, b in itertools.pairwise(lr[4:])] == pytest.approx([6e-5] * 15)


def test_inverse_square_root_needs_no_end() -> None:
    lr = curve(4000, schedule="inverse_sqrt", warmup_steps=10)
    assert lr[9] == 1e-3 and lr[39] == pytest.approx(5e-4) and lr[999] == 1e-4 == lr[-1]
    assert curve(100, schedule="inverse_sqrt", warmup_steps=10) == lr[:100]
    plain = curve(16, schedule="inverse_sqrt", min_lr=0)
    assert plain[0] == 1e-3 and plain[3] == pytest.approx(5e-4) and plain[15] == pytest.approx(2.5e-4)


def test_constant_never_falls() -> None:
    assert curve(30, schedule="constant") == [1e-3] * 30


def test_run_that_ends_in_its_warmup() -> None:
    assert curve(3, schedule="cosine", warmup_steps=6) == pytest.approx([1e-3 / 6, 2e-3 / 6, 3e-3 / 6])
    assert curve(4, schedule="wsd", warmup_steps=4)[-1] == 1e-3
    assert curve(1, schedule="cosine") == [1e-3]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "inverse_sqrt", "constant"])
def test_rises_to_the_peak_then_never_rises_and_stays_in_bounds(schedule: str) -> None:
    for total, warmup, decay in itertools.product((1, 2, 3, 17, 64), (0, 1, 2, 9, 64), (None, 1, 7, 100)):
        lr = curve(total, schedule=schedule, warmup_steps=warmup, decay_steps=decay)
        peak = max(warmup - 1, 0)
        assert all(a < b for a, b in itertools.pairwise(lr[: peak + 1]))
        assert all(a >= b for a, b in itertools.pairwise(lr[peak:]))
        assert all(0 < value <= 1e-3 for value in lr) and all(value >= 1e-4 for value in lr[peak:])
        if schedule not in ("constant", "inverse_sqrt") and total - 1 > peak:
            assert lr[-1] == 1e-4


def test_outside_the_run_is_a_programming_error() -> None:
    for step in (-1, 10):
        with pytest.raises(AssertionError, match="run of 10"):
            learning_rate(step, OptimConfig(), 10)
