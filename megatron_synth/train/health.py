"""The health of a run, every `log.health_interval` steps: norms by layer, and what an `Observer` sees of the forward pass.

Sums of squares are made of each rank's own part and reduced once in fp64, so that all layouts say the same. The update is the
difference of two copies of the weights that a rank updates: 4 bytes for each of them from the end of the backward pass on, when
the activations are gone. A CPU keeps the place of the copy, since memory that is new costs ten times the copy, and works on
parts that fit its cache. The host does not wait for the device before `observed`, but where ranks share sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron_synth.config.schema import Config
from megatron_synth.model import observer
from megatron_synth.model.architecture import LAYERS
from megatron_synth.model.fp8.statistics import Statistics
from megatron_synth.model.observer import Observer
from megatron_synth.parallel.average import places
from megatron_synth.parallel.groups import Ranks
from megatron_synth.train.grad_norm import rough_square_sum, square_sum

EMBEDDING, FINAL_NORM, HEAD = "embedding", "final_norm", "head"
GRADIENTS, WEIGHTS, UPDATES = range(3)
_BLOCK = 1 << 16
"""Numbers that a CPU works on at once, 256 KiB: what follows finds them in its cache."""


class Health:
    """What a rank measures of single steps."""

    def __init__(
        self, config: Config, chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer, ranks: Ranks, copies: int
    ):
        """copies: ranks that hold the same part of weights and gradients for the optimizer."""
        models = [chunk.module for chunk in chunks]
        layers = config.model.num_layers
        self._ranks, self._copies = ranks, copies
        self._tied = config.model.share_embeddings_and_output_weights
        self._parts = [*map(str, range(layers)), EMBEDDING, FINAL_NORM, *([] if self._tied else [HEAD])]
        self._observer = Observer(models, layers, config.train.sequence_length, ranks.device)
        self._statistics: Statistics | None = models[0].fp8_statistics
        names = {parameter: _part(name, model) for model in models for name, parameter in model.named_parameters()}
        self._weights: dict[str, list[Tensor]] = {part: [] for part in self._parts}
        """By part of the model: what this rank updates of it, without what another rank has too."""
        for inner in optimizer.chained_optimizers:
            for parameter, _, _, weights in places(inner):
                counted = param_is_not_shared(parameter) and tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter)
                if counted:
                    self._weights[names[parameter]].append(weights)
        self._padding = {
            table: rows
            for model in models
            for table, rows in _padding_rows(model, self._tied)
            if ranks.data_rank == ranks.context_rank == 0
        }
        self._pads = config.model.padded_vocab_size(models[0].tokens) > models[0].tokens
        self._sums = torch.zeros((len(self._parts), 3), dtype=torch.float64, device=ranks.device)
        self._padding_sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        self._blocks = {part: [block for one in tensors for block in _blocks(one)] for part, tensors in self._weights.items()}
        self._on_cpu = ranks.device.type == "cpu"
        self._before: dict[str, list[Tensor]] = {}

    def begin(self) -> None:
        """Before a step that is measured."""
        self._sums.zero_()
        self._padding_sums.zero_()
        self._observer.begin()
        if self._statistics is not None:
            self._statistics.observing = True

    @torch.no_grad()
    def before_update(self) -> None:
        """The gradients are there and not clipped yet."""
        self._observer.end()
        for place, part in enumerate(self._parts):
            weights = self._weights[part]
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            if gradients:
                self._sums[place, GRADIENTS] = square_sum(gradients)
            if weights:
                self._sums[place, WEIGHTS] = self._copy(part)
        for place, table in enumerate((EMBEDDING, HEAD)):
            rows = self._padding.get(table)
            if rows is not None and len(rows):
                self._padding_sums[place] = square_sum([rows.detach().float()])

    def _copy(self, part: str) -> Tensor:
        """Copy the weights of a part; the sum of their squares."""
        blocks = self._blocks[part]
        if not self._on_cpu:
            self._before[part] = [block.clone() for block in blocks]
            return square_sum(self._before[part])
        before = self._before.setdefault(part, [torch.empty_like(block) for block in blocks])
        sums = []
        for block, copy in zip(blocks, before, strict=True):
            copy.copy_(block)
            sums.append(rough_square_sum(copy))
        return torch.stack(sums).sum()

    @torch.no_grad()
    def after_update(self) -> None:
        """The weights are those after the step, also where it was skipped."""
        for place, part in enumerate(self._parts):
            before, blocks = self._before.get(part), self._blocks[part]
            if not before:
                continue
            if self._on_cpu:
                sums = [rough_square_sum(copy.sub_(block)) for copy, block in zip(before, blocks, strict=True)]
                self._sums[place, UPDATES] = torch.stack(sums).sum()
            else:
                torch._foreach_sub_(before, blocks)
                self._sums[place, UPDATES] = square_sum(before)
                del self._before[part]

    def observed(self) -> dict[str, Any]:
        """What was measured of the step, by the names of `record/metrics.py`; equal on all ranks, which call it together."""
        seen = self._observer
        added = torch.cat([(self._sums / self._copies).flatten(), self._padding_sums, seen.activations.flatten(), seen.output])
        torch.distributed.all_reduce(added)
        largest = seen.logits.clone()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        number, layers = self._sums.numel(), len(seen.logits)
        sums, padding, activations, output = added.cpu().split([number, 2, 2 * layers, 3])
        found: dict[str, Any] = {}
        norms = sums.view(-1, 3).sqrt().tolist()
        for place, name in ((GRADIENTS, "grad_norm"), (WEIGHTS, "weight_norm"), (UPDATES, "update_norm")):
            for part, values in zip(self._parts, norms, strict=True):
                found[f"health/{name}/{part}"] = values[place]
        squares, numbers = activations.view(-1, 2).unbind(1)
        for name, by_layer in (("activation_rms", (squares / numbers).sqrt()), ("max_logit", largest.cpu())):
            found |= {f"health/{name}/{layer}": value for layer, value in enumerate(by_layer.tolist())}
        places = float(output[observer.PLACES])
        found["health/entropy"] = float(output[observer.ENTROPY]) / places
        if self._pads:
            found["health/padding_probability"] = float(output[observer.PADDING]) / places
            tables = [EMBEDDING] if self._tied else [EMBEDDING, HEAD]
            norms_of_padding = padding.sqrt().tolist()
            found |= {f"health/padding_norm/{table}": norm for table, norm in zip(tables, norms_of_padding, strict=False)}
        return found


def _blocks(weights: Tensor) -> list[Tensor]:
    """The numbers of a tensor, flat, in parts that fit a processor's cache; on a GPU in one."""
    flat = weights.detach().view(-1)
    return list(flat.split(_BLOCK)) if flat.device.type == "cpu" else [flat]


def _part(name: str, model: Any) -> str:
    """The part of the model that a parameter belongs to: the number of a layer in the whole model, or a name."""
    if name.startswith(LAYERS):
        own = int(name.removeprefix(LAYERS).split(".")[0])
        return str(model.decoder.layers[own].layer_number - 1)
    return {"embedding": EMBEDDING, "decoder": FINAL_NORM, "output_layer": HEAD}[name.split(".")[0]]


def _padding_rows(model: Any, tied: bool) -> list[tuple[str, Tensor]]:
    """This rank's rows that pad the vocabulary, of each table that a chunk has."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    found = []
    tables = [(EMBEDDING, model.embedding.word_embeddings.weight)] if model.pre_process else []
    if model.post_process and not tied:
        tables.append((HEAD, model.output_layer.weight))
    for table, weight in tables:
        valid = min(len(weight), max(0, model.tokens - rank * len(weight)))
        found.append((table, weight[valid:]))
    return found
