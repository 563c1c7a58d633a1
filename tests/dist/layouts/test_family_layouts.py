"""Families of models: imported from classes of transformers, trained in every layout as they would be, and exported again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_synth.config.load import load_file, load_yaml
from megatron_synth.config.schema import Config
from megatron_synth.config.yaml12 import dump
from megatron_synth.train.record import metrics
from tests.dist.pool import RankPool
from tests.dist.layouts.test_huggingface import STEPS, convert, train_llama
from tests.hf_models import MODELS, model_of
from tests.support import LAYOUTS, VOCAB_SIZE, read_metrics

LAYOUTS_OF = {
    "llama": ("tp2pp2",),
    "mistral": ("tp2pp2", "tp2cp2"),
    "qwen2": ("cp2", "tp2pp2vp2"),
    "qwen3": ("tp2-whole-sequence", "tp2pp2"),
    "olmo2": ("tp2-whole-sequence", "tp2pp2", "tp2cp2"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_family_trains_as_transformers_does(ranks: RankPool, config: Path, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    model = model_of(name)
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path / "theirs")
    convert(ranks, "from-hf", str(tmp_path / "theirs"), str(tmp_path / "imported"))

    # what was imported goes back, bit for bit, to the same class
    convert(ranks, "to-hf", str(tmp_path / "imported"), str(tmp_path / "back"))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32, attn_implementation="eager")
    assert type(back) is type(model)
    assert back.config.max_position_embeddings == 256
    for key, weight in back.state_dict().items():
        assert torch.equal(weight, before[key]), key
    tokens = torch.randint(0, VOCAB_SIZE, (2, 32), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        theirs = model(tokens).logits
        assert torch.equal(back(tokens).logits, theirs)

    own = tmp_path / "own.yaml"
    own.write_text(_with_model(config, tmp_path / "imported" / "model.yaml"))
    settings = (f"checkpoint.init_from={tmp_path / 'imported'}", f"train.steps={STEPS}")
    expected = train_llama(model, load_file(Config, own, settings))
    for layout in LAYOUTS_OF[name]:
        _train(ranks, own, tmp_path / layout, layout, settings)
        losses = [record[metrics.LOSS] for record in read_metrics(tmp_path / layout)]
        assert losses == pytest.approx(expected, abs=1e-4, rel=0), layout
    assert expected[-1] < expected[0] - 0.02


def _with_model(config: Path, model: Path) -> str:
    """The base configuration with another model."""
    return dump({**load_yaml(config), "model": load_yaml(model)["model"]})


def _train(ranks: RankPool, config: Path, run: Path, layout: str, settings: Sequence[str]) -> None:
    size, layout_settings = LAYOUTS[layout]
    arguments = ["train", str(config), *layout_settings, *settings, "--run-dir", str(run)]
    results = ranks.run(size, "megatron_synth.cli.main.main", arguments)
    assert [result.value for result in results] == [0] * size, "".join(result.stderr for result in results)
