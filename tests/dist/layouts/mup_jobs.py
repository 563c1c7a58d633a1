"""A job of test_mup.py that looks inside the engine."""

from __future__ import annotations

from typing import Any


def weights_and_groups(config_path: str, settings: list[str]) -> tuple[dict[str, Any], list[tuple[float, float, int]]]:
    """Initial weights by name; factors of the rate and of the decay, and the number of parameters, of each group."""
    import torch

    from megatron_synth.config.load import load_file
    from megatron_synth.config.schema import Config
    from megatron_synth.data.loading.run_data import open_data
    from megatron_synth.model.run_plan import decide
    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import plan

    config = load_file(Config, config_path, [*settings, "parallel.use_distributed_optimizer=false"])
    vocab_size = open_data(config).vocab_size
    layout = plan(config, 1)
    decided = decide(config, layout)
    with process_group(layout, config.train.seed):
        from megatron_synth.model.build import build_model
        from megatron_synth.parallel.wrap import build_optimizer, wrap_ddp

        chunks = wrap_ddp(build_model(decided, vocab_size), config)
        optimizer = build_optimizer(chunks, config)
        state = chunks[0].module.state_dict()
        weights = {name: value.numpy().copy() for name, value in state.items() if isinstance(value, torch.Tensor)}
        groups = [(group["lr_mult"], group["wd_mult"], len(group["params"])) for group in optimizer.param_groups]
        return weights, groups
