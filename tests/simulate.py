"""Simulated studies with known laws and noise: how often intervals hold the truth, and tests find what is there.

`python -m tests.simulate designs` prints a table, and so does `collapse`. Few runs, and runs that depend on each other:
`python -m benchmarks laws --parts intervals`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from megatron_synth.study.fit.contrast import contrast
from megatron_synth.study.fit.fit import Fit, fit
from megatron_synth.study.fit.laws import LAWS, Columns, Floats
from megatron_synth.study.fit.noise import best_measured, noise_floor
from megatron_synth.study.report.answers import best_ratio

B = 1e9


@dataclass(frozen=True)
class Study:
    """A design with a true law; noise is the standard deviation of log loss between seeds."""

    law: str
    columns: Mapping[str, Floats]
    truth: Mapping[str, float]
    noise: float

    def losses(self, random: np.random.Generator) -> Floats:
        law = LAWS[self.law]
        clean = law.predict(law.to_theta(self.truth), self.columns)
        return clean * np.exp(self.noise * random.standard_normal(len(clean)))

    def fit(self, random: np.random.Generator, bootstraps: int = 200) -> Fit:
        truth = LAWS[self.law].to_theta(self.truth)
        seed = int(random.integers(2**31))
        return fit(self.law, self.columns, self.losses(random), starts=truth, bootstraps=bootstraps, seed=seed)


def grid(**columns: list[float]) -> dict[str, Floats]:
    """All combinations, as columns."""
    meshes = np.meshgrid(*columns.values(), indexing="ij")
    return {name: mesh.ravel() for name, mesh in zip(columns, meshes, strict=True)}


BUDGETS = [1 * B, 2 * B, 5 * B, 10 * B, 20 * B, 50 * B, 75 * B, 100 * B, 150 * B, 200 * B]
SIZES = [0.1 * B, 0.16 * B, 0.25 * B, 0.4 * B, 0.63 * B, 1 * B, 1.7 * B, 3 * B]
RATIOS = [0.0, 1 / 3, 2 / 3, 1.0]
DATA = {"B": 2085.0, "beta": 0.366, "E": 2.2}
MODEL = {"A": 482.0, "alpha": 0.348, "E": 2.0}
JOINT = {"A": 482.0, "alpha": 0.348, "B": 2085.0, "beta": 0.366, "E": 1.82}
MIXTURE = {**JOINT, "a1": -0.05, "b1": -0.3, "e1": -0.05, "e2": 0.09}

STUDIES = {
    "data, 10 budgets": Study("data", {"tokens": np.array(BUDGETS)}, DATA, 0.003),
    "data, 8 budgets x 3 seeds": Study("data", {"tokens": np.repeat(BUDGETS[:8], 3)}, DATA, 0.003),
    "model, 8 sizes x 3 seeds": Study("model", {"n_params": np.repeat(SIZES, 3)}, MODEL, 0.003),
    "joint, 5 sizes x 5 budgets": Study("joint", grid(n_params=SIZES[::2] + SIZES[-1:], tokens=BUDGETS[::2]), JOINT, 0.003),
    "mixture, 4 ratios x 3 sizes x 3 budgets x 2 seeds": Study(
        "mixture", grid(ratio=RATIOS, n_params=SIZES[::3], tokens=BUDGETS[1::3] * 2), MIXTURE, 0.002
    ),
}


def coverage(study: Study, draws: int, seed: int = 0) -> dict[str, float]:
    """How often the 90 % interval holds the true value, by parameter."""
    random = np.random.default_rng(seed)
    hits = dict.fromkeys(study.truth, 0)
    for _ in range(draws):
        intervals = study.fit(random).intervals["90"]
        for name, truth in study.truth.items():
            hits[name] += intervals[name][0] <= truth <= intervals[name][1]
    return {name: count / draws for name, count in hits.items()}


def true_best_ratio(study: Study, point: Columns) -> float:
    """The ratio of lowest true loss."""
    law, ratios = LAWS[study.law], np.linspace(0, 1, 10_001)
    return float(ratios[law.predict(law.to_theta(study.truth), {**point, "ratio": ratios}).argmin()])


def best_ratio_rate(study: Study, draws: int, n_params: float, tokens: float, seed: int = 0) -> float:
    """How often the 90 % interval of the best ratio holds the true one."""
    random, hits = np.random.default_rng(seed), 0
    truth = true_best_ratio(study, {"n_params": n_params, "tokens": tokens})
    for _ in range(draws):
        low, high = best_ratio(study.fit(random), n_params=n_params, tokens=tokens).interval
        hits += low <= truth <= high
    return hits / draws


def best_measured_rate(noise: float, losses: list[float], seeds: int, draws: int, seed: int = 0) -> tuple[float, float]:
    """How often the band of measured ratios holds the truly best one, and the mean number of ratios in it."""
    random = np.random.default_rng(seed)
    ratios = np.repeat(np.linspace(0, 1, len(losses)), seeds)
    clean = np.repeat(losses, seeds)
    truth, hits, sizes = float(ratios[clean.argmin()]), 0, 0
    for _ in range(draws):
        runs = clean * np.exp(noise * random.standard_normal(len(clean)))
        floor = noise_floor(list(ratios), runs)
        assert floor is not None
        band = best_measured(ratios, runs, floor).band
        hits, sizes = hits + (truth in band), sizes + len(band)
    return hits / draws, sizes / draws


COLLAPSE_BUDGETS = [float(value) for value in np.geomspace(1e9, 1e11, 8)]


def natural_loss(tokens: Floats) -> Floats:
    """The baseline's loss of `COLLAPSE`."""
    return np.asarray(DATA["E"] + DATA["B"] / tokens ** DATA["beta"])


# the loss of an arm at its budgets [M], and whether that is collapse beside `natural_loss`
COLLAPSE: dict[str, tuple[Callable[[Floats], Floats], bool]] = {
    "the same law": (natural_loss, False),
    "needs 0.6 of the tokens": (lambda tokens: natural_loss(tokens / 0.6), False),
    "needs 1.7 times the tokens": (lambda tokens: natural_loss(tokens / 1.7), False),
    "plateau from 30B": (lambda tokens: natural_loss(np.minimum(tokens, 30 * B)), True),
    "floor 5 % higher": (lambda tokens: natural_loss(tokens) + 0.05 * DATA["E"], True),
    "exponent 0.31": (lambda tokens: DATA["E"] + DATA["B"] * B ** (0.31 - DATA["beta"]) / tokens**0.31, True),
}


def collapse_rate(
    arm: Callable[[Floats], Floats], budgets: int, seeds: int, noise: tuple[float, float], draws: int, seed: int = 0
) -> float:
    """How often the floor's contrast calls it collapse (one-sided, 5 %); noise of the arm and of the baseline."""
    random, hits = np.random.default_rng(seed), 0
    chosen = np.array(COLLAPSE_BUDGETS)[np.linspace(0, len(COLLAPSE_BUDGETS) - 1, budgets).round().astype(int)]
    tokens = np.repeat(chosen, seeds)
    for _ in range(draws):
        own, base = (np.exp(scale * random.standard_normal(len(tokens))) for scale in noise)
        floor = contrast(tokens, arm(tokens) * own, tokens, natural_loss(tokens) * base).floor
        hits += floor is not None and floor.p < 0.05
    return hits / draws


def collapse_table(draws: int) -> None:
    """Print how often an arm is said to fall behind, at 8 budgets x 3 seeds; of collapse with equal noise alone."""
    noises = {"0.3 % both": (0.003, 0.003), "arm 1.5 %": (0.015, 0.003), "baseline 1.5 %": (0.003, 0.015)}
    print("| arm | collapse | " + " | ".join(noises) + " |\n| --- | --- |" + " ---: |" * len(noises))
    for name, (arm, collapses) in COLLAPSE.items():
        chosen = list(noises.values())[: 1 if collapses else None]
        cells = [f"{collapse_rate(arm, 8, 3, noise, draws):.1%}" for noise in chosen]
        cells += [""] * (len(noises) - len(cells))
        print(f"| {name} | {'yes' if collapses else 'no'} | {' | '.join(cells)} |", flush=True)


def designs_table(draws: int) -> None:
    """Print how often 90 % intervals hold the truth."""
    print("| study | noise | " + "coverage of 90 % intervals |\n| --- | ---: | --- |")
    for name, study in STUDIES.items():
        found = coverage(study, draws)
        print(
            f"| {name} | {study.noise:.1%} | " + ", ".join(f"{key} {value:.1%}" for key, value in found.items()) + " |",
            flush=True,
        )
    study = STUDIES["mixture, 4 ratios x 3 sizes x 3 budgets x 2 seeds"]
    for n, d in ((0.1 * B, 2 * B), (1.7 * B, 75 * B)):
        rate = best_ratio_rate(study, draws, n, d)
        truth = true_best_ratio(study, {"n_params": n, "tokens": d})
        print(f"| best ratio at N {n / B:g}B, D {d / B:g}B (true: {truth:.2f}) | {study.noise:.1%} | {rate:.1%} |", flush=True)


TABLES = {"designs": designs_table, "collapse": collapse_table}


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1] not in TABLES:
        sys.exit(f"usage: python -m tests.simulate {'|'.join(TABLES)} [DRAWS]")
    TABLES[sys.argv[1]](int(sys.argv[2]) if len(sys.argv) > 2 else 200)
