"""Parameters in FP8 (`precision.fp8_param_gather`): what is different about them, in one place.

TransformerEngine then makes the weights of its linear layers as `QuantizedTensor`s: parameters that say they are bf16 and hold
one byte per number, and the transpose. There is no bf16 copy of them: the optimizer's fp32 shard is quantized, with scales
reduced over the data-parallel ranks, and the bytes are gathered, half of bf16's traffic. Three things follow.

- A part of such a tensor cannot be written: the whole has one scale, or blocks that cross the part have. So a parameter is
  filled from a plain tensor, at once, and what FP8 lost of that must reach the optimizer by another way (`fill`).
- Views of it are not views: its storage offset is always 0, and block-scaled ones refuse any other shape. What only asks for
  places and shapes asks a tensor without memory (`shape_of`).
- Its transpose is made again after each gathering, which megatron-core leaves out where it gathers at once (`renew`).

This rests on TransformerEngine 2.11, pytorch/module/base.py, `reset_parameters` (`_high_precision_init_val`), and
pytorch/quantized_tensor.py, `__torch_dispatch__` (`copy_` quantizes); on megatron-core 0.16.1, core/fp8_utils.py,
core/distributed/param_and_grad_buffer.py, `finish_param_sync`, and core/optimizer/distrib_optimizer.py,
`_build_model_and_main_param_groups` (`get_high_precision_init_val`) and `_copy_main_params_to_model_params`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core import fp8_utils
from torch import Tensor

RECIPES = {"delayed": "delayed", "current": "tensorwise", "blockwise": "blockwise"}
"""megatron-core's names of `precision.fp8`."""


def is_quantized(x: Any) -> bool:
    """Whether a parameter is held in FP8."""
    return bool(fp8_utils.is_float8tensor(x))


def shape_of(parameter: Tensor) -> Tensor:
    """A contiguous tensor of the parameter's shape and nominal dtype, without memory."""
    return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")


@torch.no_grad()
def fill(parameter: Tensor, values: Tensor) -> None:
    """Quantize initial `values`, of the parameter's shape, into it, and keep them for the optimizer, on the host.

    Without that the optimizer would begin from what FP8 left of them. It drops them once it has taken them over.
    """
    assert hasattr(parameter, "get_high_precision_init_val"), "not made within fp8_model_init(preserve_high_precision_init_val)"
    parameter.copy_(values)
    parameter._high_precision_init_val = values.cpu()  # type: ignore[attr-defined]


def renew(parameters: Iterable[Tensor]) -> None:
    """Make the transposes of those in FP8 from what has just been gathered."""
    quantized = [parameter for parameter in parameters if is_quantized(parameter)]
    if quantized:
        fp8_utils.post_all_gather_processing(quantized)
