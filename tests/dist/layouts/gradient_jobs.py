"""The gradients of a step, tensor by tensor, as every rank has them before the update."""

from __future__ import annotations

from typing import Any

Sums = tuple[bool, float, float]
"""Of what this rank counts of a tensor: whether tensor-parallel ranks share it; sum of squares, and of the values."""


def gradients(arguments: list[str], fault: str = "") -> dict[str, Any]:
    """Train a step. fault: `unmarked`, `no sum over norms` or `no sum over stages` is put into the model on all ranks.

    Returns:
        `norm`, the global norm that clipping goes by; `place`, tensor and pipeline rank; `tensors`, by the name of the whole
        tensor, `Sums` of the part of its gradient that this rank's optimizer updates; `copies`, ranks that update the same;
        `modules`, the classes of megatron-core that the model is made of.
    """
    from megatron.core import parallel_state

    from megatron_synth.cli import main as cli
    from megatron_synth.model.architecture import LAYERS
    from megatron_synth.parallel.average import places
    from megatron_synth.train.step import Stepper

    found: dict[str, Any] = {}
    agree, init = Stepper._agree, Stepper.__init__

    def initialized(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        for chunk in self.chunks:
            for name, parameter in chunk.module.named_parameters():
                if fault == "no sum over norms" and "layernorm" in name:
                    parameter.sequence_parallel = False
            if fault == "no sum over norms":
                chunk.config.qk_layernorm = False
        if fault == "no sum over stages":
            import sys

            module: Any = sys.modules["megatron.core.distributed.finalize_model_grads"]  # the package names a function so
            module._allreduce_word_embedding_grads = lambda *args, **kwargs: None

    def agreed(self: Any, *args: Any) -> Any:
        if fault == "unmarked":
            for part in self.optimizer.chained_optimizers:
                for parameter in part.get_parameters():
                    parameter.tensor_model_parallel = False
        result = agree(self, *args)
        names = {}
        for chunk in self.chunks:
            for name, parameter in chunk.module.named_parameters():
                words = name.removeprefix(LAYERS).split(".")
                if name.startswith(LAYERS):
                    words[0] = str(chunk.module.decoder.layers[int(words[0])].layer_number - 1)
                names[parameter] = ".".join(words)
        tensors: dict[str, Sums] = {}
        for inner in self.optimizer.chained_optimizers:
            for parameter, _, _, weights in places(inner):
                values = weights.grad.double()
                shared = getattr(parameter, "tensor_model_parallel", False)
                tensors[names[parameter]] = (shared, float(values.square().sum()), float(values.sum()))
        found.update(
            norm=result[0],
            place=(parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()),
            tensors=tensors,
            copies=self.gradient_copies,
            modules=sorted(
                {
                    type(module).__name__
                    for chunk in self.chunks
                    for module in chunk.module.modules()
                    if type(module).__module__.startswith("megatron.core")
                }
            ),
        )
        return result

    Stepper.__init__ = initialized  # type: ignore[method-assign]
    Stepper._agree = agreed  # type: ignore[method-assign]
    assert cli.main(arguments) == 0
    return found
