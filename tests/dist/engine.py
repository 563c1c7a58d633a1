"""Imported once by the fork server: torch, megatron-core and the trainer, so that a worker starts with them in place."""

import gc
import warnings

from megatron_synth.parallel import engine

engine.load()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron_synth.train.checkpoint.resume
    import megatron_synth.train.evaluate
    import megatron_synth.train.loop
    import megatron_synth.cli.train
    import megatron_synth.train.step  # noqa: F401

gc.collect()
gc.freeze()  # what is shared with the workers stays shared
