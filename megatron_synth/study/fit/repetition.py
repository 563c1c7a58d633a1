"""Laws that know repetition, and the rectified law; the terms that are no exponentials of linear forms.

Repetition (Muennighoff et al. 2023, arXiv 2305.16264): tokens that are seen again are worth less, and so are parameters beyond
those that the unique tokens can use. With U unique tokens and D = U (1 + R_D) tokens trained,

    D' = U + U R*_D (1 - exp(-R_D / R*_D)),  N' = U_N + U_N R*_N (1 - exp(-R_N / R*_N)),  L = E + A / N'^alpha + B / D'^beta

U_N = min(N, N_opt(U)): the size that is compute-optimal where U tokens are, by the law of unique tokens; R_N = N / U_N - 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from megatron_synth.study.fit.laws import N_PARAMS, TOKENS, UNIQUE_TOKENS, Floats
from megatron_synth.study.fit.solvers.nonlinear import NonlinearLaw

PUBLISHED = {
    "A": float(np.exp(6.255414)),
    "B": float(np.exp(7.3049974)),
    "E": float(np.exp(0.6254804)),
    "alpha": 0.3526596490740,
    "beta": 0.3526596490740,
    "R_D": 15.387756,
    "R_N": 5.309743,
}
"""Of Muennighoff et al., C4. A refit to their runs finds R_D = 95 and R_N = 1.7 with a lower objective: weakly identified."""


_BOUNDS = (-12.0, 25.0)
"""Of log R_D and log R_N: below, a repeated token is worth nothing; above, as much as a new one."""


def effective_tokens(tokens: ArrayLike, unique: ArrayLike, r_d: float) -> Floats:
    """D' [M]: how many new tokens the trained ones are worth.

    Args:
        tokens: [M] trained.
        unique: [M] different ones that there are; more than were trained count as trained.
        r_d: R*_D, repetitions after which a token is worth 1 / e of a new one.
    """
    trained = np.asarray(tokens, dtype=np.float64)
    different = np.minimum(np.asarray(unique, dtype=np.float64), trained)
    repeated = trained / different - 1
    return np.asarray(different * (1 - r_d * np.expm1(-repeated / r_d)))


def _value(theta: Floats, columns: Mapping[str, Floats]) -> tuple[Floats, Floats]:
    """log L [M] and its slopes [M, 7] in (log A, log B, log E, log R_D, log R_N, alpha, beta)."""
    log_a, log_b, log_e, log_rd, log_rn, alpha, beta = theta
    log_n, log_d = np.log(columns[N_PARAMS]), np.log(columns[TOKENS])
    log_u = np.minimum(np.log(columns[UNIQUE_TOKENS]), log_d)
    r_d, r_n = np.exp(np.clip((log_rd, log_rn), *_BOUNDS))
    # N_opt(U) = G (U G)^(beta / alpha) with G = (alpha A / (beta B))^(1 / (alpha + beta)); exponents must be above 0 here
    alpha_, beta_ = max(alpha, 1e-3), max(beta, 1e-3)
    inside, total = np.log(alpha_ / beta_) + log_a - log_b, alpha_ + beta_
    log_g, ratio = inside / total, beta_ / alpha_
    log_best = log_g + ratio * (log_u + log_g)
    capped = log_best < log_n
    log_un = np.where(capped, log_best, log_n)
    # slopes of log_un in (log A, log B, alpha, beta), where it is the best size
    slope_g = np.array([1 / total, -1 / total, (1 / alpha_ - log_g) / total, (-1 / beta_ - log_g) / total])
    slope_ratio = np.array([0.0, 0.0, -ratio / alpha_, 1 / alpha_])
    slope_un = np.where(capped[:, None], (1 + ratio) * slope_g + (log_u + log_g)[:, None] * slope_ratio, 0.0)

    repeated, surplus = np.exp(log_d - log_u) - 1, np.exp(log_n - log_un) - 1
    worth_d, worth_n = 1 - r_d * np.expm1(-repeated / r_d), 1 - r_n * np.expm1(-surplus / r_n)
    log_de, log_ne = log_u + np.log(worth_d), log_un + np.log(worth_n)
    # d worth / d log r = -r expm1(-x / r) - x exp(-x / r)
    slope_rd = (-r_d * np.expm1(-repeated / r_d) - repeated * np.exp(-repeated / r_d)) / worth_d
    slope_rn = (-r_n * np.expm1(-surplus / r_n) - surplus * np.exp(-surplus / r_n)) / worth_n
    # a larger U_N has less surplus: d surplus / d log U_N = -(surplus + 1)
    slope_ne = slope_un * (1 - (surplus + 1) * np.exp(-surplus / r_n) / worth_n)[:, None]

    logs = np.stack([np.full(len(log_n), log_e), log_a - alpha * log_ne, log_b - beta * log_de])
    highest = logs.max(axis=0)
    parts = np.exp(logs - highest)
    sum_of_parts = parts.sum(axis=0)
    floor, size, data = parts / sum_of_parts
    slopes = np.zeros((len(log_n), 7))
    slopes[:, 0], slopes[:, 1], slopes[:, 2] = size, data, floor
    slopes[:, 3], slopes[:, 4] = -beta * data * slope_rd, -alpha * size * slope_rn
    slopes[:, 5], slopes[:, 6] = -size * log_ne, -data * log_de
    slopes[:, [0, 1, 5, 6]] -= (alpha * size)[:, None] * slope_ne
    return highest + np.log(sum_of_parts), slopes


REPETITION = NonlinearLaw(
    name="repetition",
    formula="L = E + A / N'^alpha + B / D'^beta, D' = U + U R_D (1 - exp(-(D/U - 1) / R_D)), N' likewise with R_N",
    source="Muennighoff et al. 2023, arXiv 2305.16264",
    parameters=("A", "B", "E", "R_D", "R_N", "alpha", "beta"),
    factors=frozenset({"A", "B", "E", "R_D", "R_N"}),
    columns=(N_PARAMS, TOKENS, UNIQUE_TOKENS),
    value=_value,
    starts={
        "A": (4.0, 6.0),
        "B": (7.0, 10.0),
        "E": (0.6,),
        "R_D": (1.5, 3.0, 5.0),
        "R_N": (0.0, 2.0),
        "alpha": (0.25, 0.35),
        "beta": (0.35, 0.45),
    },
    bounds={"R_D": _BOUNDS, "R_N": _BOUNDS},
)


def _rectified_value(theta: Floats, columns: Mapping[str, Floats]) -> tuple[Floats, Floats]:
    """log L [M] and its slopes [M, 4] in (log B, log D_l, log E, beta)."""
    log_b, log_l, log_e, beta = theta
    log_d = np.log(columns[TOKENS])
    power = beta * log_d
    bottom = np.logaddexp(log_l, power)
    learned, grown = np.exp(log_l - bottom), np.exp(power - bottom)
    total = np.logaddexp(log_e, log_b - bottom)
    data, floor = np.exp(log_b - bottom - total), np.exp(log_e - total)
    return total, np.column_stack([data, -data * learned, floor, -data * grown * log_d])


RECTIFIED = NonlinearLaw(
    name="rectified",
    formula="L(D) = E + B / (D_l + D^beta)",
    source="Lin et al. 2024 for fine-tuning, arXiv 2402.02314; SynthLLM, arXiv 2503.19551, for synthetic text",
    parameters=("B", "D_l", "E", "beta"),
    factors=frozenset({"B", "D_l", "E"}),
    columns=(TOKENS,),
    value=_rectified_value,
    starts={"B": (3.0, 6.0, 9.0), "D_l": (0.0, 4.0, 8.0), "E": (0.2, 0.7), "beta": (0.25, 0.4, 0.6)},
)
"""D_l is what the model knew before: the loss is flat at small budgets, as for a model that was trained on other text."""

NONLINEAR = {law.name: law for law in (REPETITION, RECTIFIED)}
