"""Rotary position embedding in Triton against fp64, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_synth_kernels.torch import rope as reference
from tests.kernels.triton_support import DEVICE, DTYPES, check_backward, close, needs_triton, pair, poisoned

pytestmark = needs_triton
# S, B, query heads, key heads, channels
SHAPES = [(1, 1, 1, 1, 2), (7, 2, 6, 2, 10), (5, 1, 3, 3, 96), (3, 2, 40, 1, 64)]
BASE = 10_000.0


@pytest.fixture(autouse=True)
def _setting() -> Iterator[None]:
    torch.manual_seed(0)
    with poisoned():
        yield


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Complex numbers x_i + j x_(i + D/2), multiplied by exp(j p base^(-2i/D)); [S, B, A, D], positions [B, S]."""
    half = x.shape[-1] // 2
    angles = positions.t()[:, :, None, None] * BASE ** (-torch.arange(half, device=DEVICE).double() / half)
    product = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((product.real, product.imag), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("by_document", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rope(shape: tuple[int, ...], by_document: bool, strided: bool, dtype: torch.dtype) -> None:
    from megatron_synth_kernels.triton.rope import rope

    sequence, batch, query_heads, key_heads, channels = shape
    query, query_64 = pair(sequence, batch, query_heads, channels, dtype=dtype, strided=strided)
    key, key_64 = pair(sequence, batch, key_heads, channels, dtype=dtype, strided=strided)
    positions = torch.arange(sequence, device=DEVICE).expand(batch, sequence)
    given = None
    if by_document:  # strides that are not those of a contiguous tensor
        given = torch.randint(0, sequence, (sequence, batch), dtype=torch.int32, device=DEVICE).t()
        positions = given
    found = rope(query, key, BASE, given)
    expected = turned(query_64, positions), turned(key_64, positions)
    for a, b in zip(found, expected, strict=True):
        close(a, b, dtype)
    check_backward(found, expected, (query, query_64), (key, key_64), expanded=strided)


def test_in_place_is_the_same_and_takes_no_memory() -> None:
    """On views of one tensor, as megatron-core's attention splits them, which autograd would not let be overwritten."""
    from megatron_synth_kernels.triton.rope import rope

    results = []
    for inplace in (False, True):
        torch.manual_seed(1)
        mixed = torch.randn(5, 2, 3, 48, device=DEVICE, requires_grad=True)
        query, key, value = (mixed * 1.0).split(16, dim=-1)
        rotated = rope(query, key, BASE, None, inplace)
        assert (rotated[0].data_ptr() == query.data_ptr()) is inplace
        (rotated[0] * rotated[1] * value).sum().backward()
        results.append((*(x.detach() for x in rotated), mixed.grad))
    for outside, inside in zip(*results, strict=True):
        assert outside is not None and inside is not None and torch.equal(outside, inside)


@pytest.mark.parametrize("per_group", [1, 3])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_with_those_of_values_lie_in_one_tensor(per_group: int, inplace: bool) -> None:
    from megatron_synth_kernels.triton.rope import joined_rope, rope

    sequence, batch, groups, channels = 5, 2, 2, 16
    whole = torch.randn(sequence, batch, groups, per_group + 2, channels, device=DEVICE)
    results = []
    for joined in (True, False):
        parts = [x.requires_grad_() for x in whole.clone().split((per_group, 1, 1), dim=3)]
        query, (key, value) = parts[0], (x.squeeze(3) for x in parts[1:])
        if joined:
            found = joined_rope(query, key, value, BASE, None, inplace)
        else:
            found = *rope(query.flatten(2, 3), key, BASE, None, False), value
        grads = torch.autograd.grad((found[0].sin().sum(), (found[1] * found[2]).sum()), (query, key, value))
        results.append((*(x.detach().clone() for x in found), *grads))
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape and torch.equal(ours, theirs)
    ours = results[0][3:]
    assert len({x.untyped_storage().data_ptr() for x in ours}) == 1
    step = channels * ours[0].element_size()
    assert [x.data_ptr() - ours[0].data_ptr() for x in ours] == [0, per_group * step, (per_group + 1) * step]


def test_what_shares_its_places_is_not_overwritten() -> None:
    from megatron_synth_kernels.triton.rope import rope

    one = torch.randn(1, 1, 1, 8, device=DEVICE)
    query, key = one.expand(6, 1, 2, 8), one.expand(6, 1, 1, 8)
    kept = one.clone()
    found = rope(query, key, BASE, None, True)
    assert torch.equal(one, kept)
    for a, b in zip(found, reference.rope(query, key, BASE), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("by_document", [False, True])
def test_gradcheck_of_the_reference(by_document: bool) -> None:
    query = torch.randn(4, 2, 2, 6, dtype=torch.float64, requires_grad=True)
    key = torch.randn(4, 2, 1, 6, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]]) if by_document else None
    assert torch.autograd.gradcheck(lambda q, k: reference.rope(q, k, BASE, positions), (query, key))
