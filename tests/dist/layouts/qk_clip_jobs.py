"""QK-clip beside plain torch: what a step's largest logits are, and what becomes of the weights."""

from __future__ import annotations

from typing import Any


def train_and_compute_clips(arguments: list[str], threshold: float) -> list[dict[str, Any]]:
    """Train on one rank in fp32; of each step and layer the largest logits by head, and by what rows of the weight were scaled."""
    import torch

    from megatron_synth.cli import main as cli
    from megatron_synth.train.qk_clip import QkClip
    from megatron_synth.train.step import Stepper
    from tests.dist.layouts import health_reference

    step, apply = Stepper.step, QkClip.apply
    found: list[dict[str, Any]] = []

    def measured(self: Any, *args: Any, **kwargs: Any) -> Any:
        with health_reference.watched(self.chunks[0].module) as seen:
            found.append({"seen": seen})
            return step(self, *args, **kwargs)

    def compared(self: Any) -> None:
        layers = self._layers
        before = [layer.linear_qkv.weight.detach().clone() for layer in layers]
        apply(self)
        seen = found[-1].pop("seen")
        found[-1]["logits"], found[-1]["scaled"] = [], []
        for number, layer in enumerate(layers):
            largest = []
            for query, key in zip(seen[f"query{number}"], seen[f"key{number}"], strict=True):
                query, key = (x.transpose(0, 1).double() for x in (query, key))  # [B, S, A or G, D]
                key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
                scores = torch.einsum("bsad,btad->bast", query, key) / query.shape[-1] ** 0.5
                visible = torch.ones(scores.shape[-2:]).tril().bool()
                largest.append(scores.masked_fill(~visible, -torch.inf).amax(dim=(0, 2, 3)))
            found[-1]["logits"].append(torch.stack(largest).amax(0).tolist())
            ratios = (layer.linear_qkv.weight.detach() / before[number]).nanmedian(dim=1).values
            found[-1]["scaled"].append(ratios.tolist())

    Stepper.step, QkClip.apply = measured, compared  # type: ignore[method-assign]
    assert cli.main([*arguments, f"optim.qk_clip={threshold}"]) == 0
    return found
