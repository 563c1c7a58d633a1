"""Imported once by the fork server: torch, megatron-core and the trainer, so that a worker starts with them in place."""

import gc
import warnings

from megatron_synth.parallel import cpu

cpu.prepare()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron_synth.train.checkpoint.resume
    import megatron_synth.train.evaluate
    import megatron_synth.train.loop
    import megatron_synth.cli.train
    import megatron_synth.train.step  # noqa: F401
    from megatron_synth.parallel.groups import import_engine

    import_engine()

gc.collect()
gc.freeze()  # what is shared with the workers stays shared
