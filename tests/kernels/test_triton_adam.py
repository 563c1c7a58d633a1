"""Adam in Triton: the reference's bits, torch's AdamW, and rounding by chance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_synth_kernels.torch import adam_reference
from megatron_synth_kernels.torch.adam_reference import Coefficients, Rounding, philox, round_stochastically
from tests.kernels.triton_support import DEVICE, DTYPES, needs_triton

BETAS = (0.8, 0.95)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("rounding", [None, Rounding(2**40 + 7, 3, 5), Rounding(1, 2**31, 1)])
def test_the_bits_are_those_of_the_reference(rounding: Rounding | None, copied: bool, dtype: torch.dtype) -> None:
    from megatron_synth_kernels.triton.adam import adamw_

    param, grad = torch.randn(1500, device=DEVICE).to(dtype), torch.randn(1500, device=DEVICE).to(dtype)
    param[0], grad[1], grad[2] = torch.inf, torch.nan, 0.0
    coefficients = Coefficients.of(1e-2, BETAS, 1e-8, 0.1, 5)
    results: list[list[Tensor]] = []
    for update in (adam_reference.adamw_, adamw_):
        torch.manual_seed(1)
        tensors = [param.clone(), torch.randn(1500, device=DEVICE), torch.rand(1500, device=DEVICE)]
        copy = torch.full((1500,), torch.nan, dtype=torch.bfloat16, device=DEVICE) if copied else None
        update(tensors[0], grad, *tensors[1:], coefficients, copy=copy, rounding=rounding)
        results.append([*tensors, *([] if copy is None else [copy])])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected.nan_to_num(123.0), found.nan_to_num(123.0))
        assert torch.equal(expected.isnan(), found.isnan())


@needs_triton
def test_it_is_torchs_adamw_and_its_state_survives() -> None:
    from megatron_synth_kernels.triton.adam import TritonAdam

    ours = [torch.randn(5, 3, device=DEVICE), torch.randn(4, device=DEVICE), torch.randn(2, device=DEVICE)]
    theirs = [p.clone() for p in ours]

    def groups(parameters: list[Tensor]) -> list[dict[str, object]]:
        return [{"params": parameters[:1], "weight_decay": 0.3}, {"params": parameters[1:], "weight_decay": 0.0}]

    optimizer = TritonAdam(groups(ours), lr=3e-3, betas=BETAS, eps=1e-6)
    reference = torch.optim.AdamW(groups(theirs), lr=3e-3, betas=BETAS, eps=1e-6)  # type: ignore[arg-type]
    untouched = ours[2].clone()

    def step(optimizer: TritonAdam, parameters: list[Tensor]) -> None:
        for a, b in zip(parameters[:2], theirs[:2], strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()

    for _ in range(5):
        step(optimizer, ours)
    again_params = [p.clone() for p in ours]
    again = TritonAdam(groups(again_params), lr=3e-3, betas=BETAS, eps=1e-6)
    again.load_state_dict(optimizer.state_dict())
    for _ in range(5):
        step(again, again_params)
    for a, b in zip(again_params, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(again_params[2], untouched)
    assert [group["step"] for group in again.param_groups] == [10, 10]


@needs_triton
def test_bf16_weights_without_a_master_learn_only_when_rounded_by_chance() -> None:
    """Updates of a thousandth of a weight are lost by rounding to the nearest bf16, a 256th apart."""
    from megatron_synth_kernels.triton.adam import TritonAdam

    ends = {}
    for seed in (None, 7, 8):
        weight = torch.ones(2000, dtype=torch.bfloat16, device=DEVICE)
        optimizer = TritonAdam([weight], lr=1e-3, rounding_seed=seed)
        for step in range(4):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            if step == 1:  # the moments stay fp32 on their way through a checkpoint, and so do the random bits
                state = optimizer.state_dict()
                optimizer = TritonAdam([weight], lr=1e-3, rounding_seed=seed)
                optimizer.load_state_dict(state)
                assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
        ends[seed] = weight.float()
    assert ends[None].eq(1).all()
    assert ends[7].mean().item() == pytest.approx(1 - 4e-3, abs=4e-4)
    assert not torch.equal(ends[7], ends[8])


def test_philox_is_the_published_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known answers of Philox4x32-10, from the kat_vectors file of its authors' library, Random123."""
    monkeypatch.setattr(adam_reference, "PHILOX_ROUNDS", 10)
    assert philox(torch.tensor([0]), Rounding(0, 0, 0)).item() == 0x6627E8D5
    element = torch.tensor([0x85A308D3_243F6A88 - 2**64])
    assert philox(element, Rounding(0x299F31D0_A4093822, 0x13198A2E, 0x03707344)).item() == 0xD16CFE09


def test_rounding_by_chance_is_unbiased_and_exact_where_it_can_be() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf])
    for bits in (0, 0xFFFF):
        rounded = round_stochastically(exact, torch.full((6,), bits))
        assert torch.equal(rounded.float(), exact) and torch.equal(rounded.signbit(), exact.signbit())
    assert round_stochastically(torch.tensor([torch.nan]), torch.tensor([0xFFFF])).isnan().all()
    x = torch.tensor([1 + 2**-9 + 2**-11, -3.3, 1e-30]).repeat_interleave(60_000)
    rounded = round_stochastically(x, philox(torch.arange(len(x)), Rounding(5, 0, 1))).double()
    means = rounded.view(3, -1).mean(1)
    gaps = x.view(3, -1)[:, 0].abs().double() / 128  # a step of bf16 is no larger
    assert ((means - x.view(3, -1)[:, 0].double()).abs() < 4 * gaps / 60_000**0.5).all()
    assert [len(row.unique()) for row in rounded.view(3, -1)] == [2, 2, 2]
