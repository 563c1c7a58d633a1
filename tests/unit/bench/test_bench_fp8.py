"""The comparison of FP8 with BF16: which runs it makes, and what it says of them. Its training is that of `train`."""

from __future__ import annotations

import pytest

from benchmarks.fp8_cli import RECIPES, main
from benchmarks.fp8_convergence import Trial, summarize, table, variant
from megatron_synth.config.errors import ConfigError, UserError
from megatron_synth.config.load import load_file
from megatron_synth.config.rules import check
from megatron_synth.config.schema import Config


def test_every_recipe_fits_the_shipped_configuration() -> None:
    config = load_file(Config, "bench/fp8.yaml")
    content = config.model_dump(mode="json", by_alias=True)
    found = {recipe: variant(content, recipe, 7) for recipe in ("bf16", *RECIPES)}
    assert all(check(made) == [] and made.train.seed == 7 for made in found.values())
    told = {name: (made.precision.dtype, made.precision.fp8, made.precision.fp8_number_format) for name, made in found.items()}
    assert told["bf16"][:2] == ("bf16", "off") and told["fp32"][:2] == ("fp32", "off")
    assert told["current"] == told["current-hybrid"] == ("bf16", "current", "hybrid")
    assert told["blockwise"] == told["blockwise-e4m3"] == ("bf16", "blockwise", "e4m3")
    assert len(set(told.values())) == len(RECIPES) + 1 - 3
    rest = {made.model_dump_json(exclude={"precision"}) for made in found.values()}
    assert len(rest) == 1, "nothing but the precision differs"


def trial(recipe: str, seed: int, train: float, evaluated: float) -> Trial:
    return Trial(recipe, seed, train, evaluated, losses=(train,), layers="", seconds=1.0)


def test_each_seed_is_held_against_its_own_baseline() -> None:
    trials = [
        trial("bf16", 1, 4.0, 5.0),
        trial("bf16", 2, 2.0, 3.0),
        trial("current", 1, 4.02, 5.0),
        trial("current", 2, 1.99, 3.0),
    ]
    trials += [trial("delayed", 1, 4.0, 5.0), trial("delayed", 2, 2.0, 3.06)]
    baseline, current, delayed = summarize(trials)
    assert baseline.within and current.within and not delayed.within
    assert current.train_apart == pytest.approx((0.005, -0.005)) and delayed.eval_apart == pytest.approx((0.0, 0.02))
    assert [row[0] for row in table([baseline, current, delayed])[1:]] == ["bf16", "current", "delayed"]
    assert table([current])[1] == ["current", "3.0050", "+0.50, -0.50", "4.0000", "+0.00, +0.00", "yes"]
    assert table([delayed])[1][-1] == "NO"


def test_mistakes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, words in (
        (["--recipes", "current,fp4"], "unknown recipe 'fp4'; any of fp32, delayed"),
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--json", "nowhere/x.json"], "nowhere is not a folder"),
        (["train.steps=5", "optim.warmup_steps=0"], "5 steps are fewer than the 20 at the end"),
    ):
        with pytest.raises(UserError, match=words):
            main(arguments)
    with pytest.raises(ConfigError, match="blockwise needs a multiple of 128, found 96 MLP channels"):
        main(["--recipes", "blockwise", "model.ffn_hidden_size=96"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="a single process, this launch has 2"):
        main([])
