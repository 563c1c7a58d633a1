"""FP8's settings: what contradicts what, and what is asked of a device that cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.config.load import digest
from megatron_synth.config.rules import check
from megatron_synth.config.schema import Config
from megatron_synth.parallel.plan import Layout


def build(fp8: str = "current", precision: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    content: dict[str, Any] = {
        "model": {"num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 8, "vocab_size": 512},
        "data": {"sources": {"web": {"path": "web", "ratio": 1}}},
        "train": {"steps": 1, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 64},
        "parallel": {},
    }
    for name, values in sections.items():
        content[name] |= values
    return Config(**content, precision={"fp8": fp8, **(precision or {})})


def problems(config: Config) -> dict[str, str]:
    return {problem.path: problem.message for problem in check(config)}


@pytest.mark.parametrize("fp8", ["delayed", "current", "blockwise"])
def test_sizes_that_fit(fp8: str) -> None:
    assert problems(build(fp8)) == {}
    assert problems(build(fp8, parallel={"tensor_model_parallel_size": 2})) == {}


@pytest.mark.parametrize(
    ("fp8", "sections", "path", "words"),
    [
        ("current", {"model": {"ffn_hidden_size": 520}}, "model.ffn_hidden_size", "multiple of 16, found 520 MLP channels"),
        ("blockwise", {"model": {"ffn_hidden_size": 576}}, "model.ffn_hidden_size", "multiple of 128, found 576"),
        ("blockwise", {"train": {"micro_batch_size": 1}}, "train.sequence_length", "found 64 tokens of a micro-batch"),
        ("current", {"train": {"sequence_length": 36}}, "train.sequence_length", "found 72 tokens"),
        ("blockwise", {"model": {"hidden_size": 192}}, "model.hidden_size", "found 192 hidden size"),
        (
            "blockwise",
            {"parallel": {"tensor_model_parallel_size": 4}},
            "model.num_attention_heads",
            "found 256 / 4 tensor-parallel ranks query channels",
        ),
        (
            "blockwise",
            {"model": {"num_query_groups": 2}, "parallel": {"tensor_model_parallel_size": 2}},
            "model.num_query_groups",
            "found 384 / 2 tensor-parallel ranks query, key and value channels",
        ),
    ],
)
def test_sizes_that_do_not(fp8: str, sections: dict[str, Any], path: str, words: str) -> None:
    found = problems(build(fp8, **sections))
    assert words in found[path] and f"precision.fp8: {fp8}" in found[path]
    assert path not in problems(build("off", **sections))


@pytest.mark.parametrize(
    ("precision", "path"),
    [
        ({"fp8_first_last_bf16": 2}, "precision.fp8_first_last_bf16"),
        ({"fp8": "off", "fp8_param_gather": True}, "precision.fp8_param_gather"),
        ({"fp8_backend": "own", "fp8_param_gather": True}, "precision.fp8_param_gather"),
        ({"fp8_param_gather": True, "dtype": "fp32"}, "precision.fp8_param_gather"),
        ({"fp8_param_gather": True, "fp8": "delayed", "fp8_first_last_bf16": True}, "precision.fp8_first_last_bf16"),
        ({"fp8_backend": "te", "dtype": "fp32"}, "precision.fp8_backend"),
        ({"fp8_backend": "te", "fp8": "delayed", "fp8_first_last_bf16": True}, "precision.fp8_first_last_bf16"),
    ],
)
def test_settings_that_contradict_each_other(precision: dict[str, Any], path: str) -> None:
    assert list(problems(build(precision.pop("fp8", "current"), precision))) == [path]


@pytest.mark.parametrize("backend", ["auto", "te"])
@pytest.mark.parametrize("fp8", ["delayed", "current", "blockwise"])
def test_weights_in_fp8_need_the_distributed_optimizer(fp8: str, backend: str) -> None:
    precision = {"fp8_param_gather": True, "fp8_backend": backend, "fp8_log_every": 10}
    assert problems(build(fp8, precision)) == {}
    found = problems(build(fp8, precision, parallel={"use_distributed_optimizer": False}))
    assert "use_distributed_optimizer: true" in found["precision.fp8_param_gather"] and len(found) == 1


def test_first_and_last_layers() -> None:
    assert [build(precision={"fp8_first_last_bf16": value}).precision.fp8_bf16_ends for value in (False, True, 0, 1)] == [
        0,
        1,
        0,
        1,
    ]
    with pytest.raises(ValueError, match="fp8_first_last_bf16"):
        build(precision={"fp8_first_last_bf16": -1})


def test_a_run_without_fp8_keeps_its_digest() -> None:
    config = build("off")
    content = config.model_dump(mode="json", by_alias=True)
    assert digest(config) == digest(build("off", {"fp8_format": "e4m3", "fp8_log_every": 3}))
    assert "fp8" in json.dumps(content)
    on = {digest(build(fp8, {"fp8_format": name})) for fp8 in ("delayed", "current") for name in ("hybrid", "e4m3")}
    assert len(on | {digest(config)}) == 5


def test_a_run_without_weights_in_fp8_keeps_its_digest() -> None:
    content = build().model_dump(mode="json", by_alias=True)
    assert content["precision"]["fp8_param_gather"] is False
    assert digest(build()) == "779c179c7d97"
    assert digest(build(precision={"fp8_param_gather": True})) != digest(build())


# ---- the device


@pytest.fixture(scope="module")
def setup() -> Any:
    from megatron_synth.parallel import engine

    engine.load()
    from megatron_synth.model.fp8 import setup as setup_module

    return setup_module


@pytest.fixture
def cpu_device() -> Any:
    import torch

    return torch.device("cpu")


@pytest.mark.parametrize("number_format", ["hybrid", "e4m3"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("fp8", ["delayed", "current", "blockwise"])
def test_the_cpu_has_every_recipe(setup: Any, cpu_device: Any, fp8: str, dtype: str, number_format: str) -> None:
    config = build(fp8, {"dtype": dtype, "fp8_format": number_format, "fp8_first_last_bf16": True})
    plan = setup.plan_fp8(config, cpu_device)
    text = plan.describe()
    assert plan.backend == "own" and "TransformerEngine needs a GPU" in text
    assert (
        "layers 1 to 2" in text and f"{dtype}: embedding, norms, attention, output layer, the first and the last layer" in text
    )
    assert "EMULATED" in text and ("e5m2" in text) is (number_format == "hybrid")
    assert plan.mcore_options() == {}


def test_no_fp8_no_plan(setup: Any, cpu_device: Any) -> None:
    assert setup.plan_fp8(build("off"), cpu_device) is None


def test_a_product_that_is_wrong_is_found(setup: Any, cpu_device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    real = setup.ops.fp8.product

    def without_scale(a: Any, b: Any, *arguments: Any, **options: Any) -> Any:
        return real(a, replace(b, scale=torch.ones_like(b.scale)) if b.block is None else b, *arguments, **options)

    monkeypatch.setattr(setup.ops.fp8, "product", without_scale)
    with pytest.raises(
        UserError,
        match=r"fp8: delayed \(hybrid\) is unavailable on this CPU.*forward product is off.*works here: blockwise .hybrid., bl",
    ):
        setup.plan_fp8(build("delayed"), cpu_device)


def test_a_format_that_the_device_lacks_is_named(setup: Any, cpu_device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    real = setup.ops.fp8.product

    def without_e5m2(a: Any, b: Any, *arguments: Any, **options: Any) -> Any:
        if a.block is None and torch.float8_e5m2 in (a.data.dtype, b.data.dtype):
            raise RuntimeError("no e5m2 here\nmore text")
        return real(a, b, *arguments, **options)

    monkeypatch.setattr(setup.ops.fp8, "product", without_e5m2)
    with pytest.raises(
        UserError, match=r"no e5m2 here. what works here: delayed .e4m3., current .e4m3., blockwise .hybrid., blockwise .e4m3."
    ) as caught:
        setup.plan_fp8(build("current"), cpu_device)
    assert "more text" not in str(caught.value)
    assert setup.plan_fp8(build("current", {"fp8_format": "e4m3"}), cpu_device) is not None


def test_transformer_engine_is_not_promised_where_it_cannot_be(setup: Any, cpu_device: Any) -> None:
    with pytest.raises(UserError, match="fp8_backend: te: TransformerEngine needs a GPU"):
        setup.plan_fp8(build("current", {"fp8_backend": "te"}), cpu_device)
    for backend in ("auto", "te"):  # and nobody trains with bf16 weights who asked for others
        with pytest.raises(UserError, match=r"fp8_param_gather: true needs .* TransformerEngine needs a GPU. Set it to false"):
            setup.plan_fp8(build("current", {"fp8_backend": backend, "fp8_param_gather": True}), cpu_device)


@pytest.mark.parametrize(
    ("fp8", "recipe", "precision"),
    [
        ("delayed", "delayed", {"fp8_amax_history_len": 7, "fp8_margin": 1}),
        ("current", "tensorwise", {"fp8_first_last_bf16": 1}),
        ("current", "tensorwise", {"fp8_first_last_bf16": 1, "fp8_param_gather": True}),
        ("blockwise", "blockwise", {"fp8_format": "e4m3", "fp8_first_last_bf16": True}),
    ],
)
def test_what_megatron_core_is_told_of_transformer_engine(
    setup: Any, cpu_device: Any, fp8: str, recipe: str, precision: Any
) -> None:
    from megatron_synth.model.build import transformer_config
    from megatron_synth.model.run_plan import RunPlan

    config = build(fp8, precision)
    plan = setup.Fp8Plan("te", "importable", range(4), config, cpu_device)
    told = transformer_config(RunPlan(config, Layout.single(), cpu_device, {}, plan))
    assert (told.fp8, told.fp8_recipe) == (config.precision.fp8_number_format, recipe)
    assert (told.fp8_margin, told.fp8_amax_history_len) == (config.precision.fp8_margin, config.precision.fp8_amax_history_len)
    assert told.fp8_amax_compute_algo == "max" and told.first_last_layers_bf16 is (fp8 != "delayed")
    ends = config.precision.fp8_bf16_ends
    assert (told.num_layers_at_start_in_bf16, told.num_layers_at_end_in_bf16) == (ends, ends)
    assert told.fp8_param is config.precision.fp8_param_gather
    assert ("weights kept and gathered in FP8" in plan.describe()) is told.fp8_param
    assert plan.start() is None and transformer_config(RunPlan(config, Layout.single(), cpu_device, {}, None)).fp8 is None


@pytest.mark.parametrize(("fp8", "recipe"), [("delayed", "delayed"), ("current", "tensorwise"), ("blockwise", "blockwise")])
@pytest.mark.parametrize("gathers", [False, True])
def test_what_the_wrapper_and_the_optimizer_are_told_of_weights_in_fp8(
    setup: Any, monkeypatch: pytest.MonkeyPatch, fp8: str, recipe: str, gathers: bool
) -> None:
    from types import SimpleNamespace

    from megatron_synth.parallel import wrap

    told: dict[str, Any] = {}
    monkeypatch.setattr(wrap.parallel_state, "get_data_parallel_world_size", lambda **_: 1)
    monkeypatch.setattr(wrap, "DistributedDataParallel", lambda **given: told.update(given) or SimpleNamespace(**given))
    monkeypatch.setattr(wrap, "get_megatron_optimizer", lambda given, chunks, **_: told.update(optimizer=given))
    config = build(fp8, {"fp8_param_gather": gathers})
    wrap.build_optimizer(wrap.wrap_ddp([SimpleNamespace(config=None)], config), config)  # type: ignore[list-item]
    assert told["ddp_config"].fp8_param_gather is gathers and told["ddp_config"].use_distributed_optimizer
    assert told["optimizer"].fp8_recipe == (recipe if gathers else None)
