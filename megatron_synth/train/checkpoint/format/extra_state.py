"""The state of a layer of TransformerEngine in a checkpoint: a pickle in a tensor, which is run when the state is set."""

from __future__ import annotations

import io
from typing import Any

import torch

from megatron_synth.train.checkpoint.format.pickles import Inert, Refused, read_inert

_CLASSES = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch.storage._load_from_bytes",
    "torch.serialization._get_layout",
    "torch.Size",
}
_MOST = 1_000_000
"""Objects in the state of a layer; a pickle can name one many times."""


def check_extra_state(state: Any, name: str) -> None:
    """Refuse what TransformerEngine would unpickle as the state of a layer, unless it holds tensors and its own recipes alone.

    Raises:
        Refused: names what it holds.
    """
    if isinstance(state, io.BytesIO):
        raise Refused(f"{name}: a state as TransformerEngine kept it before version 2, which is not read")
    if not isinstance(state, torch.Tensor) or state.numel() == 0:
        return
    try:
        _check_pickle(state.detach().cpu().numpy().tobytes())
    except (Refused, TypeError) as error:
        raise Refused(f"{name}: {error}") from None


def _check_pickle(content: bytes) -> None:
    waiting, seen = [read_inert(content, _allowed)], 0
    while waiting:
        one = waiting.pop()
        seen += 1
        if seen > _MOST:
            raise Refused("it holds more than the state of a layer")
        if isinstance(one, dict):
            waiting.extend(one.values())
        elif isinstance(one, (list, tuple)):
            waiting.extend(one)
        elif isinstance(one, Inert):
            if one.name == "torch.storage._load_from_bytes":
                try:
                    torch.load(io.BytesIO(*one.args), map_location="cpu", weights_only=True)
                except Exception as error:
                    raise Refused(first_line(error)) from None
            waiting.extend((*one.args, one.state))


def _allowed(module: str, name: str) -> bool:
    if f"{module}.{name}" in _CLASSES or module == "transformer_engine.common.recipe":
        return True
    return module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)


def first_line(error: BaseException) -> str:
    """Of what torch says, without its advice to load such a file all the same."""
    lines = [line.strip() for line in str(error).splitlines() if "WeightsUnpickler" in line or "GLOBAL" in line]
    return lines[0] if lines else (str(error).splitlines() or [type(error).__name__])[0]
