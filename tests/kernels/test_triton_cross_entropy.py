"""The two passes of cross-entropy in Triton against fp64, whole vocabularies and parts of one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_support import DEVICE, DTYPES, close, needs_triton, poisoned

pytestmark = needs_triton
Z_LOSS = 1e-2


@pytest.fixture(autouse=True)
def _setting() -> Iterator[None]:
    torch.manual_seed(0)
    with poisoned():
        yield


def log_sum_exp(stats: Tensor) -> Tensor:
    return stats[0] + stats[1].log()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("vocabulary", [1, 7, 4096, 9001])
def test_both_passes(vocabulary: int, strided: bool, dtype: torch.dtype) -> None:
    from megatron_synth_kernels.triton.cross_entropy import cross_entropy_grad_, cross_entropy_stats

    tokens, start = 5, 1000
    wide = torch.randn(tokens, vocabulary + 3 * strided, device=DEVICE).mul_(6).to(dtype)
    logits = wide[:, :vocabulary]
    exact = logits.double().requires_grad_()
    labels = torch.randint(start, start + vocabulary, (tokens,), device=DEVICE)
    labels[0], labels[1] = start - 1, start + vocabulary  # of other ranks
    here = (labels >= start) & (labels < start + vocabulary)

    stats = cross_entropy_stats(logits, labels, start)
    own = torch.where(here, exact.gather(1, (labels - start).clamp(0, vocabulary - 1)[:, None]).squeeze(1), 0.0)
    assert stats.dtype == torch.float32 and torch.equal(stats[0].double(), exact.amax(1))
    assert torch.equal(stats[2].double(), own)
    close(log_sum_exp(stats), exact.logsumexp(1).detach(), torch.float32)

    scale = torch.randn(tokens, device=DEVICE)
    scale[2] = 0.0
    loss = exact.logsumexp(1)
    ((loss - own + Z_LOSS * loss.square()) * scale).sum().backward()
    beyond = wide[:, vocabulary:].clone()
    found = cross_entropy_grad_(logits, labels, start, log_sum_exp(stats), scale, Z_LOSS)
    assert found.data_ptr() == wide.data_ptr() and torch.equal(wide[:, vocabulary:], beyond)
    close(found, exact.grad, dtype)
    assert found[2].eq(0).all()


def test_parts_of_a_vocabulary_make_the_whole() -> None:
    from megatron_synth_kernels.triton.cross_entropy import cross_entropy_stats

    logits = torch.randn(4, 5000, device=DEVICE) * 9
    labels = torch.randint(0, 5000, (4,), device=DEVICE)
    whole = cross_entropy_stats(logits, labels, 0)
    parts = [cross_entropy_stats(logits[:, at : at + 1250], labels, at) for at in range(0, 5000, 1250)]
    highest = torch.stack([part[0] for part in parts]).amax(0)
    total = torch.stack([part[1] * (part[0] - highest).exp() for part in parts]).sum(0)
    assert torch.equal(highest, whole[0])
    torch.testing.assert_close(total, whole[1])
    assert torch.equal(torch.stack([part[2] for part in parts]).sum(0), whole[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("valid", [0, 1, 4096, 4097, 5000])
def test_padding_has_no_probability_and_no_gradient(valid: int, dtype: torch.dtype) -> None:
    from megatron_synth_kernels.triton.cross_entropy import cross_entropy_grad_, cross_entropy_stats

    logits = torch.randn(3, 5000, device=DEVICE).mul_(6).to(dtype)
    logits[:, valid:] = torch.tensor([math.nan, math.inf, 1e30], device=DEVICE)[:, None].to(dtype)
    exact = logits[:, :valid].double()
    labels = torch.full((3,), max(valid - 1, 0), dtype=torch.int64, device=DEVICE)
    stats = cross_entropy_stats(logits, labels, 0, valid)
    close(log_sum_exp(stats), exact.logsumexp(1), torch.float32)
    own = exact[:, -1] if valid else torch.zeros(3, dtype=torch.float64, device=DEVICE)
    assert torch.equal(stats[2].double(), own)
    scale = torch.rand(3, device=DEVICE)
    log_total = exact.logsumexp(1) if valid else torch.ones(3, dtype=torch.float64, device=DEVICE)
    grad = cross_entropy_grad_(logits, labels, 0, log_total.float(), scale, Z_LOSS, valid)
    assert grad[:, valid:].eq(0).all()
    if valid:
        softmax = (exact - log_total[:, None]).exp() * (1 + 2 * Z_LOSS * log_total[:, None])
        softmax[:, -1] -= 1.0
        close(grad[:, :valid], softmax * scale[:, None], dtype)


def test_extremes() -> None:
    from megatron_synth_kernels.triton.cross_entropy import cross_entropy_grad_, cross_entropy_stats

    inf = math.inf
    rows = [[7.0] * 6, [3e38, -3e38, 0, 0, 0, 0], [1.0, -inf, -inf, -inf, -inf, -inf], [-inf] * 6, [-1e30] * 6]
    logits = torch.tensor(rows, device=DEVICE)
    labels = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    stats = cross_entropy_stats(logits, labels, 0)
    torch.testing.assert_close(stats[0].cpu(), torch.tensor([7.0, 3e38, 1.0, -inf, -1e30]), rtol=0, atol=0)
    torch.testing.assert_close(stats[1].cpu(), torch.tensor([6.0, 1.0, 1.0, 0.0, 6.0]))
    scale = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0], device=DEVICE)
    grad = cross_entropy_grad_(logits, labels, 0, log_sum_exp(stats), scale, 0.0).cpu()
    assert grad.isfinite().all()
    torch.testing.assert_close(grad[0], torch.tensor([1 / 6 - 1, *[1 / 6] * 5]), rtol=1e-5, atol=1e-6)
    assert grad[1:4].eq(0).all()


def test_a_vocabulary_of_128k_in_bf16() -> None:
    """Many equal logits: a sum in bf16 would stop at 256."""
    from megatron_synth_kernels.triton.cross_entropy import cross_entropy_stats

    logits = torch.full((1, 131_072), 2.0, dtype=torch.bfloat16, device=DEVICE)
    stats = cross_entropy_stats(logits, torch.tensor([131_071], device=DEVICE), 0)
    assert stats.squeeze(1).tolist() == [2.0, 131_072.0, 2.0]
    assert cross_entropy_stats(logits[:0], torch.zeros(0, dtype=torch.int64, device=DEVICE), 0).shape == (3, 0)
