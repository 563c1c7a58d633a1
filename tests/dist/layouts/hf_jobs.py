"""Jobs of test_huggingface.py that look inside the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch


def export_initial(config_path: str, settings: list[str], folder: str) -> None:
    """Write the untrained model of a configuration as a Hugging Face folder."""
    from megatron_synth.config.load import load_file
    from megatron_synth.config.schema import Config
    from megatron_synth.data.loading.run_data import open_data
    from megatron_synth.interop.hf_folder import write_hf
    from megatron_synth.interop.hf_settings import hf_config
    from megatron_synth.interop.hf_weights import to_hf_state
    from megatron_synth.model.run_plan import decide
    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import plan

    config = load_file(Config, config_path, settings)
    vocab_size = open_data(config).vocab_size
    layout = plan(config, 1)
    decided = decide(config, layout)
    with process_group(layout, config.train.seed):
        from megatron_synth.model.build import build_model

        (model,) = build_model(decided, vocab_size)
        state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        settings_json = hf_config(config.model, vocab_size, config.train.sequence_length, "fp32")
        write_hf(Path(folder), to_hf_state(state, config.model, vocab_size), settings_json)


def logits(run: str, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, S, V'] of the newest checkpoint of a run, by the engine in one process."""
    from megatron_synth.config.load import load_file
    from megatron_synth.config.schema import Config
    from megatron_synth.model.run_plan import decide
    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import plan
    from megatron_synth.cli.eval import _ONE_RANK_PER_COPY

    config = load_file(Config, Path(run) / "config.yaml", _ONE_RANK_PER_COPY)
    layout = plan(config, 1)
    decided = decide(config, layout)
    with process_group(layout, 0):
        from megatron_synth.model.build import build_model
        from megatron_synth.parallel.wrap import wrap_ddp
        from megatron_synth.train.checkpoint import resume

        found = resume.newest_sound(Path(run), "checksums")
        assert found is not None
        chunks = wrap_ddp(build_model(decided, resume.read_trainer(found).vocab_size), config)
        resume.load(found, chunks, None)
        inputs = torch.from_numpy(tokens)
        with torch.no_grad():
            result: np.ndarray = chunks[0](inputs, torch.arange(inputs.shape[1]).expand_as(inputs), None).numpy()
        return result
