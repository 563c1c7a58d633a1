"""Choices among backends: what is available, what is forced, what is reported."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_synth.cli import kernels as kernels_module
from megatron_synth.config.errors import ConfigError, UserError
from megatron_synth.config.load import digest, load_file
from megatron_synth.config.schema import Config, KernelsConfig
from megatron_synth.model import kernels
from megatron_synth_kernels import registry
from megatron_synth_kernels.registry import OPERATIONS, KernelUnavailable, choose

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_active", {})
    return


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU of compute capability 9.0 with Triton but no other library."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = registry.importlib.util.find_spec
    absent = ("transformer_engine", "apex", "amp_C", "fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda")
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None if name in absent else found(name))


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_a_cpu_gets_torch_for_everything(interpret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    choices = choose({}, CPU, torch.float32)
    assert {choice.backend for choice in choices.values()} == {"torch"} and list(choices) == list(OPERATIONS)
    why = dict(choices["rms_norm"].others)["triton"]
    assert why == ("interpreted: only when forced" if interpret == "1" else "needs a CUDA device")
    assert choices["attention"].reason == "the only one"


@pytest.mark.usefixtures("hopper")
def test_a_gpu_gets_the_first_that_can_be_had() -> None:
    choices = choose({"swiglu": "torch"}, CUDA, torch.bfloat16)
    assert choices["rms_norm"].backend == "triton" and choices["rms_norm"].reason == "preferred"
    assert dict(choices["rms_norm"].others) == {
        "te": "transformer_engine is not installed",
        "apex": "fused_layer_norm_cuda is not installed",
        "torch": "comes after triton",
        "compile": "comes after triton",
    }
    assert choices["swiglu"].backend == "torch" and choices["swiglu"].reason == "forced by the configuration"
    assert dict(choices["swiglu"].others)["triton"] == "not asked for"
    adam = choices["adam"]
    assert adam.backend == "torch"
    assert adam.reason == "first that is available; ahead of it: transformer_engine is not installed; amp_C is not installed"


@pytest.mark.usefixtures("hopper")
def test_devices_and_types_that_kernels_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose({}, CUDA, torch.float16)["rope"].reason.endswith("takes fp32 and bf16, not float16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert choose({}, CUDA, torch.float32)["rope"].reason.endswith("needs compute capability 8.0 or more, this device has 7.5")


@pytest.mark.usefixtures("hopper")
def test_a_library_of_another_version_or_that_breaks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(registry.importlib.metadata, "version", lambda name: "2.13.0")
    others = dict(choose({}, CUDA, torch.bfloat16)["rms_norm"].others)
    assert others["te"] == "needs transformer_engine >= 2.9, < 2.12, found 2.13.0"
    monkeypatch.setattr(registry.importlib.metadata, "version", lambda name: "2.11.0+abc")

    def broken(name: str, package: str | None = None) -> None:
        raise OSError("libcublas.so.13: cannot open shared object file\nand more")

    monkeypatch.setattr(registry.importlib, "import_module", broken)
    others = dict(choose({"rms_norm": "torch"}, CUDA, torch.bfloat16)["rms_norm"].others)
    assert others["te"] == "transformer_engine.pytorch does not load: libcublas.so.13: cannot open shared object file"


def test_what_is_forced_and_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelUnavailable, match="rope by triton is unavailable on cpu: needs a CUDA device"):
        choose({"rope": "triton"}, CPU, torch.float32)
    with pytest.raises(KernelUnavailable, match="no backend 'te' for rope; one of: auto, triton, torch, compile"):
        choose({"rope": "te"}, CPU, torch.float32)
    with pytest.raises(KernelUnavailable, match="no operation 'norm'; one of: rms_norm"):
        choose({"norm": "torch"}, CPU, torch.float32)


def test_compilation_needs_a_compiler_and_is_never_taken_by_itself(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = [[backend.name for backend in operation.backends] for operation in OPERATIONS.values()]
    assert [order[-2:] for order in orders if "compile" in order] == [["torch", "compile"]] * 4
    for compiler, expected in (("no-such-compiler", "needs a C++ compiler: no-such-compiler is not installed"), ("sh", None)):
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.setattr(registry.sysconfig, "get_path", lambda name, at=config_file.parent: str(at))
        (config_file.parent / "Python.h").touch()
        if expected is None:
            assert choose({"rope": "compile"}, CPU, torch.float32)["rope"].backend == "compile"
        else:
            with pytest.raises(
                ConfigError, match=f"kernels.rope: rope by compile is unavailable on cpu: {expected}".replace("+", r"\+")
            ):
                kernels.select(load_file(Config, config_file, ["kernels.rope=compile"]))
    (config_file.parent / "Python.h").unlink()
    with pytest.raises(KernelUnavailable, match="needs Python's C headers"):
        choose({"rope": "compile"}, CPU, torch.float32)


def test_who_names_the_norm_means_the_one_after_an_addition_too(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.shutil, "which", lambda name: name)  # nothing is compiled here: any compiler will do
    monkeypatch.setattr(registry.sysconfig, "get_path", lambda name: str(config_file.parent))
    (config_file.parent / "Python.h").touch()

    def chosen(*settings: str) -> str:
        return kernels.select(load_file(Config, config_file, settings))["rms_norm_residual"].backend

    assert chosen() == "torch" and chosen("kernels.rms_norm=compile") == "compile"
    assert chosen("kernels.rms_norm=compile", "kernels.rms_norm_residual=torch") == "torch"
    assert kernels.joins_additions_to_norms(kernels.select(load_file(Config, config_file)))  # torch's both
    for backend, joined in (("compile", True), ("torch", False)):
        choices = choose({"rms_norm": "compile", "rms_norm_residual": backend}, CPU, torch.float32)
        assert kernels.joins_additions_to_norms(choices) is joined


def test_torch_until_something_is_activated(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_synth_kernels.torch import norm

    assert registry.get("rms_norm") is norm.rms_norm
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    forced, plain = choose({"rms_norm": "triton"}, CPU, torch.float32), choose({}, CPU, torch.float32)
    registry.activate(forced)
    from megatron_synth_kernels.triton import norm as triton_norm

    assert registry.get("rms_norm") is triton_norm.rms_norm
    assert registry.are_active(forced) and not registry.are_active(plain)
    registry.activate(plain)
    assert registry.get("rms_norm") is norm.rms_norm
    assert registry.are_active(plain) and not registry.are_active(forced)


def test_every_backend_that_needs_no_library_loads() -> None:
    for operation in OPERATIONS.values():
        for backend in operation.backends:
            if backend.target.startswith(".") and backend.name in ("torch", "triton"):
                assert backend.load() is not None, (operation.name, backend.name)


def test_the_configuration_names_exactly_what_there_is() -> None:
    for name, operation in OPERATIONS.items():
        allowed = typing.get_args(KernelsConfig.model_fields[name].annotation)
        assert allowed == ("auto", *(backend.name for backend in sorted_as_documented(operation, allowed))), name
        assert all(backend.name in registry.BACKENDS for backend in operation.backends)
    assert set(KernelsConfig.model_fields) == set(OPERATIONS)


def sorted_as_documented(operation: registry.Operation, allowed: tuple[str, ...]) -> list[registry.Backend]:
    return sorted(operation.backends, key=lambda backend: allowed.index(backend.name) if backend.name in allowed else -1)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(
        "base: model/tiny-1m.yaml\ndata: {sources: {a: {path: nowhere, ratio: 1}}}\n"
        "train: {steps: 1, global_batch_size: 1, sequence_length: 8}\nprecision: {dtype: fp32}\n"
    )
    return file


def test_a_run_that_names_what_is_not_there_is_told_before_anything_starts(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if torch.cuda.is_available():
        pytest.skip("Triton is available here")
    config = load_file(Config, config_file, ["kernels.rms_norm=triton"])
    with pytest.raises(
        ConfigError, match=r"kernels.rms_norm: rms_norm by triton is unavailable on cpu: needs a CUDA device; cho"
    ):
        kernels.select(config)
    with pytest.raises(ConfigError, match=r"kernels.rope: expected 'auto', 'triton', 'torch' or 'compile', got 'te'"):
        load_file(Config, config_file, ["kernels.rope=te"])


def test_the_digest_counts_only_backends_that_are_named(config_file: Path) -> None:
    plain = digest(load_file(Config, config_file))
    assert digest(load_file(Config, config_file, ["kernels.rope=auto"])) == plain
    assert digest(load_file(Config, config_file, ["kernels.rope=torch"])) != plain


def test_ranks_that_chose_otherwise_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = choose({}, CPU, torch.float32)
    other = {name: choice.backend for name, choice in mine.items()}

    def gather(everywhere: list[dict[str, str]], own: dict[str, str]) -> None:
        everywhere[:] = [own, own, other]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    kernels.check_same_on_all_ranks(mine)
    other["swiglu"] = "te"
    with pytest.raises(UserError, match=r"kernels.swiglu: te on rank 2, torch on rank 0; install the same on all nodes"):
        kernels.check_same_on_all_ranks(mine)


def test_the_table_and_the_header(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels_module.main([str(config_file), "kernels.rope=torch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("kernels on ") and lines[0].endswith(", fp32")
    cells = {line.split()[0]: line for line in lines[2:]}
    assert list(cells) == list(OPERATIONS)
    assert "forced by the configuration" in cells["rope"] and "triton: " in cells["rope"]
    told = kernels.summary(choose({"rope": "torch"}, CPU, torch.float32))
    assert "kernels torch: rope (forced by the configuration)" in told
    assert sum(len(re.findall(r"\bswiglu\b", line)) for line in told) == 1
