"""The operations on a GPU: the tests of the CPU, run there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels import (
    test_linear_cross_entropy,
    test_operations,
    test_triton_adam,
    test_triton_cross_entropy,
    test_triton_norm,
    test_triton_rope,
)
from tests.kernels.triton_support import poisoned

pytestmark = pytest.mark.gpu


def cases(*modules: object) -> list[object]:
    """Tests of these modules that a device suits."""
    # an assertion that fails on the device would leave no device for the tests after it
    words = ("gradcheck", "is_an_error", "rounding_by_chance")
    return [
        case
        for module in modules
        for name, case in vars(module).items()
        if name.startswith("test_") and not any(word in name for word in words) and "monkeypatch" not in case.__annotations__
    ]


CASES = cases(test_operations, test_linear_cross_entropy)
TRITON = cases(test_triton_adam, test_triton_cross_entropy, test_triton_norm, test_triton_rope)


@pytest.fixture(autouse=True)
def _seed() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)


@pytest.fixture
def on_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield


def arguments(case: object) -> list[dict[str, object]]:
    """Every combination of a test's parameters."""
    combinations: list[dict[str, object]] = [{}]
    for mark in getattr(case, "pytestmark", []):
        if mark.name != "parametrize":
            continue
        names, values = mark.args
        names = [names] if isinstance(names, str) else list(names)
        combinations = [
            {**known, **dict(zip(names, value if len(names) > 1 else [value], strict=True))}
            for known in combinations
            for value in values
        ]
    return combinations


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_on_gpu(case: object) -> None:
    assert callable(case)
    for values in arguments(case):
        case(**values)


@pytest.mark.parametrize("case", TRITON, ids=lambda case: case.__name__)
def test_triton_on_gpu(case: object) -> None:
    """Compiled for the chip; the modules put their tensors on it."""
    assert callable(case)
    for values in arguments(case):
        with poisoned():
            case(**values)


def test_a_gpu_gets_the_triton_kernels() -> None:
    from megatron_synth_kernels.registry import choose

    choices = choose({}, torch.device("cuda", 0), torch.bfloat16)
    assert {choices[name].backend for name in ("rms_norm", "rms_norm_residual", "swiglu", "rope")} == {"triton"}


@pytest.mark.parametrize("backend", ["te", "apex"])
def test_libraries_compute_the_same(backend: str) -> None:
    """Every adapter that is available against torch's version, forward and backward."""
    from megatron_synth_kernels.registry import OPERATIONS

    compared = 0
    for name, shapes in {"rms_norm": [(64, 2, 256), (256,)], "swiglu": [(64, 2, 512)]}.items():
        known = {entry.name: entry for entry in OPERATIONS[name].backends}
        if backend not in known or known[backend].why_not(torch.device("cuda", 0), torch.bfloat16) is not None:
            continue
        results = []
        for entry in (known["torch"], known[backend]):
            torch.manual_seed(1)
            leaves = [torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True) for shape in shapes]
            out = entry.load()(*leaves, *([1e-5] if name == "rms_norm" else []))
            results.append([out, *torch.autograd.grad(out, leaves, torch.randn_like(out))])
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
        compared += 1
    if not compared:
        pytest.skip(f"{backend} has nothing here")


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("heads", "groups", "channels"), [(4, 4, 128), (6, 2, 128), (4, 2, 64)])
@pytest.mark.parametrize("name", ["cudnn", "flash", "te", "fa3"])  # FlashAttention 3 stays in the place of 2: it is the last
def test_attention_is_that_of_the_definition(name: str, heads: int, groups: int, channels: int, documents: bool) -> None:
    """Forward and backward, against the definition in fp32, for views as the model has them."""
    from megatron_synth_kernels.registry import OPERATIONS
    from megatron_synth_kernels.torch.attention.causal import causal_attention

    backend = OPERATIONS["attention"].backend(name)
    problem = backend.why_not(torch.device("cuda", 0), torch.bfloat16)
    if problem is not None or (name == "cudnn" and documents):
        pytest.skip(problem or "takes whole rows")
    torch.manual_seed(0)
    ends = (torch.tensor([0, 100, 256, 300, 512], dtype=torch.int32, device="cuda"), 212) if documents else (None, None)
    mixed = torch.randn(256, 2, groups, heads // groups + 2, channels, dtype=torch.bfloat16, device="cuda")
    given = torch.randn(256, 2, heads * channels, dtype=torch.bfloat16, device="cuda")
    results = []
    for attention, dtype in ((backend.load(), torch.bfloat16), (causal_attention, torch.float32)):
        leaf = mixed.to(dtype).detach().requires_grad_()
        query = leaf[..., :-2, :].flatten(2, 3)
        out = attention(query, leaf[..., -2, :], leaf[..., -1, :], channels**-0.5, *ends)
        results.append([out.float(), *(grad.float() for grad in torch.autograd.grad(out, leaf, given.to(dtype)))])
    for found, expected in zip(*results, strict=True):
        # scores, weights and sums are rounded to bf16 on the way
        assert (found - expected).norm() <= 0.01 * expected.norm()
