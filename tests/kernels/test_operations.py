"""Each operation against its definition in fp64, forward and backward, over awkward shapes, strides and values."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from megatron_synth_kernels.torch.adam import FusedAdam
from megatron_synth_kernels.torch.attention.causal import _masked, causal_attention
from megatron_synth_kernels.torch.loss import cross_entropy
from megatron_synth_kernels.torch.norm import rms_norm, rms_norm_residual
from megatron_synth_kernels.torch.rope import rotary
from megatron_synth_kernels.torch.swiglu import swiglu
from megatron_synth_kernels.torch.wgrad import wgrad_gemm_accum_fp16, wgrad_gemm_accum_fp32

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = expected.abs().max().clamp(min=1).item()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def pair(*shape: int, dtype: torch.dtype, strided: bool = False, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same leaf twice: in `dtype`, on request as every second column of a wider tensor, and in fp64."""
    wide = torch.randn(*shape[:-1], shape[-1] * 2).mul_(factor).to(dtype)
    x = (wide[..., ::2] if strided else wide[..., ::2].contiguous()).detach().requires_grad_()
    return x, x.detach().double().requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 7), (5, 1, 128), (2, 3, 257)])
def test_rms_norm(shape: tuple[int, ...], strided: bool, dtype: torch.dtype) -> None:
    x, reference = pair(*shape, dtype=dtype, strided=strided, factor=3.0)
    weight, reference_weight = pair(shape[-1], dtype=dtype)
    eps = 1e-5
    expected = reference / (reference.square().mean(-1, keepdim=True) + eps).sqrt() * reference_weight
    found = rms_norm(x, weight, eps)
    assert found.dtype == dtype
    grad = torch.randn(shape)
    found.backward(grad.to(dtype))
    expected.backward(grad.to(dtype).double())
    close(found, expected, dtype)
    assert x.grad is not None and reference.grad is not None and weight.grad is not None
    assert reference_weight.grad is not None
    close(x.grad, reference.grad, dtype)
    close(weight.grad, reference_weight.grad, dtype)


def test_rms_norm_extremes() -> None:
    assert rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-5).eq(0).all()
    # 3e18 squared is just within fp32; equal values have the norm of their size
    assert rms_norm(torch.full((1, 4), 3e18), torch.ones(4), 1e-5).allclose(torch.ones(1, 4))
    # 300 squared times 4096 is beyond fp16 and far beyond bf16's 8 bits: the sum must be made in fp32
    wide = rms_norm(torch.full((1, 4096), 300.0, dtype=torch.bfloat16), torch.ones(4096, dtype=torch.bfloat16), 1e-5)
    assert wide.float().allclose(torch.ones(1, 4096))


def test_rms_norm_gradcheck() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    weight = torch.randn(5, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is computed in fp32, hence the coarse differences
        assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-3), (x, weight), eps=1e-2, atol=1e-2, rtol=1e-2)


def reference_rotary(x: Tensor, base: float) -> Tensor:
    """Complex numbers x_i + j x_(i + D/2), multiplied by exp(j s base^(-2i/D)); [S, B, A, D] in fp64."""
    length, half = x.shape[0], x.shape[-1] // 2
    angles = torch.outer(torch.arange(length).double(), base ** (-torch.arange(half).double() / half))
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (7, 2, 3, 6), (33, 1, 2, 64)])
def test_rotary(shape: tuple[int, ...], strided: bool, dtype: torch.dtype) -> None:
    x, reference = pair(*shape, dtype=dtype, strided=strided)
    found, expected = rotary(x, 10_000.0), reference_rotary(reference, 10_000.0)
    grad = torch.randn(shape).to(dtype)
    found.backward(grad)
    expected.backward(grad.double())
    close(found, expected, dtype)
    assert x.grad is not None and reference.grad is not None
    close(x.grad, reference.grad, dtype)
    assert found.dtype == dtype and found.permute(1, 2, 0, 3).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_at_given_positions(dtype: torch.dtype) -> None:
    """Each token turns as it would at that place of a row that counts from 0."""
    x, _ = pair(7, 2, 3, 6, dtype=dtype, strided=True)
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6]], dtype=torch.int32)
    found = rotary(x, 100.0, positions)
    grad = torch.randn(found.shape).to(dtype)
    found.backward(grad)
    gradient, x.grad = x.grad, None
    assert gradient is not None
    pieces = [x[0:3, :1], x[3:4, :1], x[4:7, :1], x[:, 1:]]
    whole = torch.cat((torch.cat([rotary(piece, 100.0) for piece in pieces[:3]]), rotary(pieces[3], 100.0)), dim=1)
    assert torch.equal(found, whole)
    whole.backward(grad)
    assert torch.equal(gradient, x.grad)


def test_rotary_scores_depend_on_distance_alone() -> None:
    query, key = torch.randn(1, 1, 1, 16).expand(20, 1, 1, 16), torch.randn(1, 1, 1, 16).expand(20, 1, 1, 16)
    scores = torch.einsum("sbad,tbad->st", rotary(query, 100.0), rotary(key, 100.0))
    for distance in range(-19, 20):
        diagonal = scores.diagonal(distance)
        assert diagonal.allclose(diagonal[0].expand_as(diagonal), atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("sequence", [1, 2, 37])
def test_causal_attention(sequence: int, heads: int, groups: int, dtype: torch.dtype) -> None:
    batch, channels = 2, 16
    scale = 1 / math.sqrt(channels)
    query, query_64 = pair(sequence, batch, heads, channels, dtype=dtype, strided=True)
    key, key_64 = pair(sequence, batch, groups, channels, dtype=dtype, strided=True)
    value, value_64 = pair(sequence, batch, groups, channels, dtype=dtype)
    keys, values = (x.repeat_interleave(heads // groups, dim=2) for x in (key_64, value_64))
    scores = torch.einsum("sbad,tbad->bast", query_64, keys) * scale
    scores = scores.masked_fill(torch.ones(sequence, sequence, dtype=torch.bool).triu(1), -math.inf)
    expected = torch.einsum("bast,tbad->sbad", scores.softmax(-1), values).flatten(2)
    found = causal_attention(query, key, value, scale)
    grad = torch.randn(expected.shape).to(dtype)
    found.backward(grad)
    expected.backward(grad.double())
    close(found, expected, dtype)
    for ours, theirs in ((query, query_64), (key, key_64), (value, value_64)):
        assert ours.grad is not None and theirs.grad is not None
        close(ours.grad, theirs.grad, dtype)


# lengths of the documents in each of two rows
DOCUMENTS = {
    "whole-rows": ([7], [7]),
    "one-token": ([1] * 7, [3, 1, 3]),
    "empty": ([0, 2, 0, 0, 5], [7, 0]),
    "single-token-rows": ([1], [1]),
    "long": ([2, 40, 3], [30, 15]),
}


def in_documents(
    query: Tensor, key: Tensor, value: Tensor, scale: float, rows: tuple[list[int], ...], window: int | None = None
) -> Tensor:
    """The definition: scores, a mask, softmax."""
    sequence, heads = query.shape[0], query.shape[2]
    key, value = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (key, value))
    document = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])
    seen = (document[:, :, None] == document[:, None]) & torch.ones(sequence, sequence, dtype=torch.bool).tril()
    if window is not None:
        places = torch.arange(sequence)
        seen &= places[:, None] - places < window
    scores = torch.einsum("sbad,tbad->bast", query, key) * scale
    return torch.einsum("bast,tbad->sbad", scores.masked_fill(~seen[:, None], -math.inf).softmax(-1), value).flatten(2)


def places(rows: tuple[list[int], ...]) -> Tensor:
    return torch.tensor([0, *(length for row in rows for length in row)]).cumsum(0).int()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (4, 2)])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_attention_within_documents(documents: str, heads: int, groups: int, dtype: torch.dtype) -> None:
    rows = DOCUMENTS[documents]
    sequence, channels, scale = sum(rows[0]), 16, 0.3
    query, query_64 = pair(sequence, 2, heads, channels, dtype=dtype, strided=True)
    key, key_64 = pair(sequence, 2, groups, channels, dtype=dtype, strided=True)
    value, value_64 = pair(sequence, 2, groups, channels, dtype=dtype)
    expected = in_documents(query_64, key_64, value_64, scale, rows)
    found = causal_attention(query, key, value, scale, places(rows), max(map(max, rows)))
    close(_masked(query, key, value, scale, places(rows)).permute(2, 0, 1, 3).flatten(2), expected, dtype)
    grad = torch.randn(expected.shape).to(dtype)
    found.backward(grad)
    expected.backward(grad.double())
    close(found, expected, dtype)
    for ours, theirs in ((query, query_64), (key, key_64), (value, value_64)):
        assert ours.grad is not None and theirs.grad is not None
        close(ours.grad, theirs.grad, dtype)


@pytest.mark.parametrize("window", [1, 3, 12, 40])
@pytest.mark.parametrize("documents", [None, "long", "empty"])
def test_attention_within_a_window(documents: str | None, window: int) -> None:
    rows = ([20], [20]) if documents is None else DOCUMENTS[documents]
    sequence, scale, dtype = sum(rows[0]), 0.3, torch.float32
    ends = (None, None) if documents is None else (places(rows), max(map(max, rows)))
    query, query_64 = pair(sequence, 2, 4, 16, dtype=dtype, strided=True)
    key, key_64 = pair(sequence, 2, 2, 16, dtype=dtype, strided=True)
    value, value_64 = pair(sequence, 2, 2, 16, dtype=dtype)
    expected = in_documents(query_64, key_64, value_64, scale, rows, window)
    found = causal_attention(query, key, value, scale, *ends, window)
    close(_masked(query, key, value, scale, places(rows), window).permute(2, 0, 1, 3).flatten(2), expected, dtype)
    grad = torch.randn(expected.shape).to(dtype)
    found.backward(grad)
    expected.backward(grad.double())
    close(found, expected, dtype)
    for ours, theirs in ((query, query_64), (key, key_64), (value, value_64)):
        assert ours.grad is not None and theirs.grad is not None
        close(ours.grad, theirs.grad, dtype)


def test_attention_within_documents_gradcheck() -> None:
    rows = ([2, 1, 0, 3], [6])
    query, key, value = (torch.randn(6, 2, heads, 2, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, 0.7, places(rows), 6), (query, key, value))


def test_boundaries_that_do_not_fit_the_rows_are_an_error() -> None:
    x = torch.randn(4, 2, 1, 8)
    for cu_seqlens in ([0, 3, 6, 8], [0, 4, 7], [0, 4, 8, 9]):
        with pytest.raises((AssertionError, RuntimeError)):
            causal_attention(x, x, x, 1.0, torch.tensor(cu_seqlens, dtype=torch.int32), 4)


def test_attention_does_not_look_ahead() -> None:
    query, key, value = (torch.randn(9, 1, 2, 8) for _ in range(3))
    before = causal_attention(query, key, value, 0.3)
    key[5:], value[5:] = 1e4, 1e30
    assert torch.equal(causal_attention(query, key, value, 0.3)[:5], before[:5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 1000])
def test_cross_entropy(vocabulary: int, dtype: torch.dtype) -> None:
    logits, logits_64 = pair(5, 3, vocabulary, dtype=dtype, factor=4.0)
    labels = torch.randint(0, vocabulary, (5, 3))
    expected = logits_64.logsumexp(-1) - logits_64.gather(-1, labels[..., None]).squeeze(-1)
    found = cross_entropy(logits, labels)
    assert found.dtype == torch.float32 and found.shape == (5, 3)
    grad = torch.randn(5, 3)
    found.backward(grad)
    expected.backward(grad.double())
    close(found, expected, torch.float32)
    assert logits.grad is not None and logits_64.grad is not None
    close(logits.grad, logits_64.grad, dtype)


def test_cross_entropy_extremes() -> None:
    labels = torch.tensor([[0]])
    assert cross_entropy(torch.full((1, 1, 10), 7.0), labels).item() == pytest.approx(math.log(10))
    assert cross_entropy(torch.tensor([[[3e38, -3e38]]]), labels).item() == 0.0
    assert cross_entropy(torch.tensor([[[1.0, -math.inf]]]), labels).item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_gradient_is_added(dtype: torch.dtype) -> None:
    inputs, grad_output = torch.randn(33, 5).to(dtype), torch.randn(33, 7).to(dtype)
    before = torch.randn(7, 5)
    expected = before.double() + grad_output.double().t() @ inputs.double()
    main_grad = before.clone()
    wgrad_gemm_accum_fp32(inputs, grad_output, main_grad)
    assert main_grad.dtype == torch.float32
    close(main_grad, expected, dtype)
    same_type = before.to(dtype, copy=True)
    wgrad_gemm_accum_fp16(inputs, grad_output, same_type)
    close(same_type, before.to(dtype).double() + grad_output.double().t() @ inputs.double(), dtype)


def test_adam_is_torchs_adamw() -> None:
    """Many steps, weight decay on one group; a parameter without a gradient stays."""
    ours = [torch.randn(5, 3), torch.randn(4), torch.randn(2)]
    theirs = [p.clone() for p in ours]
    settings = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6}

    def groups(parameters: list[Tensor]) -> list[dict[str, object]]:
        return [{"params": parameters[:1], "weight_decay": 0.3}, {"params": parameters[1:], "weight_decay": 0.0}]

    fused, reference = FusedAdam(groups(ours), **settings), torch.optim.AdamW(groups(theirs), **settings)  # type: ignore[arg-type]
    untouched = ours[2].clone()
    for _ in range(30):
        for a, b in zip(ours[:2], theirs[:2], strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        fused.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert torch.equal(ours[2], untouched)
    assert [group["step"] for group in fused.param_groups] == [30, 30]
    # the state goes through a state dict, step included
    again = FusedAdam(groups([p.clone() for p in ours]), **settings)
    again.load_state_dict(fused.state_dict())
    assert [group["step"] for group in again.param_groups] == [30, 30]


def test_adam_refuses_coupled_decay() -> None:
    with pytest.raises(ValueError, match="decoupled"):
        FusedAdam([torch.zeros(1)], adam_w_mode=False)


def test_swiglu_gradcheck() -> None:
    assert torch.autograd.gradcheck(swiglu, (torch.randn(3, 2, 10, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize("dtype", DTYPES)
def test_addition_and_norm(dtype: torch.dtype) -> None:
    """The norm is that of the rounded sum, which is also returned, and whose gradients both inputs get."""
    x, residual, weight = (pair(*shape, dtype=dtype)[0] for shape in ((3, 2, 7), (3, 2, 7), (7,)))
    out, total = rms_norm_residual(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual) and torch.equal(out, rms_norm(total, weight, 1e-5))
    torch.autograd.backward((out, total), (torch.randn_like(out), torch.randn_like(total)))
    assert x.grad is not None and residual.grad is not None and torch.equal(x.grad, residual.grad)
