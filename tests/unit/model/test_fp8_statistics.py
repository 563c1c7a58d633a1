"""What is watched of layers that quantize inside: hooks round a stand-in for a layer of TransformerEngine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="module")
def te() -> Any:
    from megatron_synth.parallel import engine

    engine.load()
    from megatron_synth.model.fp8 import te as te_module

    return te_module


def make_layer(scales: tuple[float, float, float] | None = None) -> Any:
    """A transformer layer of linear layers 128 -> 256, with quantizers as TransformerEngine keeps them."""
    import torch

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(256, 128))

            def quantizer(place: int) -> Any:
                scale = None if scales is None else torch.tensor([scales[place]])
                return SimpleNamespace(scale=scale, with_amax_reduction=False, amax_reduction_group=None)

            self.quantizers = {"scaling_fwd": [quantizer(0), quantizer(1)], "scaling_bwd": [quantizer(2)]}

        def forward(self, x: Any) -> Any:
            return x @ self.weight.t(), None

    torch.manual_seed(0)
    parts = {name: Linear() for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")}
    layer = torch.nn.Module()
    layer.self_attention, layer.mlp = torch.nn.Module(), torch.nn.Module()
    for name, part in parts.items():
        setattr(layer.mlp if "fc" in name else layer.self_attention, name, part)
    return layer


@pytest.fixture
def watched(te: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    import torch

    from megatron_synth.model.fp8.statistics import Statistics

    monkeypatch.setattr(te, "_recomputing", lambda: False)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)

    def gather(ranks: list[Any], mine: Any) -> None:
        ranks[0] = mine

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)

    def watch(layer: Any, **precision: Any) -> Any:
        from tests.unit.model.test_fp8_settings import build

        statistics = Statistics()
        te.watch([(3, layer)], te.Recipe.of(build(**precision).precision), statistics)
        return statistics

    return watch


def run(linear: Any, x: Any, grad: Any) -> None:
    y, _ = linear(x)
    y.backward(grad)


def test_current_scaling_is_counted_by_definition(watched: Any) -> None:
    import torch

    layer = make_layer()
    statistics = watched(layer, fp8="current")
    linear = layer.mlp.linear_fc2
    # e4m3: 448 at the top; 2^-9 is its smallest number, and half of it is the last that rounds to 0
    x = torch.zeros(2, 4, 128)
    x[0, 0, :5] = torch.tensor([448.0, -1.0, 2.0**-9, 2.0**-10, -(2.0**-12)])
    grad = torch.full((2, 4, 256), 1e-3)
    run(linear, x, grad)
    assert statistics.observed() == {}  # not asked for
    statistics.observing = True
    run(linear, x, grad)
    run(linear, x * 2, grad)  # another micro-batch
    found = statistics.observed()
    name = "fp8/layers.3.mlp.linear_fc2/"
    assert {key.removeprefix(name).split("/")[0] for key in found} == {"input", "weight", "grad"}
    assert found[name + "input/amax"] == 896 and found[name + "input/scale"] == 0.5
    assert found[name + "input/underflow"] == 0.4 and found[name + "input/overflow"] == 0
    assert found[name + "weight/amax"] == pytest.approx(linear.weight.abs().max().item())
    assert found[name + "weight/scale"] == pytest.approx(448 / linear.weight.abs().max().item())
    assert found[name + "grad/scale"] == pytest.approx(57344 / 1e-3)
    assert statistics.observed() == {} and not statistics.observing


def test_delayed_scaling_reads_the_scale_in_use(watched: Any) -> None:
    import torch

    layer = make_layer(scales=(64.0, 8.0, 2.0**20))
    statistics = watched(layer, fp8="delayed")
    statistics.observing = True
    x = torch.ones(1, 4, 128)
    x[0, 0, 0] = 8.0  # 512 after scaling: cut to 448
    run(layer.self_attention.linear_qkv, x, torch.full((1, 4, 256), 2.0**-40))
    found = statistics.observed()
    name = "fp8/layers.3.self_attention.linear_qkv/"
    assert [found[f"{name}{role}/scale"] for role in ("input", "weight", "grad")] == [64.0, 8.0, 2.0**20]
    assert found[name + "input/overflow"] == 1 / 512 and found[name + "grad/underflow"] == 1.0
    numbers = 512 + 128 * 256 + 4 * 256  # of input, weight and gradient
    assert statistics.saturated == {"layers.3.self_attention.linear_qkv": pytest.approx(1 / numbers)}


def test_blocks_and_parts_of_sequences(watched: Any) -> None:
    import torch

    layer = make_layer()
    statistics = watched(layer, fp8="blockwise")
    statistics.observing = True
    x = torch.full((3, 5, 128), 0.5)  # 15 rows: a part need not be of whole blocks
    x[1, 2] = 7.0
    run(layer.mlp.linear_fc1, x, torch.ones(3, 5, 256))
    found = statistics.observed()
    name = "fp8/layers.3.mlp.linear_fc1/"
    # powers of two, of the block with the largest numbers; rows of padding have the scale 1 and would be smaller
    assert found[name + "input/amax"] == 7.0 and found[name + "input/scale"] == 64.0
    assert found[name + "input/underflow"] == found[name + "input/overflow"] == 0.0
    scale = 448 / layer.mlp.linear_fc1.weight.abs().max().item()
    assert scale / 2 < found[name + "weight/scale"] <= scale


def test_what_is_computed_a_second_time_is_counted_once(te: Any, watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    layer = make_layer()
    linear, x, grad = layer.mlp.linear_fc1, torch.ones(1, 4, 128), torch.ones(1, 4, 256)
    statistics = watched(layer, fp8="current")
    statistics.observing = True
    seen: list[str] = []
    add = statistics.add
    monkeypatch.setattr(statistics, "add", lambda name, role, *rest: (seen.append(role), add(name, role, *rest)))
    with torch.no_grad():
        linear(x)
    monkeypatch.setattr(te, "_recomputing", lambda: True)
    run(linear, x, grad)
    assert seen == ["input", "weight", "grad"]


def test_of_weights_in_fp8_only_what_is_known_is_told(te: Any, watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(te.fp8_params, "is_quantized", lambda x: isinstance(x, SimpleNamespace))
    scales = torch.tensor([[0.25, 99.0, 99.0, 99.0], [0.5, 99.0, 99.0, 99.0]])  # rows are padded to multiples of 4
    for fp8, inverse in (("current", {"_scale_inv": torch.tensor([0.5])}), ("blockwise", {"_rowwise_scale_inv": scales})):
        layer = make_layer()
        linear = layer.mlp.linear_fc1
        weight = linear.weight
        del linear.weight
        statistics = watched(layer, fp8=fp8)
        statistics.observing = True
        linear.weight = SimpleNamespace(shape=weight.shape, dequantize=lambda weight=weight: weight, t=weight.t, **inverse)
        monkeypatch.setattr(type(linear), "forward", lambda self, x: (x @ self.weight.t(), None))
        run(linear, torch.ones(1, 128, 128), torch.ones(1, 128, 256))
        found = {key.split("/", 3)[-1]: value for key, value in statistics.observed().items() if "/weight/" in key}
        assert found == {"amax": weight.abs().max().item(), "scale": 2.0}
