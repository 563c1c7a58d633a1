"""Laws: values against their formulas, derivatives against finite differences, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.catalog import law_named
from megatron_synth.study.fit.laws import LAWS, Floats, Law
from megatron_synth.study.fit.solvers.newton import curvature, huber, objective, objective_gradient, solve

PARAMS = {
    "A": 482.0,
    "B": 2085.0,
    "E": 1.8,
    "K": 0.1,
    "J": 0.05,
    "alpha": 0.35,
    "beta": 0.37,
    "a1": -0.1,
    "b1": -0.3,
    "e1": -0.05,
    "e2": 0.09,
    "s": 2.0,
    "t": 3.0,
}
COLUMNS = {
    "n_params": np.array([1e8, 1e9, 3e9, 3e8]),
    "tokens": np.array([1e9, 5e10, 2e11, 2e9]),
    "ratio": np.array([0.0, 1 / 3, 1.0, 0.5]),
}
N, D, R = COLUMNS.values()
DIRECT = {
    "data": 1.8 + 2085 / D**0.37,
    "model": 1.8 + 482 / N**0.35,
    "joint": 1.8 + 482 / N**0.35 + 2085 / D**0.37,
    "tied": 1.8 + 482 / N**0.35 + 2085 / D**0.35,
    "mixture": 1.8 * np.exp(-0.05 * R + 0.09 * R**2) + 482 * np.exp(-0.1 * R) / N**0.35 + 2085 * np.exp(-0.3 * R) / D**0.37,
    "mixture-additive": 1.8 + 0.1 * np.exp(-2 * R) + 0.05 * np.exp(-3 * (1 - R)) + 482 / N**0.35 + 2085 / D**0.37,
}


def theta_of(law: Law) -> Floats:
    return law.to_theta(PARAMS)


@pytest.mark.parametrize("name", LAWS)
def test_a_law_is_its_formula(name: str) -> None:
    law = LAWS[name]
    np.testing.assert_allclose(law.predict(theta_of(law), COLUMNS), DIRECT[name], rtol=1e-13)
    assert law.to_params(theta_of(law)) == pytest.approx({name: PARAMS[name] for name in law.parameters}, rel=1e-14)
    batch = np.stack([theta_of(law), theta_of(law) + 0.1])
    # products of matrices of other shapes may add in another order
    np.testing.assert_allclose(law.predict(batch, COLUMNS)[1], law.predict(batch[1], COLUMNS), rtol=1e-14)


@pytest.mark.parametrize("name", LAWS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    law, step = LAWS[name], 1e-6
    theta = theta_of(law)
    shifts = step * np.eye(len(theta))
    numeric = (law.log_predict(theta + shifts, COLUMNS) - law.log_predict(theta - shifts, COLUMNS)) / (2 * step)
    np.testing.assert_allclose(law.gradient(theta, COLUMNS), numeric.T, atol=1e-8)


@pytest.mark.parametrize("name", LAWS)
def test_gradient_and_curvature_of_the_objective(name: str) -> None:
    """Residuals on both sides of delta, so that both branches of Huber's loss count."""
    law, step, delta = LAWS[name], 1e-6, 1e-2
    theta, design = theta_of(law), law.design(COLUMNS)
    log_loss = np.log(DIRECT[name]) + np.array([0.003, -0.004, 0.05, -0.03])
    weights = np.array([[1.0, 2.0, 0.0, 3.0]])
    shifts = step * np.eye(len(theta))
    many = np.repeat(weights, len(theta), axis=0)

    gradient, newton, majorant = curvature(design, log_loss, theta[None], delta, weights)
    ends = [objective(design, log_loss, theta + sign * shifts, delta, many) for sign in (1, -1)]
    np.testing.assert_allclose(gradient[0], (ends[0] - ends[1]) / (2 * step), atol=1e-8)
    np.testing.assert_allclose(objective_gradient(design, log_loss, theta[None], delta, weights)[1], gradient, atol=1e-15)

    slopes = [objective_gradient(design, log_loss, theta + sign * shifts, delta, many)[1] for sign in (1, -1)]
    np.testing.assert_allclose(newton[0], (slopes[0] - slopes[1]) / (2 * step), atol=1e-7)
    assert np.linalg.eigvalsh(majorant[0]).min() > -1e-12


def test_hubers_loss_is_quadratic_then_linear() -> None:
    values = huber(np.array([0.0, 0.5, -1.0, 2.0, -3.0]), 1.0)
    np.testing.assert_allclose(values, [0, 0.125, 0.5, 1.5, 2.5])


def test_prediction_far_outside_does_not_overflow() -> None:
    law = LAWS["joint"]
    theta = law.to_theta({**PARAMS, "A": 1e300, "alpha": -30.0})
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        assert law.log_predict(theta, {"n_params": 1e12, "tokens": 1e12})[0] == pytest.approx(np.log(1e300) + 30 * np.log(1e12))


@pytest.mark.parametrize("name", LAWS)
def test_noise_free_points_give_the_law_back(name: str) -> None:
    """The batched solver, from perturbed starts; columns vary enough to determine every parameter."""
    law = LAWS[name]
    mesh = np.meshgrid([1e8, 3e8, 1e9, 3e9], [1e9, 1e10, 5e10, 2e11], np.linspace(0, 1, 6))
    columns = dict(zip(COLUMNS, (axis.ravel() for axis in mesh), strict=True))
    theta = theta_of(law)
    starts = theta * np.random.default_rng(0).uniform(0.8, 1.25, size=(40, len(theta)))
    found = solve(law.design(columns), law.log_predict(theta, columns), starts, 1e-3, iterations=200, tolerance=1e-14)
    best = found.theta[found.objective.argmin()]
    assert found.objective.min() < 1e-15
    np.testing.assert_allclose(law.predict(best, columns), law.predict(theta, columns), rtol=1e-6)
    assert law.to_params(best) == pytest.approx({key: PARAMS[key] for key in law.parameters}, rel=1e-2)


def test_the_mixture_laws_have_a_best_ratio_inside_that_moves() -> None:
    ratios, best = np.linspace(0, 1, 1001), {}
    for name in ("mixture", "mixture-additive"):
        law = LAWS[name]
        for tokens in (1e9, 1e12):
            losses = law.predict(theta_of(law), {"n_params": 1e9, "tokens": tokens, "ratio": ratios})
            best[name, tokens] = ratios[losses.argmin()]
    assert 0.2 < best["mixture", 1e12] < best["mixture", 1e9] - 0.2 < 1
    assert best["mixture-additive", 1e9] == best["mixture-additive", 1e12] not in (0, 1)


def test_terms_that_cannot_be_told_from_the_floor_are_left_out() -> None:
    law = LAWS["mixture"]
    one_size = {**COLUMNS, "n_params": np.full(4, 1e9)}
    assert law.reduced(one_size).columns == ("tokens", "ratio")
    assert law.reduced({"ratio": R}).parameters == ("E", "e1", "e2")
    assert law.reduced(COLUMNS) == law
    with pytest.raises(UserError, match="'mixture' needs points of different ratio; all 4 have 0"):
        law.reduced({**COLUMNS, "ratio": np.zeros(4)})
    with pytest.raises(UserError, match=r"'joint' needs points of different n_params.*'data' or 'model' instead"):
        LAWS["joint"].reduced(one_size)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"n_params": [1e9]}, "needs the column tokens"),
        ({"n_params": [1e9, 0], "tokens": [1e9, 1e9]}, "column n_params, point 1: expected a number above 0, got 0"),
        ({"n_params": [1e9], "tokens": [np.nan]}, "column tokens, point 0: expected a number above 0, got nan"),
    ],
)
def test_impossible_columns_are_refused(columns: dict[str, list[float]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LAWS["joint"].design(columns)


def test_impossible_ratios_and_unknown_laws_are_refused() -> None:
    with pytest.raises(UserError, match=r"column ratio, point 1: expected a share from 0 to 1, got 33"):
        LAWS["mixture"].design({**COLUMNS, "ratio": [0, 33, 1, 1]})
    with pytest.raises(UserError, match="unknown law 'jiont'; did you mean 'joint'"):
        law_named("jiont")
    with pytest.raises(UserError, match="no value for B, E"):
        LAWS["data"].to_theta({"beta": 1.0})
