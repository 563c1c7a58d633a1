"""Does FP8 train? The same runs in BF16 and in each FP8 recipe, over several seeds, and how far their losses end apart.

fp32 is there as a control: how far it ends from BF16 is what rounding alone does to runs of this length.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.config.load import validate
from megatron_synth.config.schema import Config
from megatron_synth.core.log import say
from megatron_synth.data.loading.run_data import open_data
from megatron_synth.parallel.plan import plan
from megatron_synth.train.record import metrics

BASELINE, CONTROL = "bf16", "fp32"
LIMIT = 0.01
"""How far, relative to BF16's, the end of a run may be off."""


@dataclass(frozen=True)
class Trial:
    """A finished run."""

    recipe: str
    seed: int
    train_loss: float
    """Mean of the last steps, nats per token."""
    eval_loss: float
    """After the last step, mean over the domains by tokens; NaN without domains."""
    losses: tuple[float, ...]
    """Of every step."""
    layers: str
    """Which layers ran in which format, as the run says."""
    seconds: float


@dataclass(frozen=True)
class Summary:
    """A recipe against BF16, seed by seed."""

    recipe: str
    train_loss: float
    """Mean over the seeds."""
    eval_loss: float
    train_apart: tuple[float, ...]
    """Relative difference of the training loss at the end, by seed; positive is worse."""
    eval_apart: tuple[float, ...]
    within: bool
    """Whether every one of them is within LIMIT."""


def variant(config: dict[str, Any], recipe: str, seed: int) -> Config:
    """The configuration of a run: a recipe such as `current` or `current-e4m3`, or `bf16` or `fp32`."""
    fp8, _, number_format = recipe.partition("-")
    precision = {**config["precision"], "dtype": CONTROL if recipe == CONTROL else BASELINE}
    precision |= {"fp8": "off" if recipe in (BASELINE, CONTROL) else fp8, "fp8_format": number_format or None}
    return validate(Config, {**config, "precision": precision, "train": {**config["train"], "seed": seed}}, recipe)


def run(config: Config, recipes: Sequence[str], seeds: Sequence[int], tail: int) -> list[Trial]:
    """Train every recipe with every seed, one after the other in this process.

    Args:
        config: what to train; its precision and seed are replaced.
        recipes: `bf16`, `fp32` or a recipe of precision.fp8, with `-e4m3` or `-hybrid` for that format.
        seeds: of initial weights and data order.
        tail: steps at the end whose mean loss is compared.

    Raises:
        UserError: a configuration is impossible, or there are fewer steps than `tail`.
    """
    if config.train.steps < tail:
        raise UserError(f"train.steps: {config.train.steps} steps are fewer than the {tail} at the end that are compared")
    content = config.model_dump(mode="json", by_alias=True)
    configs = {(recipe, seed): variant(content, recipe, seed) for recipe in recipes for seed in seeds}
    layouts = {key: plan(value, 1) for key, value in configs.items()}  # refuses all that is wrong before the first run

    from megatron_synth.train.loop import train

    trials = []
    with tempfile.TemporaryDirectory(prefix="bench-fp8-") as folder:
        for (recipe, seed), variant_config in configs.items():
            path = Path(folder) / f"{recipe}-{seed}"
            say(f"\n{recipe}, seed {seed}")
            began = time.perf_counter()
            train(variant_config, layouts[recipe, seed], open_data(variant_config), path)
            records = metrics.read_metrics(path / "metrics.jsonl")
            losses = tuple(record[metrics.LOSS] for record in records)
            trials.append(
                Trial(
                    recipe=recipe,
                    seed=seed,
                    train_loss=statistics.fmean(losses[-tail:]),
                    eval_loss=records[-1].get(metrics.EVAL_LOSS, float("nan")),
                    losses=losses,
                    layers=records[0].get(metrics.PRECISION, ""),
                    seconds=time.perf_counter() - began,
                )
            )
    return trials


def summarize(trials: Sequence[Trial]) -> list[Summary]:
    """One row per recipe, in the order of the trials; BF16 must be among them."""
    baseline = {trial.seed: trial for trial in trials if trial.recipe == BASELINE}
    rows = []
    for recipe in dict.fromkeys(trial.recipe for trial in trials):
        own = [trial for trial in trials if trial.recipe == recipe]
        train_apart = tuple(trial.train_loss / baseline[trial.seed].train_loss - 1 for trial in own)
        eval_apart = tuple(trial.eval_loss / baseline[trial.seed].eval_loss - 1 for trial in own)
        rows.append(
            Summary(
                recipe,
                statistics.fmean(trial.train_loss for trial in own),
                statistics.fmean(trial.eval_loss for trial in own),
                train_apart,
                eval_apart,
                within=all(abs(value) <= LIMIT for value in (*train_apart, *eval_apart) if value == value),
            )
        )
    return rows


def table(rows: Sequence[Summary]) -> list[list[str]]:
    """Cells for `report.markdown_table`."""

    def shares(values: tuple[float, ...]) -> str:
        return ", ".join(f"{100 * value:+.2f}" for value in values)

    cells = [
        ["recipe", "training loss", "against BF16, %, by seed", "validation loss", "against BF16, %, by seed", "within 1 %"]
    ]
    for row in rows:
        is_baseline = row.recipe == BASELINE
        apart = ["", ""] if is_baseline else [shares(row.train_apart), shares(row.eval_apart)]
        verdict = "" if is_baseline else "yes" if row.within else "NO"
        cells.append([row.recipe, f"{row.train_loss:.4f}", apart[0], f"{row.eval_loss:.4f}", apart[1], verdict])
    return cells
