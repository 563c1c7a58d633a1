"""Output layer and cross-entropy in one: against fp64, its contract with main_grad, and what it holds in memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_synth_kernels import registry
from megatron_synth_kernels.torch import linear_cross_entropy as module
from megatron_synth_kernels.torch.cross_entropy import cross_entropy_grad_, cross_entropy_stats
from megatron_synth_kernels.torch.linear_cross_entropy import linear_cross_entropy
from tests.kernels.test_operations import DTYPES, close

Z = 1e-2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ---- the two passes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (3, 7), (5, 1000), (2, 300_001)])
def test_two_passes_over_parts_of_the_vocabulary(tokens: int, vocabulary: int, dtype: torch.dtype) -> None:
    """Parts of unequal size, in memory with gaps; put together they are the whole."""
    whole = torch.randn(tokens, vocabulary).mul_(4).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,))
    exact = whole.double()
    expected = exact.logsumexp(1)
    scale = torch.rand(tokens)
    for cut in {0, vocabulary // 3, vocabulary - 1, vocabulary}:
        parts = []
        for start, stop in ((0, cut), (cut, vocabulary)):
            if start < stop:
                room = torch.full((tokens, stop - start + 3), torch.nan, dtype=dtype)
                room[:, : stop - start] = whole[:, start:stop]
                parts.append((start, room[:, : stop - start]))
        stats = [cross_entropy_stats(part, labels, start) for start, part in parts]
        assert all(found.dtype == torch.float32 and found.shape == (3, tokens) for found in stats)
        logs = torch.stack([maximum + total.log() for maximum, total, _ in stats])
        close(logs.logsumexp(0), expected, torch.float32)
        assert torch.equal(sum(own for _, _, own in stats), whole.gather(1, labels[:, None])[:, 0].float())
        grads = [cross_entropy_grad_(part, labels, start, expected.float(), scale, Z) for start, part in parts]
        assert all(grad.data_ptr() == part.data_ptr() for grad, (_, part) in zip(grads, parts, strict=True))
        softmax = exact.softmax(1) * (1 + 2 * Z * expected[:, None])
        onehot = torch.zeros_like(exact).scatter_(1, labels[:, None], 1.0)
        close(torch.cat(grads, dim=1), (softmax - onehot) * scale[:, None], dtype)


def test_extreme_logits() -> None:
    rows = torch.tensor([[7.0, 7.0, 7.0], [3e38, -3e38, 0.0], [-math.inf, 1.0, -math.inf], [-math.inf] * 3])
    labels = torch.tensor([2, 0, 1, 5])  # the last one in another part
    maximum, total, own = cross_entropy_stats(rows, labels, 0)
    assert maximum.tolist() == [7.0, pytest.approx(3e38), 1.0, -math.inf]
    assert total.tolist() == [3.0, 1.0, 1.0, 0.0] and own.tolist() == [7.0, pytest.approx(3e38), 1.0, 0.0]
    # a masked token has no gradient even where its logits are no numbers
    rows[1, 1] = math.nan
    log_sum_exp = torch.tensor([7 + math.log(3), math.nan, 1.0, 2.0])
    grad = cross_entropy_grad_(rows, labels, 0, log_sum_exp, torch.tensor([1.0, 0.0, 1.0, 1.0]), 0.0)
    torch.testing.assert_close(grad[0], torch.tensor([1 / 3, 1 / 3, -2 / 3]))
    assert grad[1:].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("valid", [0, 1, 4, 9])
def test_padding_has_no_probability_and_no_gradient(valid: int, dtype: torch.dtype) -> None:
    whole = torch.randn(3, 9).mul_(4).to(dtype)
    whole[:, valid:] = torch.tensor([math.nan, math.inf, 1e30])[:, None].to(dtype)
    labels = torch.randint(0, max(valid, 1), (3,))
    exact = whole[:, :valid].double()
    stats = cross_entropy_stats(whole, labels, 0, valid)
    close(stats[0] + stats[1].log(), exact.logsumexp(1), torch.float32)
    assert torch.equal(stats[2], whole.gather(1, labels[:, None])[:, 0].float() if valid else torch.zeros(3))
    log_sum_exp, scale = exact.logsumexp(1).float(), torch.rand(3)
    grad = cross_entropy_grad_(whole, labels, 0, log_sum_exp, scale, Z, valid)
    assert grad.data_ptr() == whole.data_ptr() and grad[:, valid:].eq(0).all()
    if valid:
        onehot = torch.zeros_like(exact).scatter_(1, labels[:, None], 1.0)
        softmax = exact.softmax(1) * (1 + 2 * Z * exact.logsumexp(1)[:, None])
        close(grad[:, :valid], (softmax - onehot) * scale[:, None], dtype)


# ---- the whole


def problem(tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, 16).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 16).to(dtype).requires_grad_()
    weights = torch.rand(tokens).where(torch.rand(tokens) < 0.8, 0.0)
    return hidden, weight, torch.randint(0, vocabulary, (tokens,)), weights


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, z_loss: float) -> tuple[Tensor, ...]:
    """total, losses, log_sum_exp, gradients of hidden and weight in fp64, from logits in the input's type."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight.t()
    log_sum_exp = logits.logsumexp(1)
    losses = log_sum_exp - logits.gather(1, labels[:, None])[:, 0]
    total = ((losses + z_loss * log_sum_exp.square()) * weights).sum()
    return total, losses, log_sum_exp, *torch.autograd.grad(total, (hidden, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("z_loss", [0.0, Z])
@pytest.mark.parametrize(("tokens", "vocabulary", "chunk"), [(1, 1, 4), (7, 5, 3), (9, 130, 9), (9, 130, 100), (6, 50, 1)])
def test_against_fp64(tokens: int, vocabulary: int, chunk: int, z_loss: float, dtype: torch.dtype) -> None:
    hidden, weight, labels, weights = problem(tokens, vocabulary, dtype)
    expected = reference(hidden, weight, labels, weights, z_loss)
    found = linear_cross_entropy(hidden, weight, labels, weights, z_loss=z_loss, chunk_tokens=chunk)
    assert [x.dtype for x in found] == [torch.float32] * 3 and [x.requires_grad for x in found] == [True, False, False]
    found[0].backward()
    assert hidden.grad is not None and weight.grad is not None
    for ours, theirs in zip((*found, hidden.grad, weight.grad), expected, strict=True):
        close(ours.detach(), theirs.detach(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [0, 1, 30])
def test_a_padded_vocabulary_is_the_vocabulary(padding: int, dtype: torch.dtype) -> None:
    hidden, weight, labels, weights = problem(9, 50, dtype)
    expected = reference(hidden, weight, labels, weights, Z)
    padded = torch.cat([weight.detach(), 50 * torch.randn(padding, 16).to(dtype)]).requires_grad_()
    found = linear_cross_entropy(hidden, padded, labels, weights, z_loss=Z, chunk_tokens=4, part=module.Part(vocab_size=50))
    found[0].backward()
    assert hidden.grad is not None and padded.grad is not None
    assert padded.grad[50:].eq(0).all()
    for ours, theirs in zip((*found, hidden.grad, padded.grad[:50]), expected, strict=True):
        close(ours.detach(), theirs.detach(), dtype)


def test_how_much_of_a_part_is_padding() -> None:
    parts = [module.Part(start, None, 129) for start in (0, 128, 256)]
    assert [part.valid(128) for part in parts] == [128, 1, 0]
    assert module.Part(128).valid(128) == 128


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_gradcheck(z_loss: float) -> None:
    hidden, weight = (torch.randn(size, 5, dtype=torch.float64, requires_grad=True) for size in (7, 11))
    labels, weights = torch.randint(0, 11, (7,)), torch.tensor([0.3, 0.0, 1.0, 2.0, 0.1, 0.0, 1.5]).double()

    def total(h: Tensor, w: Tensor) -> Tensor:  # the gradient from above is 1, and 0.5 was announced
        return linear_cross_entropy(h, w, labels, weights, grad_scale=0.5, z_loss=z_loss, chunk_tokens=3)[0]

    assert torch.autograd.gradcheck(total, (hidden, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_gradient_goes_straight_to_main_grad(dtype: torch.dtype) -> None:
    """As megatron-core's hook on the weight expects it; over two micro-batches, on top of what is there."""
    hidden, weight, labels, weights = problem(10, 33, dtype)
    before = torch.randn(33, 16)
    weight.main_grad, weight.grad_added_to_main_grad = before.clone(), False  # type: ignore[attr-defined]
    for _ in range(2):
        total, _, _ = linear_cross_entropy(hidden, weight, labels, weights, grad_scale=1 / 3, chunk_tokens=4)
        total /= 3  # as the schedule does for three micro-batches
        total.backward()
    _, _, _, grad_hidden, grad_weight = reference(hidden, weight, labels, weights, 0.0)
    assert weight.grad_added_to_main_grad and weight.main_grad.dtype == torch.float32  # type: ignore[attr-defined]
    close(weight.main_grad, before.double() + 2 / 3 * grad_weight, dtype)  # type: ignore[attr-defined]
    assert hidden.grad is not None and weight.grad is not None and weight.grad.shape == weight.shape
    close(hidden.grad, 2 / 3 * grad_hidden, dtype)
    # where the weight has another use its gradient is added by the hook: ours must be 0
    weight.grad, weight.zero_out_wgrad = None, True  # type: ignore[attr-defined]
    linear_cross_entropy(hidden, weight, labels, weights)[0].backward()
    assert weight.grad.eq(0).all()


def test_another_scale_than_announced_is_an_error() -> None:
    hidden, weight, labels, weights = problem(4, 9, torch.float32)
    weight.main_grad = torch.zeros(9, 16)  # type: ignore[attr-defined]
    total, _, _ = linear_cross_entropy(hidden, weight, labels, weights, grad_scale=0.5)
    with pytest.raises(RuntimeError, match="scaled otherwise than announced"):
        total.backward()


def test_an_evaluation_makes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels, weights = problem(10, 33, torch.float32)
    weight.main_grad = torch.zeros(33, 16)  # type: ignore[attr-defined]
    expected = linear_cross_entropy(hidden, weight, labels, weights, chunk_tokens=4)
    weight.main_grad.zero_()  # type: ignore[attr-defined]
    monkeypatch.setitem(registry._active, "cross_entropy_grad", None)  # calling it fails
    for token_weights, mode in ((None, torch.enable_grad), (weights, torch.no_grad)):
        with mode():
            total, losses, log_sum_exp = linear_cross_entropy(hidden, weight, labels, token_weights, chunk_tokens=4)
        assert torch.equal(losses, expected[1]) and torch.equal(log_sum_exp, expected[2])
        assert total.item() == (0.0 if token_weights is None else expected[0].item())
    assert not weight.main_grad.any()  # type: ignore[attr-defined]


# ---- memory


class Traced(TorchDispatchMode):
    """Bytes of the storages that operations make while it is active: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in self._known | before:
                storage = x.untyped_storage()
                self._known.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key, storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak(step: Callable[[], Tensor]) -> int:
    with Traced() as traced:
        step().backward()
    return traced.peak


def test_memory_is_under_an_eighth_of_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """8,192 tokens x 131,072 entries at hidden size 2048, each divided by 8, and the bytes of a chunk by 64."""
    tokens, vocabulary, width = 1024, 16_384, 256
    monkeypatch.setattr(module, "LOGITS_BYTES", module.LOGITS_BYTES // 64)
    hidden, weight = (torch.randn(size, width).bfloat16().requires_grad_() for size in (tokens, vocabulary))
    labels, weights = torch.randint(0, vocabulary, (tokens,)), torch.full((tokens,), 1 / tokens)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(vocabulary, width), False  # type: ignore[attr-defined]

    def unfused() -> Tensor:
        return torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), labels)

    whole, fused = peak(unfused), peak(lambda: linear_cross_entropy(hidden, weight, labels, weights)[0])
    assert whole > 2 * tokens * vocabulary * 4  # the trace sees what is known to be there
    assert fused < whole / 8, f"{fused / 2**20:.1f} MiB of {whole / 2**20:.1f} MiB"
