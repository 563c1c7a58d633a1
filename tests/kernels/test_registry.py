"""Choices among backends: what is available, what is forced, what is reported."""

from __future__ import annotations

import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

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
    absent = (
        "transformer_engine",
        "flash_attn_interface",
        "apex",
        "amp_C",
        "fused_layer_norm_cuda",
        "fused_weight_gradient_mlp_cuda",
    )
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None if name in absent else found(name))


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_a_cpu_gets_torch_for_everything(interpret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    choices = choose({}, CPU, torch.float32)
    assert {choice.backend for choice in choices.values()} == {"torch"} and list(choices) == list(OPERATIONS)
    why = dict(choices["rms_norm"].others)["triton"]
    assert why == ("interpreted: only when forced" if interpret == "1" else "needs a CUDA device")
    assert choices["attention"].reason == "first that is available; ahead of it: needs a CUDA device"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("settings", "cudnn_version", "chosen", "why_not"),
    [
        ((), 91900, "cudnn", None),
        ((), 91500, "flash", "needs cuDNN above 9.15, found 91500"),
        (("data.document_masks=true",), 91900, "flash", "takes whole rows, and data.document_masks is set"),
        (("model.sliding_window=4",), 91900, "flash", "takes whole rows, and the model has windows"),
        (("model.kv_channels=12",), 91900, "torch", "takes heads of a multiple of 8 and at most 256 channels, not 12"),
        (("precision.dtype=fp32",), 91900, "torch", "takes bf16"),
    ],
)
def test_attention_is_the_fastest_that_takes_the_run(
    settings: tuple[str, ...],
    cudnn_version: int,
    chosen: str,
    why_not: str | None,
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn_version)
    monkeypatch.setattr(kernels, "device", lambda: CUDA)
    monkeypatch.setattr(kernels, "torch_name", lambda: "cuda")
    config = load_file(Config, config_file, ["precision.dtype=bf16", *settings])
    choice = kernels.select(config)["attention"]
    assert choice.backend == chosen
    others = dict(choice.others)
    assert others.get("cudnn") == why_not
    assert why_not is None or chosen == "torch" or "flash_attn_interface is not installed" in others["fa3"]
    if why_not is not None:
        assert why_not in choice.reason
        with pytest.raises(ConfigError, match=r"kernels.attention"):
            kernels.select(load_file(Config, config_file, ["precision.dtype=bf16", *settings, "kernels.attention=cudnn"]))


@pytest.mark.parametrize(("name", "settings"), [("te", ()), ("cudnn", ()), ("cudnn", ("data.document_masks=true",))])
def test_attention_that_would_be_ignored_is_refused(name: str, settings: tuple[str, ...], config_file: Path) -> None:
    alone = [f"kernels.attention={name}", *settings]
    shared = [*alone, "parallel.context_parallel_size=2"]
    with pytest.raises(ConfigError, match=rf"kernels.attention: '{name}' does nothing where ranks share sequences"):
        load_file(Config, config_file, shared)
    if settings:
        with pytest.raises(ConfigError, match=r"kernels.attention: 'cudnn' takes whole rows, not data.document_masks"):
            load_file(Config, config_file, alone)
    assert load_file(Config, config_file, ["kernels.attention=fa3", "parallel.context_parallel_size=2"])


def test_attention_is_held_to_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch is allowed one kernel and no other, whichever the call."""
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

    from megatron_synth_kernels.torch.attention import backends

    allowed = []
    monkeypatch.setattr(backends, "causal_attention", lambda *given: (allowed.append(_cur_sdpa_kernel_backends()), given[0])[1])
    x = torch.randn(4, 1, 2, 8)
    backends.cudnn(x, x, x, 1.0)
    backends.flash(x, x, x, 1.0, torch.tensor([0, 4], dtype=torch.int32), 4)
    assert allowed == [[SDPBackend.CUDNN_ATTENTION], [SDPBackend.FLASH_ATTENTION]]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_by_transformer_engine(documents: bool, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its module is given, by one that computes the definition from it."""
    from megatron_synth_kernels.torch.attention.causal import causal_attention

    class Module:
        def __init__(self, heads: int, channels: int, **settings: Any):
            self.settings = settings

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, window_size: tuple[int, int], **ends: Any) -> Tensor:
            own = None if window_size[0] == -1 else window_size[0] + 1
            assert window_size[1] == 0 and self.settings["attention_dropout"] == 0.0
            if self.settings["qkv_format"] == "sbhd":
                assert self.settings["attn_mask_type"] == "causal"
                return causal_attention(q, k, v, self.settings["softmax_scale"], window=own)
            assert self.settings["attn_mask_type"] == "padding_causal"
            assert ends["cu_seqlens_q"] is ends["cu_seqlens_kv"] and ends["max_seqlen_q"] == ends["max_seqlen_kv"]
            line = (x.unsqueeze(1) for x in (q, k, v))  # one row of all documents
            ends_of = ends["cu_seqlens_q"], ends["max_seqlen_q"]
            return causal_attention(*line, self.settings["softmax_scale"], *ends_of, own).squeeze(1)

    fake = types.ModuleType("transformer_engine.pytorch")
    fake.DotProductAttention = Module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", fake)
    monkeypatch.delitem(sys.modules, "megatron_synth_kernels.vendor.te_attention", raising=False)
    attention = OPERATIONS["attention"].backend("te").load()
    query, key, value = torch.randn(6, 2, 4, 8), torch.randn(6, 2, 2, 8), torch.randn(6, 2, 2, 8)
    ends = (torch.tensor([0, 2, 6, 12], dtype=torch.int32), 6) if documents else (None, None)
    found = attention(query, key, value, 0.3, *ends, window)
    torch.testing.assert_close(found, causal_attention(query, key, value, 0.3, *ends, window))
    sys.modules.pop("megatron_synth_kernels.vendor.te_attention")


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
