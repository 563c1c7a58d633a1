"""FP8 as it was asked for, or an error: whose layers, which of them, and a product of each kind tried before training.

megatron-core without TransformerEngine takes `config.fp8` and trains in bf16. Here nothing is taken on trust: every kind of
product is run on the device and held against the definition before the model is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_synth.config.errors import UserError
from megatron_synth.config.rules import check
from megatron_synth.config.schema import Config
from megatron_synth.model import ops
from megatron_synth.model.architecture import products
from megatron_synth.model.fp8 import te
from megatron_synth.model.fp8.linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megatron_synth.model.fp8.recipe import GRAD, INPUT, WEIGHT, Fp8Run, Recipe
from megatron_synth.model.fp8.statistics import Statistics
from megatron_synth.model.ops import Quantized, Scaling
from megatron_synth.model.spec import Linears
from megatron_synth.parallel.fp8_params import RECIPES as MCORE_RECIPES

RECIPES = ("delayed", "current", "blockwise")
_TOLERANCE = (
    0.02  # relative, in the Frobenius norm: bf16 results and fast accumulation; a wrong scale or order gives 0.5 and more
)
_LARGEST_TRIAL = 512  # rows and columns of the products that are tried


@dataclass(frozen=True)
class Fp8Plan:
    """FP8 of a run, checked."""

    backend: str
    """te or own."""
    reason: str
    """Why that backend."""
    layers: range
    """Numbers of the transformer layers in FP8, from 0."""
    config: Config
    device: torch.device

    @property
    def fused(self) -> bool:
        """Whether RMSNorm and SwiGLU are quantized while they are made."""
        return self.backend == "own" and self.config.precision.fp8_fused

    def start(self) -> Fp8Run | None:
        """The shared state of our layers; None with TransformerEngine's."""
        if self.backend == "te":
            return None
        return Fp8Run(Recipe.of(self.config.precision), self.device)

    def watched(self, run: Fp8Run | None, chunks: Sequence[Any]) -> Statistics:
        """What sees the tensors of the chunks' FP8 layers, in steps that it observes."""
        if run is not None:
            return run.statistics
        statistics = Statistics()
        if self.config.precision.fp8_log_every is not None:
            layers = [(layer.layer_number - 1, layer) for chunk in chunks for layer in chunk.decoder.layers]
            te.watch([(n, layer) for n, layer in layers if n in self.layers], Recipe.of(self.config.precision), statistics)
        return statistics

    def linears(self, run: Fp8Run | None, layer: int) -> Linears:
        """What makes the linear layers of a transformer layer."""
        if self.backend == "te":
            return te.linears()
        if layer not in self.layers:
            return Linears()
        assert run is not None

        def of(kind: type[ColumnParallelLinear] | type[RowParallelLinear], name: str) -> ModuleSpec:
            return ModuleSpec(module=kind, params={"fp8": run, "name": f"layers.{layer}.{name}"})

        return Linears(
            of(Fp8ColumnParallelLinear, "self_attention.linear_qkv"),
            of(Fp8RowParallelLinear, "self_attention.linear_proj"),
            of(Fp8ColumnParallelLinear, "mlp.linear_fc1"),
            of(Fp8RowParallelLinear, "mlp.linear_fc2"),
        )

    def describe(self) -> str:
        """Which layers run in which format, as one line."""
        precision = self.config.precision
        formats = "e4m3, gradients e5m2" if precision.fp8_number_format == "hybrid" else "e4m3"
        how = f"{precision.fp8} scaling, {formats}, {self._by()}"
        first, last = self.layers[0], self.layers[-1]
        where = f"layers {first} to {last}" if first != last else f"layer {first}"
        rest = ["embedding", "norms", "attention", "output layer"]
        ends = precision.fp8_bf16_ends
        if ends:
            rest.append(f"the first and last {ends} layers" if ends > 1 else "the first and the last layer")
        return f"fp8 {how}: linear_qkv, linear_proj, linear_fc1, linear_fc2 of {where}; {precision.dtype}: {', '.join(rest)}"

    def _by(self) -> str:
        if self.backend == "te":
            kept = ", weights kept and gathered in FP8" if self.config.precision.fp8_param_gather else ""
            return f"TransformerEngine ({self.reason}){kept}"
        if ops.fp8.is_emulated(self.device):
            how = "products EMULATED on the CPU: dequantized operands, summed in fp32"
        else:
            how = "products by torch's scaled_mm"
        blocks_cross = self.config.precision.fp8 == "blockwise" and self.config.parallel.uses_sequence_parallel
        made = "quantized in SwiGLU" if blocks_cross else "quantized in RMSNorm and SwiGLU"
        return f"own layers ({self.reason}), {made if self.fused else 'quantized apart'}, {how}"

    def mcore_options(self) -> dict[str, Any]:
        """What megatron-core's TransformerConfig is given: nothing for our layers, all for TransformerEngine's."""
        if self.backend == "own":
            return {}
        precision = self.config.precision
        ends = precision.fp8_bf16_ends
        return {
            "fp8": precision.fp8_number_format,
            "fp8_recipe": MCORE_RECIPES[precision.fp8],
            "fp8_param": precision.fp8_param_gather,
            "fp8_margin": precision.fp8_margin,
            "fp8_amax_history_len": precision.fp8_amax_history_len,
            "fp8_amax_compute_algo": "max",
            "first_last_layers_bf16": ends > 0,
            "num_layers_at_start_in_bf16": ends,
            "num_layers_at_end_in_bf16": ends,
        }


def plan_fp8(config: Config, device: torch.device) -> Fp8Plan | None:
    """How a run's FP8 will be done on this device, with the kernels that are active; None if it has none.

    Raises:
        UserError: this device, torch or TransformerEngine cannot do what was asked for; the message says what they can.
    """
    precision = config.precision
    if precision.fp8 == "off":
        return None
    dtype = torch.bfloat16 if precision.dtype == "bf16" else torch.float32
    backend, reason = _backend(config, device)
    if backend == "te":
        te.check(config, device, _device_name(device))
    else:
        _check_own(config, device, dtype)
    ends = precision.fp8_bf16_ends
    return Fp8Plan(backend, reason, range(ends, config.model.num_layers - ends), config, device)


def _backend(config: Config, device: torch.device) -> tuple[str, str]:
    asked = config.precision.fp8_backend
    problem = te.problem(device)
    if problem is not None and config.precision.fp8_param_gather:
        raise UserError(
            f"precision.fp8_param_gather: true needs TransformerEngine's layers, but {problem}. Set it to false; checkpoints "
            "are read with and without it"
        )
    if asked == "te":
        if problem is not None:
            raise UserError(f"precision.fp8_backend: te: {problem}. Install it (`pip install megatron-synth[gpu]`), or set own")
        return "te", "forced by precision.fp8_backend"
    if asked == "own":
        return "own", "forced by precision.fp8_backend"
    if problem is None:
        # what TransformerEngine's layers cannot do is no reason to refuse a run that ours can do
        for unable, why in (
            (config.precision.dtype != "bf16", "precision.dtype is not bf16"),
            (config.precision.fp8 == "delayed" and config.precision.fp8_bf16_ends > 0, "delayed scaling with layers left out"),
        ):
            if unable:
                return "own", f"not TransformerEngine: {why}"
        return "te", "importable"
    return "own", problem


# ---- our layers


def _check_own(config: Config, device: torch.device, dtype: torch.dtype) -> None:
    precision = config.precision
    asked = refusal(config, device, dtype)
    if asked is None:
        return
    able = []
    for name, number_format in product(RECIPES, ("hybrid", "e4m3")):
        other = precision.model_copy(update={"fp8": name, "fp8_format": number_format})
        other_config = config.model_copy(update={"precision": other})
        if not check(other_config) and refusal(other_config, device, dtype) is None:
            able.append(f"{name} ({number_format})")
    what = f"on {_device_name(device)} with torch {torch.__version__}"
    advice = f"what works here: {', '.join(able)}" if able else "no FP8 recipe works here; set precision.fp8: off"
    raise UserError(f"precision.fp8: {precision.fp8} ({precision.fp8_number_format}) is unavailable {what}: {asked}. {advice}")


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return "this CPU"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def refusal(config: Config, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the products of a recipe are unavailable; None if each kind of layer was tried and agrees with the definition."""
    recipe = Recipe.of(config.precision)
    for kind, (n, k) in products(config.model, config.parallel.tensor_model_parallel_size).items():
        generator = torch.Generator().manual_seed(0)
        n, k, tokens = min(n, _LARGEST_TRIAL), min(k, _LARGEST_TRIAL), 128
        shapes = {INPUT: (tokens, k), WEIGHT: (n, k), GRAD: (tokens, n)}
        tensors = {role: torch.randn(shape, generator=generator).to(device, dtype) for role, shape in shapes.items()}
        try:
            problem = _disagreement(recipe, tensors, device, dtype)
        except (RuntimeError, ValueError, NotImplementedError, AttributeError, ImportError) as error:
            text = str(error).strip() or repr(error)
            problem = text.splitlines()[0]
        if problem is not None:
            return f"{kind} [{n}, {k}]: {problem}"
    return None


def _disagreement(recipe: Recipe, tensors: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> str | None:
    """The three products of a layer, by the device's quantizers and units and by the definition on the CPU."""
    quantizer = ops.quantizer()
    device_pairs = {role: _quantized(recipe, role, x, quantizer) for role, x in tensors.items()}
    host_pairs = {role: _quantized(recipe, role, x.cpu(), ops.fp8) for role, x in tensors.items()}
    trials = {
        "the forward product": (INPUT, 0, WEIGHT, 0, dtype, recipe.tensorwise),
        "the product of the input's gradient": (GRAD, 0, WEIGHT, 1, dtype, False),
        "the product of the weight's gradient": (GRAD, 1, INPUT, 1, torch.float32, False),
    }
    for name, (left, i, right, j, out_dtype, fast) in trials.items():
        found = ops.fp8.product(device_pairs[left][i], device_pairs[right][j], out_dtype, fast_accumulation=fast)
        expected = host_pairs[left][i].dequantized().double() @ host_pairs[right][j].dequantized().double().t()
        error = ((found.double().cpu() - expected).norm() / expected.norm()).item()
        if not error <= _TOLERANCE:
            return f"{name} is off by {error:.1%} of the definition"
    return None


def _quantized(recipe: Recipe, role: str, x: torch.Tensor, quantizer: Any) -> tuple[Quantized, Quantized]:
    dtype = recipe.format(role)
    if not recipe.tensorwise:
        row, transposed = (quantizer.quantize_128x128 if role == WEIGHT else quantizer.quantize_1x128)(x, dtype)
    else:
        amax = quantizer.amax_of(x)
        inverse = torch.zeros_like(amax)
        data, other = quantizer.quantize_tensorwise(x, Scaling(inverse, amax=amax, margin=recipe.margin), dtype)
        row, transposed = Quantized(data, inverse), Quantized(other, inverse)
    return row, transposed
