"""Maximal-update parametrization: what a width is given, in every layout, and through an export."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from tests.dist.conftest import Run
from tests.dist.pool import RankPool
from tests.dist.layouts.test_huggingface import convert, load_llama
from tests.support import VOCAB_SIZE, assert_same_losses

BASE = 16
MUP = f"model.mup_base_hidden_size={BASE}"  # of a model of width 64
M = 64 / BASE


def test_layouts_and_export(ranks: RankPool, trained: Callable[..., Run], tmp_path: Path) -> None:
    reference, run = trained("single", MUP), trained("tp2pp2", MUP)
    assert_same_losses(run.records, reference.records, 1e-5)
    assert reference.records[-1]["train/loss"] < reference.records[0]["train/loss"] - 0.1
    convert(ranks, "to-hf", str(run.path), str(tmp_path / "hf"))
    tokens = torch.randint(0, VOCAB_SIZE, (3, 32), generator=torch.Generator().manual_seed(5))
    (ours,) = ranks.run(1, "tests.dist.layouts.hf_jobs.logits", str(run.path), tokens.numpy())
    with torch.no_grad():
        theirs = load_llama(tmp_path / "hf")(tokens).logits
    assert theirs.std() > 0.03
    torch.testing.assert_close(torch.from_numpy(ours.value), theirs, rtol=0, atol=2e-5)


def test_a_width_begins_and_moves_as_its_base_would(ranks: RankPool, config: Path) -> None:
    (plain,) = ranks.run(1, "tests.dist.layouts.mup_jobs.weights_and_groups", str(config), [])
    (scaled,) = ranks.run(1, "tests.dist.layouts.mup_jobs.weights_and_groups", str(config), [MUP])
    for name, value in scaled.value[0].items():
        factor = math.sqrt(M) if "layers" in name and value.ndim == 2 else 1.0
        torch.testing.assert_close(torch.from_numpy(value) * factor, torch.from_numpy(plain.value[0][name]), rtol=1e-6, atol=0)
    # embedding and output layer at the rate of the base, matrices at lr / m and the same lr x decay, vectors without decay
    assert sorted(scaled.value[1]) == sorted([(1.0, 1.0, 2), (1 / M, M, 4 * 4), (1.0, 0.0, 4 * 2 + 1)])
    assert plain.value[1] == [(1.0, 1.0, 2 + 4 * 4), (1.0, 0.0, 4 * 2 + 1)]
