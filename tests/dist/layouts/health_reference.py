"""The health of a step by plain torch, on one rank that has the whole model in fp32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def watched(model: Any) -> Iterator[dict[str, list[Tensor]]]:
    """Within, what passes by is kept: by layer its output, queries and keys; hidden states before the output layer."""
    seen: dict[str, list[Tensor]] = {}
    undo = []

    def keep(name: str, value: Tensor) -> None:
        seen.setdefault(name, []).append(value.detach().clone())

    for number, layer in enumerate(model.decoder.layers):
        undo.append(layer.register_forward_hook(lambda _, __, out, n=number: keep(f"out{n}", out[0])).remove)
        core = layer.self_attention.core_attention

        def rotated(query: Tensor, key: Tensor, *rest: Any, n: int = number, inner: Any = core._attention) -> Tensor:
            keep(f"query{n}", query)
            keep(f"key{n}", key)
            out: Tensor = inner(query, key, *rest)
            return out

        kept = core._attention
        core._attention = rotated
        undo.append(lambda core=core, kept=kept: setattr(core, "_attention", kept))
    undo.append(model.output_layer.register_forward_pre_hook(lambda _, given: keep("hidden", given[0])).remove)
    try:
        yield seen
    finally:
        for step in undo:
            step()


def health(model: Any, seen: dict[str, list[Tensor]], before: dict[str, Tensor]) -> dict[str, Any]:
    """By the names of metrics.jsonl. seen: as `watched` yields it, where rows are whole documents. before: the weights."""
    squares: dict[str, list[Any]] = {}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        part = words[2] if name.startswith("decoder.layers.") else {"decoder": "final_norm", "output_layer": "head"}.get(words[0], words[0])
        sums = squares.setdefault(part, [0.0, 0.0, 0.0])
        for place, value in enumerate((parameter.main_grad, before[name], parameter.detach() - before[name])):
            sums[place] += float(value.double().square().sum())
    found = {
        f"health/{what}/{part}": math.sqrt(sums[place])
        for part, sums in squares.items()
        for place, what in enumerate(("grad_norm", "weight_norm", "update_norm"))
    }
    for layer in range(len(model.decoder.layers)):
        outputs = torch.cat([out.flatten() for out in seen[f"out{layer}"]]).double()
        found[f"health/activation_rms/{layer}"] = float(outputs.square().mean().sqrt())
        query, key = seen[f"query{layer}"][0][:, 0].double(), seen[f"key{layer}"][0][:, 0].double()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = torch.einsum("sad,tad->ast", query, key) / math.sqrt(query.shape[-1])
        found[f"health/max_logit/{layer}"] = float(scores[:, torch.ones(scores.shape[1:]).tril().bool()].max())
    weight = before["output_layer.weight"].double()
    logits = seen["hidden"][0][:, 0].double() @ weight.t()
    tokens = torch.distributions.Categorical(logits=logits[:, : model.tokens])
    found["health/entropy"] = float(tokens.entropy().mean())
    found["health/padding_probability"] = float(logits.softmax(-1)[:, model.tokens :].sum(-1).mean())
    for table, name in (("embedding", "embedding.word_embeddings.weight"), ("head", "output_layer.weight")):
        found[f"health/padding_norm/{table}"] = float(before[name][model.tokens :].double().norm())
    return found
