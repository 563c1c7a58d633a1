"""What is said and refused when a run goes on with another configuration."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import Config
from megatron_synth.train.changes import check_steps, mixture_differences, rate_jump


def _config(steps: int, **optim: Any) -> Config:
    model = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}
    data = {"sources": {"a": {"path": "a", "ratio": 1}}}
    train = {"steps": steps, "global_batch_size": 1, "sequence_length": 8}
    return Config.model_validate({"model": model, "data": data, "train": train, "optim": {"lr": 1e-3, **optim}})


def _jump(before: Config, after: Config, done: int) -> str | None:
    return rate_jump(before.model_dump(mode="json"), after, done)


def test_a_cosine_that_had_ended_and_is_made_longer() -> None:
    # step 100 is the last of the first run, at 0; of 199 intervals to the last step of the second 100 are behind
    text = _jump(_config(100), _config(200), 100)
    assert text == (
        "the learning rate goes from 0.00e+00 in step 100 to 4.96e-04 in step 101: "
        "the schedule that had ended in step 100 was made longer"
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schedule": "wsd"}, "to 1.00e-03 in step 51, where it would have been 4.92e-04"),
        ({"warmup_steps": 60}, "to 8.50e-04 in step 51"),
        ({"lr": 2e-3}, "to 9.84e-04 in step 51"),
        ({"schedule": "constant"}, "goes from 5.08e-04 in step 50"),
    ],
)
def test_a_schedule_changed_in_mid_run(change: dict[str, Any], told: str) -> None:
    text = _jump(_config(100), _config(100, **change), 50)
    assert text is not None and told in text


def test_nothing_is_said_where_nothing_jumps() -> None:
    constant = {"schedule": "constant"}
    assert _jump(_config(100), _config(100, weight_decay=0.2), 50) is None
    assert _jump(_config(100, **constant), _config(200, **constant), 100) is None
    assert _jump(_config(100), _config(200), 0) is None  # nothing was trained yet
    assert _jump(_config(100), _config(100), 100) is None  # nothing is left to train
    assert _jump(_config(100), _config(100), 99) is None  # to 0, as it was going to


def test_settings_of_other_versions_are_passed_over() -> None:
    before = _config(100).model_dump(mode="json")
    before["optim"]["of_the_future"] = 1
    assert rate_jump(before, _config(100), 50) is None


def test_fewer_steps_than_done_are_refused() -> None:
    check_steps("step_00000020", 20, 20)
    with pytest.raises(UserError, match=r"train\.steps: 19, but step_00000020 is of step 20; set it to 20 or more"):
        check_steps("step_00000020", 20, 19)


def _mixture(before: Config, after: Config, contents: dict[str, Any] | None = None) -> list[str]:
    saved = {"a": "1"} if contents is None else contents
    return mixture_differences(before.model_dump(mode="json"), saved, after, {"a": "1", "b": "2"})


def _with_data(config: Config, **data: Any) -> Config:
    plain = config.model_dump(mode="json", by_alias=True)
    return Config.model_validate(plain | {"data": plain["data"] | data})


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"seed": 7}, ["the data seed (data.seed, else train.seed) was 1234 and is 7"]),
        ({"windows_per_sequence": 2}, ["data.windows_per_sequence was 1 and is 2"]),
        (
            {"sources": {"a": {"path": "a", "ratio": 1, "unique_tokens": 64}}},
            ["data.sources.a.unique_tokens was null and is 64"],
        ),
        (
            {"sources": {"b": {"path": "b", "ratio": "1/3"}, "a": {"path": "a", "ratio": "2/3"}}},
            ["data.sources were a and are b, a (their order counts)", "data.sources.a.ratio was 1 and is 2/3"],
        ),
    ],
)
def test_what_differs_between_mixtures(data: dict[str, Any], told: list[str]) -> None:
    assert _mixture(_config(10), _with_data(_config(10), **data)) == told


def test_prepared_data_that_was_changed_is_named() -> None:
    elsewhere = _with_data(_config(10), sources={"a": {"path": "other/a", "ratio": 1}})
    assert _mixture(_config(10), _config(10), {"a": "0"}) == ["data.sources.a: a was prepared again (digest 0 -> 1)"]
    assert _mixture(_config(10), elsewhere) == []  # a copy of the same data
    assert _mixture(_config(10), elsewhere, {"a": "0"}) == [
        "data.sources.a: other/a holds other data than a did (digest 0 -> 1)"
    ]
    assert _mixture(_config(10), elsewhere, {}) == ["data.sources.a.path was a and is other/a"]
