"""Token editing and contrastive decoding on a GPU give what they give on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_synth.synthesis.decoding.contrastive import continue_texts
from megatron_synth.synthesis.decoding.model import load
from megatron_synth.synthesis.decoding.token_editing import edit, token_probabilities
from tests.support import save_tiny_causal_model

pytestmark = pytest.mark.gpu
TEXTS = [("a", "The tide rises twice a day, and the ferry waits for it."), ("b", "Bread is baked at night."), ("c", "T")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    texts = [text for _, text in TEXTS]
    return [save_tiny_causal_model(tmp_path_factory.mktemp(name), texts, seed) for seed, name in enumerate(("good", "bad"))]


def test_probabilities_are_those_of_the_cpu(folders: list[Path]) -> None:
    on_cpu, on_gpu = load(folders[0]), load(folders[0], "cuda")
    rows = [on_cpu.encode(text) for _, text in TEXTS]
    for (here, _), (there, _) in zip(token_probabilities(on_cpu, rows), token_probabilities(on_gpu, rows), strict=True):
        torch.testing.assert_close(there.cpu().exp(), here.exp(), rtol=0, atol=1e-5)  # fp32 without TF32, sums of another order


def test_texts_are_those_of_the_cpu(folders: list[Path]) -> None:
    """Draws are the same numbers, and a token changes only where one lies within rounding of a boundary."""
    results = []
    for device in ("cpu", "cuda"):
        good, bad = (load(folder, device) for folder in folders)
        results.append((edit(good, TEXTS, p=0.004, seed=3), continue_texts(good, bad, TEXTS, max_tokens=16, seed=3)))
    assert results[0] == results[1]
