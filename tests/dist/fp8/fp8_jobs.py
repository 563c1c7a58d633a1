"""One FP8 linear layer on tensor-parallel ranks, for tests that compare it with the whole layer on one rank."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

S, B, K, N = 64, 4, 256, 512


def layer(kind: str, recipe: str, number_format: str, sequence_parallel: bool) -> dict[str, np.ndarray]:
    """Forward and backward of two steps of two micro-batches each, from the same numbers whatever the layout.

    Returns:
        This rank's part of the last output [S, B, N], the last input's gradient [S, B, K] and the summed weight gradient [N, K].
    """
    import torch
    from torch import Tensor

    from megatron_synth.config.schema import Config
    from megatron_synth.model.run_plan import decide
    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import plan

    size = int(os.environ.get("WORLD_SIZE", 1))
    config = Config(
        model={"num_layers": 1, "hidden_size": K, "ffn_hidden_size": 256, "num_attention_heads": 2, "vocab_size": 256},
        data={"sources": {"none": {"path": "none", "ratio": 1}}},
        train={"steps": 1, "global_batch_size": B, "micro_batch_size": B, "sequence_length": S},
        parallel={"tensor_model_parallel_size": size, "sequence_parallel": sequence_parallel and size > 1},
        precision={"dtype": "fp32", "fp8": recipe, "fp8_format": number_format},
    )  # type: ignore[arg-type]
    layout = plan(config, size)
    decided = decide(config, layout)
    with process_group(layout, 0) as ranks:
        from megatron_synth.model.build import transformer_config
        from megatron_synth.model.fp8.recipe import Fp8Run, Recipe
        from megatron_synth.model.fp8.linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear

        mcore = transformer_config(decided)
        run = Fp8Run(Recipe.of(config.precision), ranks.device)
        options: Any = {"config": mcore, "init_method": None, "bias": False, "skip_bias_add": False, "fp8": run, "name": "x"}
        column = kind == "column"
        if column:
            module: Any = Fp8ColumnParallelLinear(K, N, gather_output=False, **options)
        else:
            module = Fp8RowParallelLinear(K, N, input_is_parallel=True, **options)
        run.seal()
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(N, K, generator=generator)
        part = lambda x, axis: x.tensor_split(size, dim=axis)[ranks.tensor_rank].contiguous()  # noqa: E731
        split_sequence = config.parallel.uses_sequence_parallel
        module.weight.data.copy_(part(weight, 0 if column else 1))
        module.weight.main_grad = torch.zeros_like(module.weight)
        result: dict[str, Tensor] = {}
        for _ in range(2):
            for _ in range(2):
                x = torch.randn(S, B, K, generator=generator) * torch.exp(torch.randn(S, B, 1, generator=generator))
                dy = torch.randn(S, B, N, generator=generator) * 1e-4
                if column:
                    x, dy = part(x, 0) if split_sequence else x, part(dy, 2)
                else:
                    x, dy = part(x, 2), part(dy, 0) if split_sequence else dy
                x.requires_grad_()
                y, _ = module(x)
                y.backward(dy)
                result = {"y": y.detach(), "dx": x.grad}  # type: ignore[dict-item]
            run.end_step(skipped=False)
            module.weight.data.mul_(1.5)
        result["dw"] = module.weight.main_grad
        return {name: value.numpy().copy() for name, value in result.items()}


def contract() -> None:
    """What a layer promises to the engine, asserted one by one, on one rank."""
    import torch

    from megatron_synth.config.schema import Config
    from megatron_synth.model.run_plan import decide
    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import plan

    config = Config(
        model={"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 2, "vocab_size": 256},
        data={"sources": {"none": {"path": "none", "ratio": 1}}},
        train={"steps": 1, "global_batch_size": 1, "sequence_length": 32},
        precision={"dtype": "fp32", "fp8": "delayed", "fp8_amax_history_len": 2},
    )  # type: ignore[arg-type]
    layout = plan(config, 1)
    decided = decide(config, layout)
    with process_group(layout, 0) as ranks:
        from megatron_synth.model.build import transformer_config
        from megatron_synth.model.fp8.recipe import GRAD, INPUT, WEIGHT, Fp8Run, Recipe
        from megatron_synth.model.fp8.linear import Fp8ColumnParallelLinear

        torch.manual_seed(0)
        run = Fp8Run(Recipe.of(config.precision), ranks.device)
        quantized: list[str] = []
        module: Any = Fp8ColumnParallelLinear(
            64, 48, config=transformer_config(decided), init_method=None, bias=False, fp8=run, name="layers.0.x"
        )
        run.seal()
        layer, weight = module.fp8, module.weight
        original = layer.quantize
        layer.quantize = lambda role, x, **options: (quantized.append(role), original(role, x, **options))[1]
        torch.nn.init.normal_(weight)
        weight.main_grad = torch.zeros_like(weight)
        weight.grad_added_to_main_grad = False

        def step(*sizes: float, skipped: bool = False) -> None:
            for size in sizes:
                x = torch.full((32, 1, 64), size, requires_grad=True)
                module(x)[0].backward(torch.full((32, 1, 48), 2 * size))
            run.end_step(skipped)

        # weights are quantized once per optimizer step, and again when they were changed otherwise
        step(1.0, 3.0, 2.0)
        assert quantized.count(WEIGHT) == 1 and quantized.count(INPUT) == quantized.count(GRAD) == 3
        before = module(torch.ones(32, 1, 64))[0]
        with torch.no_grad():
            weight.mul_(0.5)
        after = module(torch.ones(32, 1, 64))[0]
        assert quantized.count(WEIGHT) == 3 and torch.allclose(after, before / 2, rtol=0.02, atol=0.02)

        # the history holds the largest of a step's micro-batches, for its length, and no evaluation or skipped step
        assert run.history[0, 0].tolist() == [3.0, 0.0] and run.history[0, 2].tolist() == [6.0, 0.0]
        run.amax.zero_()
        with torch.no_grad():
            module(torch.full((32, 1, 64), 99.0))
        step(50.0, skipped=True)
        step(float("inf"), skipped=True)
        assert run.updates == 1 and run.history[0, 0].tolist() == [3.0, 0.0] and not run.amax.any()
        step(1.0)
        assert run.history[0, 0].tolist() == [3.0, 1.0] and abs(run.scale[0, 0] * 3 - 448) < 1e-3
        step(1.0)
        assert run.history[0, 0].tolist() == [1.0, 1.0] and run.scale[0, 0] == 448 and run.scale[0, 2] == 57344 / 2
        assert run.history[0, 1].tolist() == [weight.abs().max().item()] * 2, "a cached weight is in every step's history"

        # gradients are added to fp32 main_grad, and autograd gets something to run its hooks with
        weight.grad, weight.grad_added_to_main_grad = None, False
        weight.main_grad.zero_()
        x = torch.randn(32, 1, 64, requires_grad=True)
        module(x)[0].backward(torch.randn(32, 1, 48))
        once = weight.main_grad.clone()
        assert weight.grad_added_to_main_grad and weight.grad is not None and once.any()
        gradient = torch.randn(32, 1, 48)
        weight.main_grad.zero_()
        for _ in range(3):
            module(x)[0].backward(gradient)
        thrice = weight.main_grad.clone()
        del weight.main_grad, weight.grad_added_to_main_grad
        weight.grad = None
        module(x)[0].backward(gradient)
        assert torch.allclose(thrice, 3 * weight.grad, rtol=1e-5)

        # the forward pass keeps one byte per number of its input
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t):
            module(torch.randn(32, 1, 64, requires_grad=True))
        assert sorted(kept) == sorted([32 * 64, 4, weight.nbytes])

        # a frozen weight has no gradient; what is not finite stays so
        weight.requires_grad_(False)
        weight.grad = x.grad = None
        module(x)[0].backward(gradient)
        assert weight.grad is None and x.grad is not None and x.grad.isfinite().all()
        weight.requires_grad_(True)
        gradient[3, 0, 5] = torch.nan
        module(x)[0].backward(gradient)
        assert not torch.isfinite(weight.grad).any() and not x.grad.isfinite().any()
        bad = torch.ones(32, 1, 64)
        bad[0, 0, 0] = torch.inf
        assert torch.isnan(module(bad)[0]).all()


def train_without_products(arguments: list[str]) -> int:
    """Train where torch cannot multiply tensorwise-scaled FP8."""
    from megatron_synth.cli import main as cli
    from megatron_synth_kernels.torch import fp8

    real = fp8.product

    def refuse(a: fp8.Quantized, *args: Any, **kwargs: Any) -> Any:
        if a.block is None:
            raise RuntimeError("torch._scaled_mm is only supported on devices that this is not")
        return real(a, *args, **kwargs)

    fp8.product = refuse
    return cli.main(arguments)
