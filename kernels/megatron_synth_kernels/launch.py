"""What kernels share: tensors viewed as rows, and sizes of launches."""

from __future__ import annotations

import torch
from torch import Tensor

H200_PROCESSORS = 132


def as_rows(x: Tensor) -> Tensor:
    """[..., H] -> [N, H] with neighboring channels side by side; a copy only where no view has that."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(-1, x.shape[-1])


def power_of_two(size: int) -> int:
    """The next power of two, at least `size`: Triton's tiles have no other lengths."""
    return 1 << max(size - 1, 0).bit_length()


def ceil_div(size: int, part: int) -> int:
    """How many parts cover `size`."""
    return -(-size // part)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device.

    The meta device stands for an H200, for which kernels are compiled where there is none. The interpreter gets few, so that
    small tests see a program work on several rows.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return H200_PROCESSORS if device.type == "meta" else 3
