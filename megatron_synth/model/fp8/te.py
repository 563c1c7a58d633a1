"""FP8 by TransformerEngine's linear layers: whether they are available, a trial by numbers, and what is watched of them.

TransformerEngine quantizes inside its own products and shows no tensor of it. `watch` puts hooks round its layers that see what
goes in: the input and the weight after the forward pass, the gradient of the output before the backward one. With delayed
scaling the scale is read from the layer's quantizer, which holds the one in use until its autocast ends; else it is what the
recipe defines, from the tensor, its largest magnitude reduced over the ranks that the quantizer names. The numbers are then
quantized once more, by definition, to count what is lost.

This rests on TransformerEngine 2.11: pytorch/module/linear.py, `_get_quantizers` (`quantizers[...]` and the order of tensors in
them) and `_customize_quantizers_float8_current_scaling` (`with_amax_reduction`), pytorch/distributed.py,
`in_fp8_activation_recompute_phase`, and the attributes `_scale_inv` and `_rowwise_scale_inv` of its quantized tensors.
TransformerEngine's own statistics (transformer_engine.debug) need one more package and refuse weights in FP8.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import Config
from megatron_synth.model import ops
from megatron_synth.model.fp8.recipe import GRAD, INPUT, WEIGHT, Recipe
from megatron_synth.model.fp8.statistics import Statistics
from megatron_synth.model.ops import Quantized, Scaling
from megatron_synth.model.spec import Linears
from megatron_synth.parallel import fp8_params

_PLACES = {INPUT: ("scaling_fwd", 0), WEIGHT: ("scaling_fwd", 1), GRAD: ("scaling_bwd", 0)}
"""Of a tensor's quantizer in a layer: GEMM1_INPUT and GEMM1_WEIGHT of FP8FwdTensors, GRAD_OUTPUT1 of FP8BwdTensors."""
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def problem(device: torch.device) -> str | None:
    """Why TransformerEngine's layers cannot be used; None if they can."""
    if device.type != "cuda":
        return "TransformerEngine needs a GPU"
    try:
        import transformer_engine
        import transformer_engine.pytorch
    except Exception as error:  # a library built for another torch fails in its own way
        return f"TransformerEngine cannot be imported: {(str(error) or repr(error)).splitlines()[0]}"
    release = tuple(int(part) for part in str(transformer_engine.__version__).split(".")[:2])
    if not (2, 9) <= release < (2, 12):
        return (
            f"TransformerEngine {transformer_engine.__version__} is not among 2.9 to 2.11, those that megatron-core 0.16 takes"
        )
    return None


def linears() -> Linears:
    """What makes the linear layers of a transformer layer."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return Linears(TEColumnParallelLinear, TERowParallelLinear, TEColumnParallelLinear, TERowParallelLinear)


def check(config: Config, device: torch.device, device_name: str) -> None:
    """Run a linear layer of TransformerEngine in the recipe, forward and backward, against fp32.

    Raises:
        UserError: it fails, or its numbers are not those of FP8.
    """
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    precision = config.precision
    number_format = recipes.Format.HYBRID if precision.fp8_number_format == "hybrid" else recipes.Format.E4M3
    make = {
        "delayed": partial(recipes.DelayedScaling, amax_history_len=1, reduce_amax=False),
        "current": recipes.Float8CurrentScaling,
        "blockwise": recipes.Float8BlockScaling,
    }[precision.fp8]
    what = " with its weights in FP8" if precision.fp8_param_gather else ""
    head = f"precision.fp8: {precision.fp8} ({precision.fp8_number_format}) by TransformerEngine{what} on {device_name}"
    try:
        generator = torch.Generator().manual_seed(0)
        in_fp8 = {"enabled": precision.fp8_param_gather, "preserve_high_precision_init_val": precision.fp8_param_gather}
        with te.fp8_model_init(recipe=make(fp8_format=number_format), **in_fp8):
            layer = te.Linear(256, 128, bias=False, params_dtype=torch.bfloat16, device=device)
        weight = (torch.randn(128, 256, generator=generator) / 16).to(device, torch.bfloat16)
        x = torch.randn(128, 256, generator=generator).to(device, torch.bfloat16).requires_grad_()
        grad = torch.randn(128, 128, generator=generator).to(device, torch.bfloat16)
        for _ in range(2):  # delayed scaling knows its scales from the second pass on
            if precision.fp8_param_gather:
                fp8_params.fill(layer.weight, weight)
            else:
                with torch.no_grad():
                    layer.weight.copy_(weight)
            layer.weight.grad = x.grad = None
            with te.fp8_autocast(enabled=True, fp8_recipe=make(fp8_format=number_format)):
                y = layer(x)
            y.backward(grad)
        if fp8_params.is_quantized(layer.weight) is not precision.fp8_param_gather:
            raise RuntimeError(f"the weight is a {type(layer.weight).__name__}")
    except Exception as error:  # whatever it raises, the run cannot have what it asked for
        advice = "precision.fp8_param_gather: false" if precision.fp8_param_gather else "precision.fp8_backend: own"
        raise UserError(f"{head} is unavailable: {(str(error) or repr(error)).splitlines()[0]}. Try {advice}") from error
    exact = (x.float() @ weight.float().t(), grad.float() @ weight.float(), grad.float().t() @ x.float())
    for name, found, wanted in zip(
        ("output", "input gradient", "weight gradient"), (y, x.grad, layer.weight.grad), exact, strict=True
    ):
        error_share = ((found.float() - wanted).norm() / wanted.norm()).item()
        # FP8 itself is off by 3 to 6 %; bf16 would be off by 0.3 %, and FP8 is then not what ran
        if not 0.008 < error_share < 0.15:
            raise UserError(
                f"{head}: the {name} of a trial layer is off by {error_share:.2%}, which FP8 is not: do not trust it"
            )


# ---- what is watched


def watch(layers: Iterable[tuple[int, nn.Module]], recipe: Recipe, statistics: Statistics) -> None:
    """Let `statistics` see the tensors of TransformerEngine's linear layers.

    Args:
        layers: transformer layers in FP8, with their numbers in the whole model, from 0.
        recipe: of the run.
        statistics: what is to see them, in steps that it observes. Other steps cost a call per layer.
    """
    for number, layer in layers:
        for name in LINEARS:
            watched = _Watched(f"layers.{number}.{name}", recipe, statistics)
            layer.get_submodule(name).register_forward_hook(watched.after_forward)


class _Watched:
    """One linear layer."""

    def __init__(self, name: str, recipe: Recipe, statistics: Statistics):
        self._name, self._recipe, self._statistics = name, recipe, statistics

    def after_forward(self, module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> None:
        """A forward hook: input and weight, unless they are computed a second time, and a hook on the output's gradient."""
        if not self._statistics.observing:
            return
        if not _recomputing():
            self._add(module, INPUT, args[0])
            if not self._statistics.has(self._name, WEIGHT):  # quantized once for all micro-batches
                self._add_weight(module)
        if output[0].requires_grad:
            output[0].register_hook(partial(self._before_backward, module))

    def _before_backward(self, module: nn.Module, grad: Tensor) -> None:
        self._add(module, GRAD, grad)

    @torch.no_grad()
    def _add_weight(self, module: Any) -> None:
        weight = module.weight
        if not fp8_params.is_quantized(weight):
            self._add(module, WEIGHT, weight)
            return
        if self._recipe.tensorwise:
            inverse = weight._scale_inv
        else:  # of 128 x 128 blocks; beyond them, padding
            rows, columns = (-(-size // ops.fp8.BLOCK) for size in weight.shape)
            inverse = weight._rowwise_scale_inv[:rows, :columns]
        amax = weight.dequantize().abs().max()
        self._statistics.add_quantized(self._name, WEIGHT, amax, 1.0 / inverse.max().double())

    @torch.no_grad()
    def _add(self, module: Any, role: str, x: Tensor) -> None:
        group, place = _PLACES[role]
        quantizer = module.quantizers[group][place]
        matrix = x.detach().reshape(-1, x.shape[-1]).contiguous()
        if self._recipe.tensorwise:
            quantized = self._tensorwise(quantizer, role, matrix)
        else:
            block = ops.fp8.BLOCK
            # a rank's part of a sequence need not be of whole blocks; rows of zeros count for nothing
            matrix = F.pad(matrix, (0, 0, 0, -matrix.shape[0] % block))
            blocks = ops.fp8.quantize_128x128 if role == WEIGHT else ops.fp8.quantize_1x128
            in_blocks, _ = blocks(matrix, self._recipe.format(role), transposed=False)
            assert in_blocks is not None
            quantized = in_blocks
        self._statistics.add(self._name, role, matrix, quantized)

    def _tensorwise(self, quantizer: Any, role: str, matrix: Tensor) -> Quantized:
        inverse = torch.zeros((), dtype=torch.float32, device=matrix.device)
        if self._recipe.scaling == "delayed":
            scaling = Scaling(inverse, scale=quantizer.scale.detach().reshape(()).clone())
        else:
            amax = ops.fp8.amax_of(matrix)
            if quantizer.with_amax_reduction:
                torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group)
            scaling = Scaling(inverse, amax=amax, margin=self._recipe.margin)
        data, _ = ops.fp8.quantize_tensorwise(matrix, scaling, self._recipe.format(role), transposed=False)
        assert data is not None
        return Quantized(data, inverse)


def _recomputing() -> bool:
    from transformer_engine.pytorch.distributed import in_fp8_activation_recompute_phase

    return bool(in_fp8_activation_recompute_phase())
