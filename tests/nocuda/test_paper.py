"""What a step is counted to be on paper: sizes and limits of single operations, which need no device."""

from __future__ import annotations

import pytest
import torch

from tests.nocuda.paper import BACKWARD, CHIPS, FP8, LAUNCH, Work, of_torch, of_triton, rows

H100, H200 = CHIPS


def test_a_product_takes_its_operations_or_its_bytes() -> None:
    a, b = torch.empty(4096, 2048, device="meta"), torch.empty(2048, 1024, device="meta")
    out = torch.empty(4096, 1024, device="meta")
    for name, operands in (("mm", [a, b, out]), ("addmm", [out, a, b, out])):
        work = of_torch(name, operands, 1000, False)
        assert work.group == "products, BF16" and work.flops == 2 * 4096 * 2048 * 1024
        assert work.seconds(H200) == (pytest.approx(work.flops / H200.bf16), "products")
    narrow = [one.to(torch.float8_e4m3fn) for one in (a, b)]
    assert of_torch("_scaled_mm", [*narrow, out], 1000, False).seconds(H100)[0] == pytest.approx(2 * 4096 * 2048 * 1024 / FP8)
    assert of_torch("mm", [a, b], 10**12, False).seconds(H200) == (pytest.approx(10**12 / H200.memory), "memory")


def test_attention_counts_what_the_mask_leaves_and_five_products_backward() -> None:
    query = torch.empty(1, 2, 4096, 128, device="meta")
    forward = of_torch("_scaled_dot_product_flash_attention", [query] * 3, 0, True)
    backward = of_torch("_scaled_dot_product_flash_attention_backward", [query] * 6, 0, True)
    assert forward.flops == 2 * 2 * 4096**2 * 128 and backward.flops == 2.5 * forward.flops
    assert backward.seconds(H100)[0] == pytest.approx(backward.flops / BACKWARD)


def test_small_work_takes_a_launch() -> None:
    assert of_triton("rope", 100).seconds(H200) == (LAUNCH, "launch")
    groups = [
        of_triton(name, 0).group for name in ("swiglu_gradient_blocks", "cross_entropy_grad", "adamw", "rms_norm_forward")
    ]
    assert groups == ["quantizers", "loss", "optimizer", "norms, SwiGLU, rotation"]


def test_a_line_of_the_table_adds_up() -> None:
    half = H200.bf16 / 2
    (_, line) = rows("1.3B BF16", [Work("products, BF16", "mm", half, 0, "bf16"), Work("loss", "x", 0, int(H200.memory / 4))])
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:3] == ["1.3B BF16", "H200", "500"] and cells[-4:] == ["750", "87.4", "52", "60 %"]
