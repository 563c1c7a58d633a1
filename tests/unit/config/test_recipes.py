"""Recipes: each starts from GPUs that one has, fits them, and says what it was predicted to reach."""

from __future__ import annotations

import re

import pytest

from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.estimate.hardware import ACCELERATORS
from megatron_synth.estimate.memory import memory_per_rank
from megatron_synth.estimate.search import FRAGMENTATION, RESERVED
from megatron_synth.estimate.step_time import rates, step_time
from megatron_synth.parallel.plan import plan
from tests.support import ROOT

RECIPES = sorted(path.name for path in (ROOT / "configs" / "train").glob("recipe-*.yaml"))


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 4


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_gpus_and_its_numbers_are_those_of_the_plan(name: str) -> None:
    text = (ROOT / "configs" / "train" / name).read_text()
    config = load_file(Config, f"train/{name}")
    stated = re.match(r"# recipe: ([0-9]+) x ([a-z0-9]+), ", text)
    predicted = re.search(r"# predicted: ([0-9,]+) tokens/s/GPU", text)
    tokens = re.search(r"# ([0-9.]+)B tokens", text)
    assert stated and predicted and tokens
    chip = ACCELERATORS[stated[2]]
    layout = plan(config, int(stated[1]))
    fp8 = config.precision.fp8 != "off"
    fullest = max(stage.total for stage in memory_per_rank(config, layout.data, fp8=fp8))
    assert fullest * (1 + FRAGMENTATION) + RESERVED < chip.memory
    overlap = all(config.parallel.overlaps(layout.replicas, on_gpu=True))
    time = step_time(config, layout.data, chip, fp8=fp8, overlap=overlap)
    found, _, _ = rates(config, layout.world_size, time.total, chip)
    assert found == pytest.approx(float(predicted[1].replace(",", "")), rel=0.05)
    assert config.train.steps * config.train.tokens_per_step == pytest.approx(float(tokens[1]) * 1e9, rel=0.01)
