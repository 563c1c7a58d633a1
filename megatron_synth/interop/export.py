"""A run as a folder in Hugging Face's format."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megatron_synth.config.errors import UserError


class Exported(NamedTuple):
    """What was written: from which checkpoint, at which step, how many parameters, and a tokenizer that is gone, if one is."""

    checkpoint: Path
    step: int
    parameters: int
    lost_tokenizer: str | None


def newest_checkpoint(run: Path) -> Path:
    """The newest sound checkpoint of a run directory, or the checkpoint that `run` is.

    Raises:
        UserError: there is none.
    """
    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import Layout

    with process_group(Layout.single(), seed=0):
        return _newest(run)


def _newest(run: Path) -> Path:
    from megatron_synth.train.checkpoint import resume

    found = resume.newest_sound(run, "checksums")
    if found is None:
        raise UserError(f"{run}: expected a run directory or a checkpoint, found no whole checkpoint")
    return found


def export_to_hf(run: Path, folder: Path) -> Exported:
    """Write a folder for `AutoModelForCausalLM`, whole or not at all, from a checkpoint of any layout.

    Raises:
        UserError: there is no sound checkpoint, or the folder holds something.
    """
    from megatron_synth.interop.hf_folder import write_hf
    from megatron_synth.interop.hf_settings import hf_config
    from megatron_synth.interop.hf_weights import to_hf_state
    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import Layout
    from megatron_synth.train.checkpoint import companions

    with process_group(Layout.single(), seed=0):
        from megatron_synth.train.checkpoint import resume

        found = _newest(run)
        saved = resume.read_trainer(found)
        model = resume.saved_model(found, saved)
        sequence_length, dtype = resume.saved_shape(found, saved)
        tokenizer = resume.tokenizer_of(found, saved)
        kept = companions.load(resume.run_of(found))
        weights = resume.full_weights(found)
    settings = hf_config(
        model,
        saved.vocab_size,
        max(sequence_length, (kept.max_position_embeddings if kept is not None else None) or 0),
        dtype,
        # what ends a document is what ends a text
        eos_token_id=kept.eos_token_id if kept is not None and saved.eod_id in (None, *kept.ends) else saved.eod_id,
        bos_token_id=None if kept is None else kept.bos_token_id,
        pad_token_id=None if kept is None else kept.pad_token_id,
    )
    write_hf(folder, to_hf_state(weights, model, saved.vocab_size), settings, tokenizer, companions=kept)
    lost = saved.tokenizer if saved.tokenizer and tokenizer is None else None
    return Exported(found, saved.step, sum(weight.numel() for weight in weights.values()), lost)
