"""Collapse as a contrast with the baseline: seen where it is, and not where it is not, whatever arm is the noisier."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.contrast import contrast
from megatron_synth.study.fit.laws import Floats
from tests.simulate import COLLAPSE, COLLAPSE_BUDGETS, collapse_rate, natural_loss

DRAWS = 60


@pytest.mark.parametrize("name", [name for name, (_, collapses) in COLLAPSE.items() if collapses])
def test_collapse_is_seen(name: str) -> None:
    """0.3 % noise, 8 budgets x 3 seeds: at least 90 % power."""
    assert collapse_rate(COLLAPSE[name][0], 8, 3, (0.003, 0.003), DRAWS // 2) >= 0.9


@pytest.mark.parametrize("noise", [(0.003, 0.003), (0.015, 0.003), (0.003, 0.015)])
@pytest.mark.parametrize("name", [name for name, (_, collapses) in COLLAPSE.items() if not collapses])
def test_no_collapse_is_made_up(name: str, noise: tuple[float, float]) -> None:
    """Nominal 5 %, one-sided; 60 draws have at most 9 in 999 of 1000 cases. docs/laws.md has the rates."""
    assert collapse_rate(COLLAPSE[name][0], 8, 3, noise, DRAWS) <= 0.15


def test_the_contrasts_are_what_was_put_in() -> None:
    budgets = np.repeat(COLLAPSE_BUDGETS, 3)
    random = np.random.default_rng(0)

    def noisy(clean: Floats) -> Floats:
        return np.asarray(clean * np.exp(1e-5 * random.standard_normal(len(clean))))

    found = contrast(budgets, noisy(natural_loss(budgets) + 0.11), budgets, noisy(natural_loss(budgets)))
    assert found.floor is not None and found.exponent is not None and found.noise == "seeds"
    assert found.floor.value == pytest.approx(0.05, abs=1e-3)
    assert 0 < np.ptp(found.floor.interval) < 1e-4
    assert found.last.value == pytest.approx(np.log1p(0.11 / natural_loss(budgets[-1:])[0]), abs=1e-4)
    assert found.gap.value > 0 and found.gap.p < 1e-6 and found.exponent.value < 0
    slower = 2.2 + 2085 * 1e9 ** (0.31 - 0.366) / budgets**0.31
    found = contrast(budgets, noisy(slower), budgets, noisy(natural_loss(budgets)))
    assert found.exponent is not None and found.exponent.value == pytest.approx(0.31 - 0.366, abs=1e-3)


def test_one_seed_is_held_against_the_scatter_around_the_laws() -> None:
    budgets, random = np.asarray(COLLAPSE_BUDGETS), np.random.default_rng(0)
    loss = natural_loss(budgets) * np.exp(0.001 * random.standard_normal(8))
    worse = (natural_loss(budgets) + 0.11) * np.exp(0.001 * random.standard_normal(8))
    found = contrast(budgets, worse, budgets, loss)
    assert found.noise == "residuals" and found.floor is not None
    assert found.floor.freedom == found.gap.freedom == 16 - 6 and found.floor.p < 0.001
    same = contrast(budgets, loss * np.exp(0.001 * random.standard_normal(8)), budgets, loss)
    assert same.floor is not None and same.floor.p > 0.05


@pytest.mark.parametrize(
    ("tokens", "base", "message"),
    [
        ([1e9, 2e9, 4e9], [3e9, 5e9, 7e9], "at least two budgets that both arms have"),
        ([1e9, 2e9], [1e9, 2e9], "nothing to estimate the scatter from"),
        ([1e9, -2e9], [1e9, 2e9], "budgets above 0"),
    ],
)
def test_what_cannot_be_held_against_the_baseline(tokens: list[float], base: list[float], message: str) -> None:
    loss: Callable[[list[float]], Floats] = lambda values: np.linspace(3, 2.5, len(values))  # noqa: E731
    with pytest.raises(UserError, match=message):
        contrast(tokens, loss(tokens), base, loss(base))


def test_two_budgets_with_seeds_have_a_gap_and_no_law() -> None:
    tokens = [1e9, 1e9, 4e9, 4e9]
    found = contrast(tokens, [3.0, 3.01, 2.9, 2.91], tokens, [3.0, 3.02, 2.6, 2.61])
    assert found.floor is None and found.exponent is None
    assert found.gap.p < 0.05 and found.last.value == pytest.approx(np.log(2.905 / 2.605), abs=1e-3)
