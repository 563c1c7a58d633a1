"""Peak arithmetic rates of accelerators, by the name that the driver reports."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Dense BF16 with FP32 accumulation, in FLOP/s, from NVIDIA's data sheets (half of the figure "with sparsity").
# The first pattern that occurs in the device name decides: variants of a chip stand before the chip.
_PEAKS: tuple[tuple[str, float | None], ...] = (
    (r"\bMIG\b", None),  # a slice of a chip: its share of the peak is not in the name
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
    (r"\bGH200\b", 989e12),
    (r"\bH200 NVL\b", 835e12),
    (r"\bH200\b", 989e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100\b", 989e12),
    (r"\bH800 PCIe\b", 756e12),
    (r"\bH800\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\bA100\b", 312e12),
    (r"\bA800\b", 312e12),
    (r"\bL40S\b", 362e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense BF16 peak in FLOP/s of a device named as by `torch.cuda.get_device_name()`; None when it is not known."""
    for pattern, peak in _PEAKS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return peak
    return None


def mfu(flops_per_second: float, device_name: str) -> float | None:
    """Model FLOPs utilisation, a fraction of the dense BF16 peak (also for FP8 runs); None for an unknown device."""
    peak = peak_flops(device_name)
    return None if peak is None else flops_per_second / peak


def show_mfu(value: float | None) -> str:
    """`51.8%`, or `n/a` where the peak is not known."""
    return "n/a" if value is None else f"{100 * value:.1f}%"


@dataclass(frozen=True)
class Accelerator:
    """A GPU in its usual node, from data sheets; rates per GPU in units per second, sizes in bytes."""

    name: str
    bf16_flops: float
    fp8_flops: float | None
    memory: float
    memory_bandwidth: float
    processors: int
    """Streaming multiprocessors."""
    link_bandwidth: float
    """NVLink, one direction."""
    fabric_bandwidth: float
    """InfiniBand or RoCE between nodes, one direction."""
    per_node: int
    source: str


# SXM boards in NVIDIA's DGX/HGX nodes of eight, one network adapter per GPU. NVLink: half of the bidirectional figure.
ACCELERATORS = {
    part.name: part
    for part in (
        Accelerator("a100", 312e12, None, 80e9, 2.039e12, 108, 300e9, 25e9, 8, "NVIDIA A100 80GB SXM data sheet; DGX A100"),
        Accelerator("h100", 989e12, 1979e12, 80e9, 3.35e12, 132, 450e9, 50e9, 8, "NVIDIA H100 SXM data sheet; DGX H100"),
        Accelerator("h200", 989e12, 1979e12, 141e9, 4.8e12, 132, 450e9, 50e9, 8, "NVIDIA H200 SXM data sheet; DGX H200"),
        Accelerator("b200", 2250e12, 4500e12, 180e9, 8.0e12, 148, 900e9, 50e9, 8, "NVIDIA DGX B200 data sheet"),
    )
}
