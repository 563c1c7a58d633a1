"""Parents by loss (S3, arXiv 2310.13671): those on which a model, such as a small run, is weakest.

Each parent's loss is evaluated once, in this process, and kept in the output, so that a run that goes on, and all shares of it,
choose the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pydantic import with_config
from typing_extensions import TypedDict

from megatron_synth.config.errors import UserError
from megatron_synth.config.synthesis import EngineConfig, GeneratorConfig, HardestConfig
from megatron_synth.core.files import write_atomic
from megatron_synth.core.log import show
from megatron_synth.core.records import OPEN, Amount, Count, Reader
from megatron_synth.synthesis.documents.parents import Chosen, Parent, Parents
from megatron_synth.synthesis.generator import Generator, generator_of
from megatron_synth.synthesis.selection.losses import DocumentLoss, highest_losses

FOLDER = "hardest"
LOSSES = "losses.jsonl"
_BATCH = 64  # documents that are sorted by length together


@with_config(OPEN)
class LossLine(TypedDict):
    """A line of the file of losses: of a document, by the digest of its text, the sum in nats over its tokens but the first."""

    id: str
    loss: Amount
    tokens: Count


LINES: Reader[LossLine] = Reader(LossLine, "remove the file: the losses are evaluated again")


def hardest(settings: HardestConfig, engine: EngineConfig, parents: Parents, output: Path, *, evaluate: bool) -> Parents:
    """The parents with the highest losses.

    evaluate: compute losses that are not there yet; otherwise they must be there, or the first parents stand in for them.

    Raises:
        UserError: the model cannot be read, or its losses are not finite.
    """
    model = generator_of(
        GeneratorConfig(model=settings.model, run=settings.run, api="completions"), output / FOLDER, export=evaluate
    )
    file = output / FOLDER / (f"losses-{model.weights}.jsonl" if model.weights else LOSSES)
    found = _read(file)
    missing = [parent for parent in _once(parents) if parent.id not in found] if evaluate else []
    if evaluate and missing:
        show(f"{output}: the losses of {len(missing):,} parents on {model.name} are evaluated", error=True)
        found |= evaluate_losses(model, missing, engine)
        lines = ({"id": name, "loss": one.total, "tokens": one.tokens} for name, one in found.items())
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, "".join(json.dumps(line) + "\n" for line in lines))
    if not found:
        show("note: losses are not known before the first run; the first parents stand in for the hardest", error=True)
        names = [parent.id for parent in islice(_once(parents), settings.count)]
    else:
        here = {parent.id for parent in _once(parents)}
        names = highest_losses(
            {name: one for name, one in found.items() if name in here}, settings.count, min_tokens=settings.min_tokens
        )
    if not names:
        raise UserError(f"hardest: no parent has {settings.min_tokens} tokens; lower hardest.min_tokens")
    described = {**model.identity(), "count": settings.count, "min_tokens": settings.min_tokens}
    return parents.only(Chosen(frozenset(names), described))


def _read(file: Path) -> dict[str, DocumentLoss]:
    if not file.is_file():
        return {}
    return {line["id"]: DocumentLoss(line["loss"], line["tokens"]) for line in LINES.read_lines(file)}


def _once(parents: Parents) -> Iterator[Parent]:
    seen: set[str] = set()
    for parent in parents:
        if parent.id not in seen:
            seen.add(parent.id)
            yield parent


def evaluate_losses(model: Generator, parents: list[Parent], engine: EngineConfig) -> dict[str, DocumentLoss]:
    """The loss of each parent: sums over its tokens that have one before them, in pieces of the model's context at most."""
    import torch

    from megatron_synth.synthesis.decoding.model import load
    from megatron_synth.synthesis.decoding.token_editing import token_probabilities

    device = engine.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    prior = load(Path(model.model), device, torch.bfloat16 if engine.dtype == "bfloat16" else torch.float32)
    size = min(prior.context, 1024)
    found: dict[str, DocumentLoss] = {}
    for begin in range(0, len(parents), _BATCH):
        rows = {parent.id: prior.encode(parent.text) for parent in parents[begin : begin + _BATCH]}
        sums = dict.fromkeys(rows, (0.0, 0))
        pieces = [(name, row[at : at + size]) for name, row in rows.items() for at in range(0, len(row), size)]
        pieces = sorted((one for one in pieces if len(one[1]) > 1), key=lambda one: (len(one[1]), one[0]))
        for at in range(0, len(pieces), 4):
            batch = pieces[at : at + 4]
            for (name, _), (_, of_tokens) in zip(batch, token_probabilities(prior, [row for _, row in batch]), strict=True):
                total, count = sums[name]
                sums[name] = total - float(of_tokens.double().sum()), count + of_tokens.numel()
        found |= {name: DocumentLoss(total, count) for name, (total, count) in sums.items()}
    return found
