"""Bytes that quantizing moves, against counts by hand."""

from __future__ import annotations

from docs.fp8_passes import PLACES, bytes_per_step
from megatron_synth.config.schema import ModelConfig

MODEL = ModelConfig(
    name="m", num_layers=3, hidden_size=256, ffn_hidden_size=640, num_attention_heads=4, num_query_groups=2, vocab_size=512
)
WEIGHTS = 256 * (256 + 2 * 128 + 256) + 3 * 256 * 640


def test_a_layer_whose_tensors_are_quantized_apart() -> None:
    inputs = 2 * 256 + 256 + 640
    gradients = (256 + 2 * 128) + 256 + 2 * 640 + 256
    # made in bf16: two norms, SwiGLU, its gradient
    made = 2 * (2 + 2) * 256 + (4 + 2) * 640 + (6 + 4) * 640
    weights = 16 * WEIGHTS * 5
    assert bytes_per_step(MODEL, "delayed", 100, 5).apart == 100 * (made + 4 * (inputs + gradients)) + 4 * WEIGHTS + weights
    assert bytes_per_step(MODEL, "blockwise", 100, 5) == bytes_per_step(MODEL, "delayed", 100, 5)
    # every tensor is read once more
    assert bytes_per_step(MODEL, "current", 100, 5).apart == 100 * (made + 6 * (inputs + gradients)) + 6 * WEIGHTS + weights


def test_fusing_saves_what_is_not_written_and_read() -> None:
    known, current = (bytes_per_step(MODEL, recipe, 10, 1) for recipe in ("delayed", "current"))
    # the outputs of SwiGLU and of its gradient are written and read; a norm's is only written, since its rows are read twice
    assert known.apart - known.fused == 10 * (2 * 2 * 256 + 4 * 640 + 4 * 2 * 640)
    # ... and read once more by `current`, which makes SwiGLU's twice
    assert current.apart - current.fused == 10 * (4 * 2 * 256 + (6 - 4) * 640 + (12 - 6) * 640)


def test_nothing_is_below_its_floor() -> None:
    for place in PLACES:
        for ways in (place.known, place.current):
            assert ways.floor <= ways.fused <= ways.apart, place.name
