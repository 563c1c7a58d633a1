"""Samples and steps of a batch ramp, by counting; what optimizers and ramps cannot have is refused by its key."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_synth.config.errors import ConfigError
from megatron_synth.config.load import digest
from megatron_synth.config.rules import check
from megatron_synth.config.schema import Config, Progress
from megatron_synth.parallel.plan import plan

RAMP = [{"steps": 3, "global_batch_size": 2}, {"steps": 2, "global_batch_size": 4}]


def config(ramp: list[dict[str, int]] | None = None, **more: Any) -> Config:
    train = {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 16, "batch_ramp": ramp or []}
    model = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
    sources = {"a": {"path": "a", "ratio": 1}}
    return Config.model_validate({"model": model, "data": {"sources": sources}, "train": {**train, **more}})


@pytest.mark.parametrize("windows", [1, 2])
def test_steps_and_samples_agree_with_counting(windows: int) -> None:
    run = config(RAMP)
    run = run.model_copy(update={"data": run.data.model_copy(update={"windows_per_sequence": windows})})
    sizes = [2, 2, 2, 4, 4, 8, 8, 8, 8, 8]
    assert [run.samples_of_step(step) for step in range(10)] == [size * windows for size in sizes]
    assert run.total_samples == sum(sizes) * windows
    for done in range(11):
        for before in (0, 7):  # samples of steps of another size, before a resume
            progress = Progress(done, before + sum(sizes[:done]) * windows)
            assert run.samples_at_end(progress) == before + sum(sizes) * windows
            ends = [progress.samples + sum(sizes[done:step]) * windows for step in range(done, 11)]
            for samples in range(progress.samples, ends[-1]):
                whole = sum(end <= samples for end in ends[1:])
                assert run.step_after(samples, progress) == done + whole, (done, samples)


def test_without_a_ramp_nothing_changes() -> None:
    plain = config()
    assert plain.total_samples == 80 and plain.step_after(79, Progress()) == 9
    assert "batch_ramp" in plain.model_dump()["train"] and digest(plain) != digest(config(RAMP))


@pytest.mark.parametrize(
    ("ramp", "key", "message"),
    [
        ([{"steps": 3, "global_batch_size": 3}], "train.batch_ramp.0.global_batch_size", "3 is not divisible by"),
        ([{"steps": 10, "global_batch_size": 2}], "train.batch_ramp", "its 10 steps leave none of train.steps = 10"),
    ],
)
def test_what_cannot_be_is_refused(ramp: list[dict[str, int]], key: str, message: str) -> None:
    (problem,) = check(config(ramp))
    assert problem.path == key and message in problem.message


def test_a_stage_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.batch_ramp.0.global_batch_size: 2 is not divisible by .* 2 data"):
        plan(config(RAMP), 2)


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        ("optim", {"muon_momentum": 0.9}, "optim.muon_momentum"),
        ("optim", {"muon_ns_steps": 4}, "optim.muon_ns_steps"),
    ],
)
def test_settings_of_muon_need_it(section: str, values: dict[str, Any], key: str) -> None:
    run = config()
    changed = run.model_copy(update={section: getattr(run, section).model_copy(update=values)})
    assert [problem.path for problem in check(changed)] == [key]
    muon = changed.model_copy(update={"optim": changed.optim.model_copy(update={"name": "muon"})})
    assert check(muon) == []
    wide = muon.model_copy(update={"model": muon.model.model_copy(update={"mup_base_hidden_size": 16})})
    (problem,) = check(wide)
    assert problem.path == "model.mup_base_hidden_size" and "cannot be set with optim.name: muon" in problem.message
