"""The iteration of Muon by itself."""

from __future__ import annotations

import pytest
import torch

from megatron_synth.parallel import engine


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    engine.load()
    from megatron_synth.parallel.muon import orthogonalized

    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    made = orthogonalized(matrix, 5)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    along = left.T @ made @ right.T
    reached = along.diagonal()
    assert (along - torch.diag(reached)).abs().max() < 1e-4  # rounding, which the iteration multiplies by 3.4445^5 at most
    large = values / values.norm() > 0.05
    assert bool(large.any()) and reached[large].min() > 0.6 and reached.max() < 1.3
    assert torch.equal(orthogonalized(matrix * 4, 5), made)  # the size of a gradient does not matter


def test_nothing_becomes_of_a_matrix_without_gradient() -> None:
    engine.load()
    from megatron_synth.parallel.muon import orthogonalized

    assert not orthogonalized(torch.zeros(4, 8), 5).any()
