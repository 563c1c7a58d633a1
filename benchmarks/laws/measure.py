"""Laws held against public data, and against simulated studies whose truth is known.

The data are published tables that the user has: RegMix's mixtures (train_mixture_1m.csv, train_pile_loss_1m.csv, test_*), the
runs of Muennighoff et al. (datablations_c4_fit.csv) and of Gadre et al. (gadre_104.csv).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.fit import fit
from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.repetition import PUBLISHED
from megatron_synth.study.fit.shares.fit import fit_shares
from megatron_synth.study.fit.shares.laws import SHARE_LAWS, FittedShareLaw
from megatron_synth.study.fit.shares.points import Mixtures
from megatron_synth.study.fit.shares.table import mixtures_of, read_mixtures
from megatron_synth.study.fit.shares.trees import REGMIX, BoostedTrees
from megatron_synth.study.fit.table.runs_table import read_table
from megatron_synth.study.search.optimum import minimize, objective_of
from megatron_synth.study.search.sequential import expected_improvement
from megatron_synth.study.search.space import make_space, space_filling

TOLD = Callable[[str], object]
SOURCES = "train_the_pile_*"
LOSSES = "metric/the_pile_"
GADRE = {"c4_original": (1.51, 141, 190, 0.121), "rpj": (1.84, 212, 367, 0.136), "rw_original": (1.73, 157, 246, 0.127)}
"""E, a, b and eta of Gadre et al. 2024, arXiv 2403.08540, by training set; for the loss on C4."""


@dataclass(frozen=True)
class Score:
    """A law on the test mixtures: means over domains.

    rank: Spearman's correlation. error: mean absolute relative error. covered: rate of 90 % intervals, None without any.
    seconds: processor time of fits, cross-validation included where there are intervals.
    """

    law: str
    rank: float
    error: float
    covered: float | None
    seconds: float


@dataclass(frozen=True)
class RegMix:
    """Training and test mixtures with their losses [M, domains]."""

    train: Mixtures
    train_loss: Floats
    test: Mixtures
    test_loss: Floats
    domains: tuple[str, ...]


def read_regmix(folder: Path) -> RegMix:
    """RegMix's four tables at 1M parameters."""
    tables = {}
    for part in ("train", "test"):
        tables[part] = read_mixtures(folder / f"{part}_mixture_1m.csv", folder / f"{part}_pile_loss_1m.csv")
    columns = [name for name in tables["train"].table.texts if name.startswith(LOSSES)]
    found = {part: np.column_stack([read.table.numbers(name) for name in columns]) for part, read in tables.items()}
    mixtures = {part: mixtures_of(read, [SOURCES]) for part, read in tables.items()}
    domains = tuple(name.removeprefix(LOSSES).removesuffix("_val_loss") for name in columns)
    return RegMix(mixtures["train"], found["train"], mixtures["test"], found["test"], domains)


def regmix_scores(
    data: RegMix, runs: int | None = None, seed: int = 0, tell: TOLD = print
) -> tuple[list[Score], dict[str, str]]:
    """Every law fitted to all runs, or to so many of them, and the automatic choice; and what was chosen by domain."""
    place = np.arange(len(data.train))
    if runs is not None:
        place = np.sort(np.random.default_rng(seed).permutation(len(data.train))[:runs])
    train = data.train.rows(place)
    ranks: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    covers: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    chosen = {}

    def note(name: str, predicted: Floats, measured: Floats, interval: tuple[Floats, Floats] | None) -> None:
        from scipy.stats import spearmanr

        ranks.setdefault(name, []).append(float(spearmanr(predicted, measured).statistic))
        errors.setdefault(name, []).append(float(np.mean(np.abs(predicted / measured - 1))))
        if interval is not None:
            covers.setdefault(name, []).append(float(np.mean((measured >= interval[0]) & (measured <= interval[1]))))

    for number, domain in enumerate(data.domains):
        tell(f"{len(train)} mixtures, {domain}")
        loss, measured = data.train_loss[place, number], data.test_loss[:, number]
        began = time.process_time()
        found = fit_shares(train, loss, seed=seed)
        seconds["automatic"] = seconds.get("automatic", 0.0) + time.process_time() - began
        chosen[domain] = found.law.name
        parametric = min((one for one in found.compared.values() if one.law.parametric), key=lambda one: one.error)
        named = {**found.compared, "automatic": found.chosen, "best parametric": parametric}
        for name, one in named.items():
            note(name, np.exp(one.fitted.log_predict(data.test)), measured, one.interval(data.test, 90))
        for name in found.compared:
            began = time.process_time()
            SHARE_LAWS[name].fit(train, np.log(loss), seed=seed)
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - began
        if SHARE_LAWS["boosted-trees"].needs is None:
            began = time.process_time()
            trees: FittedShareLaw = BoostedTrees(settings=tuple(REGMIX.items())).fit(train, np.log(loss), seed=42)
            seconds["RegMix's LightGBM"] = seconds.get("RegMix's LightGBM", 0.0) + time.process_time() - began
            note("RegMix's LightGBM", np.exp(trees.log_predict(data.test)), measured, None)
    scores = [
        Score(
            name,
            float(np.mean(ranks[name])),
            float(np.mean(errors[name])),
            float(np.mean(covers[name])) if name in covers else None,
            seconds.get(name, 0.0),
        )
        for name in ranks
    ]
    return sorted(scores, key=lambda score: score.error), chosen


def regmix_proposal(data: RegMix, domain: str = "pile_cc") -> dict[str, Any]:
    """The mixture proposed for one domain, beside those measured."""
    number = data.domains.index(domain)
    found = fit_shares(data.train, data.train_loss[:, number])
    measured = data.test_loss[:, number]
    predicted = found.predict(data.test)
    order = measured.argsort().argsort()  # 0 for the lowest
    best = minimize(make_space(data.train.sources), objective_of({domain: found}), noise=found.chosen.error)
    low, high = found.predict_interval(data.train.at(best.shares))
    distance = ((np.sqrt(data.test.shares) - np.sqrt(best.shares)) ** 2).sum(axis=1)
    nearest = int(distance.argmin())
    return {
        "domain": domain,
        "law": found.law.name,
        "test_mixtures": len(measured),
        "rank_of_the_one_predicted_best": int(order[predicted.argmin()]) + 1,
        "rank_of_the_one_nearest_to_the_proposal": int(order[nearest]) + 1,
        "share_of_test_mixtures_below_the_interval": float(np.mean(measured < high[0])),
        "proposed": {name: round(float(share), 3) for name, share in zip(data.train.sources, best.shares, strict=True)},
        "predicted": best.loss,
        "interval": [float(low[0]), float(high[0])],
        "lowest_measured": float(measured.min()),
        "near": {name: [round(bound, 3) for bound in ends] for name, ends in best.near.items()},
    }


def repetition(file: Path) -> dict[str, Any]:
    """The published law of repetition, a refit with its base, a fit of all parameters, and the plain joint law."""
    table = read_table(file)
    columns = {name: table.numbers(name) for name in ("n_params", "tokens", "unique_tokens")}
    loss, epochs = table.numbers("loss"), table.numbers("epochs")
    base = {name: PUBLISHED[name] for name in ("A", "B", "E", "alpha", "beta")}
    many = epochs > 20
    result: dict[str, Any] = {"runs": len(loss), "beyond_20_epochs": int(many.sum())}
    fits = {
        "published, R_N fitted": fit("repetition", columns, loss, fixed={**base, "R_D": PUBLISHED["R_D"]}, bootstraps=0),
        "base as published": fit("repetition", columns, loss, fixed=base, bootstraps=0),
        "all parameters": fit("repetition", columns, loss, bootstraps=100),
        "joint": fit("joint", columns, loss, bootstraps=0, epochs=epochs),
        "joint, one epoch": fit("joint", columns, loss, bootstraps=0, holdout=epochs > 1),
    }
    for name, one in fits.items():
        errors = np.abs(one.predict(columns) / loss - 1)
        result[name] = {
            "params": one.params,
            "intervals": one.intervals.get("90", {}),
            "objective": one.objective,
            "error": float(errors.mean()),
            "error_beyond_20_epochs": float(errors[many].mean()),
            "warnings": [caveat.code for caveat in one.warnings],
        }
    return result


def over_training(file: Path) -> list[dict[str, Any]]:
    """Gadre et al.'s law fitted to the five runs per corpus that they fitted it to, on their larger runs."""
    table = read_table(file)
    result = []
    for corpus, (floor, a, b, eta) in GADRE.items():
        rows = table.where(f"train_set=={corpus}")
        n, d, loss = rows.numbers("n_params"), rows.numbers("tokens"), rows.numbers("loss/c4_val")
        multiple, held = d / n, n > 1e9
        used = ~held & ((np.abs(multiple - 20) < 1) | ((n < 2e7) & (np.abs(multiple - 320) < 5)))
        ours = fit("tied", {"n_params": n[used], "tokens": d[used]}, loss[used], bootstraps=0)
        wide = fit("tied", {"n_params": n[~held], "tokens": d[~held]}, loss[~held], bootstraps=0)
        points = {"n_params": n[held], "tokens": d[held]}
        published = floor + (a * multiple**eta + b * multiple**-eta)[held] * (6 * n * d)[held] ** -eta
        result.append(
            {
                "corpus": corpus,
                "held_out": len(published),
                "params": ours.params,
                "furthest_from_published": float(np.abs(ours.predict(points) / published - 1).max()),
                "error": float(np.abs(ours.predict(points) / loss[held] - 1).mean()),
                "published_error": float(np.abs(published / loss[held] - 1).mean()),
                "error_fitted_to_all_smaller_runs": float(np.abs(wide.predict(points) / loss[held] - 1).mean()),
            }
        )
    return result


# ---- simulated studies of three sources

_THREE = ("web", "qa", "code")
NOISE = 0.003


def three_sources(seed: int) -> Callable[[Floats], Floats]:
    """A made-up truth: the mean loss of four domains, each helped by every source with a factor and a power of its own."""
    random = np.random.default_rng(seed)
    factors, powers = np.exp(random.normal(0, 0.7, (4, 3))), random.uniform(0.3, 0.8, (4, 3))
    floors, rests, weights = random.uniform(1.5, 2.5, 4), random.uniform(0.2, 1.0, 4), random.dirichlet(np.ones(4))

    def truth(shares: Floats) -> Floats:
        helped = (factors * np.maximum(shares, 0)[:, None, :] ** powers).sum(axis=2)
        return np.asarray((floors + 1 / (rests + helped)) @ weights)

    return truth


def designs(studies: int, tell: TOLD = print) -> dict[str, Any]:
    """How often half the runs of a grid, proposed in rounds, find a mixture within one noise floor of the best."""
    space = make_space(_THREE)
    steps = 6
    grid = np.array([(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)]) / steps
    excess: dict[str, list[float]] = {}
    for seed in range(studies):
        tell(f"simulated study {seed + 1} of {studies}")
        truth, random = three_sources(seed), np.random.default_rng(1000 + seed)
        lowest = minimize(space, truth, noise=0.0).loss

        def run(shares: Floats, truth: Any = truth, random: Any = random) -> Floats:
            return np.asarray(truth(shares) * np.exp(NOISE * random.standard_normal(len(shares))))

        on_grid = run(grid)
        shares = space_filling(space, 7, seed=seed)
        loss = run(shares)
        for count in (4, 3):
            new = expected_improvement(space, Mixtures(_THREE, shares), loss, count, seed=seed)
            shares, loss = np.vstack([shares, new]), np.append(loss, run(new))
        filled = space_filling(space, len(shares), seed=seed)
        found = {
            f"grid of {len(grid)} runs, the best of them": grid[on_grid.argmin()],
            f"{len(shares)} proposed runs, the best of them": shares[loss.argmin()],
            f"{len(shares)} proposed runs, lowest by the process": _lowest(space, shares, loss, seed),
            f"{len(filled)} space-filling runs, lowest by the process": _lowest(space, filled, run(filled), seed),
        }
        for name, mixture in found.items():
            excess.setdefault(name, []).append(float(truth(mixture[None])[0] / lowest - 1))
    return {
        name: {"within_one_noise_floor": float(np.mean(np.array(values) <= NOISE)), "mean_excess": float(np.mean(values))}
        for name, values in excess.items()
    }


def _lowest(space: Any, shares: Floats, loss: Floats, seed: int) -> Floats:
    found = fit_shares(Mixtures(_THREE, shares), loss, law="gaussian-process", seed=seed)
    return minimize(space, objective_of({"mean": found}), noise=NOISE, seed=seed).shares


def coverage(studies: int, sizes: Sequence[int] = (16, 32, 64), tell: TOLD = print) -> dict[int, dict[str, float]]:
    """How often 90 % intervals hold a run of a new mixture, by the number of runs fitted to."""
    space, result = make_space(_THREE), {}
    for runs in sizes:
        held, errors = [], []
        for seed in range(studies):
            tell(f"{runs} runs, simulated study {seed + 1} of {studies}")
            truth, random = three_sources(seed), np.random.default_rng(2000 + seed)
            mixtures = random.dirichlet(np.ones(3), size=runs + 200)
            losses = truth(mixtures) * np.exp(NOISE * random.standard_normal(len(mixtures)))
            names = ("exponential", "power", "additive", "gaussian-process")
            found = fit_shares(Mixtures(_THREE, mixtures[:runs]), losses[:runs], law=names, seed=seed)
            new = Mixtures(_THREE, mixtures[runs:])
            low, high = found.predict_interval(new)
            held.append(float(np.mean((losses[runs:] >= low) & (losses[runs:] <= high))))
            errors.append(float(np.mean(np.abs(found.predict(new) / truth(mixtures[runs:]) - 1))))
        result[runs] = {"covered": float(np.mean(held)), "lowest": float(min(held)), "error": float(np.mean(errors))}
    assert space.contains(mixtures).all()
    return result


def require(folder: Path, names: Mapping[str, str]) -> dict[str, Path]:
    """The files in a folder; UserError naming what is missing."""
    found = {name: folder / path for name, path in names.items()}
    missing = [str(path) for path in found.values() if not path.exists()]
    if missing:
        raise UserError(f"--data {folder}: no {', '.join(missing)}; docs/benchmarks.md says where the tables are published")
    return found
