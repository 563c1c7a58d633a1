"""Jobs of test_documents.py that look inside the engine."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import numpy as np
import torch


def logits(config_path: str, settings: list[str], rows: list[tuple[list[list[int]], list[int]]]) -> list[np.ndarray]:
    """This rank's part of the untrained model's logits [B, S, V / TP], by any pipeline; empty but on the last stage.

    Where ranks share the sequence: zeros for the tokens of the others.

    rows: micro-batches, each of token rows and of the places at which documents begin, with the end (cu_seqlens).
    """
    from megatron_synth.config.load import load_file
    from megatron_synth.config.schema import Config
    from megatron_synth.data.loading.boundaries import Boundaries
    from megatron_synth.data.loading.loader import Batch
    from megatron_synth.model.run_plan import decide
    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import plan
    from tests.support import VOCAB_SIZE

    config = load_file(Config, config_path, settings)
    layout = plan(config, int(os.environ.get("WORLD_SIZE", 1)))
    decided = decide(config, layout)
    with process_group(layout, config.train.seed) as ranks:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from megatron_synth.model.build import build_model
        from megatron_synth.train.batch import part_of, to_device

        batches = []
        for tokens, cu_seqlens in rows:
            array = np.array([[*row, 0] for row in tokens])
            size, length = array.shape
            bounds = Boundaries(size, length - 1, np.array(cu_seqlens, np.int32), np.zeros(0, np.int64))
            zeros = np.zeros(size, np.int64)
            batches.append(to_device(Batch(array, zeros, zeros, bounds), ranks.device, config.data, part=part_of(ranks, config)))
        found: list[np.ndarray] = []

        def keep(output: torch.Tensor) -> tuple[torch.Tensor, int]:
            found.append(part_of(ranks, config).put(output).numpy().copy())
            return torch.zeros(()), 0

        def step(iterator: Any, model: Any) -> Any:
            batch = next(iterator)
            return model(batch.inputs, None, None, packed_seq_params=batch.documents), keep

        chunks = build_model(decided, VOCAB_SIZE)
        iterators = [iter(batches) for _ in chunks]
        run = partial(
            get_forward_backward_func(),
            forward_step_func=step,
            num_microbatches=len(batches),
            micro_batch_size=len(rows[0][0]),
            seq_length=len(rows[0][0][0]),
            forward_only=True,
        )
        with torch.no_grad():
            if len(chunks) > 1:
                run(data_iterator=iterators, model=chunks)
            else:
                run(data_iterator=iterators[0], model=chunks[0])
        return found
