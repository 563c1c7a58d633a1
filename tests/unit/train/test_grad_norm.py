"""The gradient norm against numpy's fp64, in one piece and in parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_synth.train.grad_norm import rough_square_sum, square_sum


def _norm(*parts: torch.Tensor) -> float:
    return math.sqrt(square_sum(list(parts)).item())


@pytest.mark.parametrize("size", [1, 65_535, 65_537, 4_000_000])
def test_equals_fp64_however_it_is_cut(size: int) -> None:
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(size))
    right = float(np.linalg.norm(numbers.numpy().astype(np.float64)))
    for parts in ([numbers], list(numbers.chunk(2)), list(numbers.chunk(7)), [numbers.view(1, -1).t()]):
        assert _norm(*parts) == pytest.approx(right, rel=1e-12)


def test_a_matrix_that_is_not_contiguous() -> None:
    numbers = torch.randn(512, 700, generator=torch.Generator().manual_seed(3))
    assert _norm(numbers.t(), numbers[:, :9]) == pytest.approx(
        math.sqrt(float(numbers.double().square().sum() + numbers[:, :9].double().square().sum())), rel=1e-12
    )


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_shows(value: float) -> None:
    numbers = torch.ones(100_000)
    numbers[70_000] = value
    assert not math.isfinite(square_sum([torch.ones(3), numbers]).item())


def test_large_gradients_do_not_overflow() -> None:
    assert _norm(torch.full((4,), 1e30)) == pytest.approx(2e30, rel=1e-6)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65_537, 4_000_000])
def test_the_rough_sum_is_the_sum_to_a_millionth(size: int) -> None:
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 3
    assert rough_square_sum(numbers).item() == pytest.approx(float(numbers.double().square().sum()), rel=1e-6)
    assert not size or rough_square_sum(numbers.view(-1, 1)).dtype == torch.float64
