"""`megatron-synth convert to-hf RUN FOLDER` and `convert from-hf FOLDER RUN`."""

from __future__ import annotations

import argparse
import secrets
import shutil
from pathlib import Path

from megatron_synth.cli.options.types import on_disk
from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import ParallelConfig, PrecisionConfig
from megatron_synth.core.log import human, say


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth convert",
        description="Exchange weights with Hugging Face's Llama, Mistral, Qwen 2, 2.5 and 3, and OLMo 2, in safetensors.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="to-hf|from-hf")
    to_hf = verbs.add_parser("to-hf", help="checkpoint of any layout -> folder for AutoModelForCausalLM")
    to_hf.add_argument("run", help="run directory (its newest checkpoint), one checkpoint, or URL[@STEP] of a run in a bucket")
    to_hf.add_argument("folder", type=on_disk, help="new folder")
    to_hf.add_argument("--ema", action="store_true", help="the average of the weights (optim.ema_decay) in place of them")
    from_hf = verbs.add_parser("from-hf", help="folder of such a model -> weights for checkpoint.init_from, in any layout")
    from_hf.add_argument("folder", type=on_disk, help="folder with config.json and safetensors")
    from_hf.add_argument("out", type=on_disk, help="new folder: checkpoints/, model.yaml to use as `base:`, tokenizer.json")
    return parser


def main(argv: list[str]) -> int:
    """Exchange weights with Hugging Face. Returns the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.verb == "to-hf":
        return _to_hf(arguments.run, arguments.folder, average=arguments.ema)
    return _from_hf(arguments.folder, arguments.out)


def _to_hf(run: str, folder: Path, *, average: bool) -> int:
    _refuse_existing(folder)
    from megatron_synth.interop.export import export_to_hf
    from megatron_synth.train.checkpoint import fetched

    made = export_to_hf(fetched.local(run), folder, average=average)
    if made.lost_tokenizer is not None:
        say(f"warning: {made.lost_tokenizer} of the run is not there any more; the folder has no tokenizer")
    say(f"{made.checkpoint} -> {folder}: {human(made.parameters)} parameters, step {made.step}")
    return 0


def _from_hf(folder: Path, out: Path) -> int:
    _refuse_existing(out)
    from megatron_synth.config.yaml12 import dump
    from megatron_synth.data.tokenizer import FILE_NAME, fingerprint_of
    from megatron_synth.interop.hf_folder import read_hf
    from megatron_synth.interop.hf_settings import model_config_from_hf
    from megatron_synth.interop.hf_weights import from_hf_state
    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import Layout
    from megatron_synth.train.checkpoint import companions

    state, settings = read_hf(folder)
    model = model_config_from_hf(settings, name=folder.resolve().name)
    weights = from_hf_state(state, model)
    assert model.vocab_size is not None
    kept = companions.collect(folder, settings)
    tokenizer = folder / FILE_NAME
    fingerprint = fingerprint_of(tokenizer) if tokenizer.is_file() else None
    dtypes = {weight.dtype for weight in weights.values()}
    partial = out.with_name(f".{out.name}.{secrets.token_hex(8)}")  # of this program alone
    try:
        with process_group(Layout.single(), seed=0):
            import torch

            from megatron_synth.train.checkpoint import resume

            # what is neither is stored in fp32, which holds it exactly
            dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
            resume.save_full_weights(
                partial / "checkpoints",
                {name: weight.to(dtype) for name, weight in weights.items()},
                resume.TrainerState(
                    step=0,
                    samples=0,
                    skipped=0,
                    run_id="",
                    plan_digest="",
                    ledger={},
                    vocab_size=model.vocab_size,
                    eod_id=kept.ends[0] if kept.ends else None,
                    tokenizer=None if fingerprint is None else FILE_NAME,
                    tokenizer_fingerprint=fingerprint,
                    config={
                        "model": model.model_dump(mode="json"),
                        "train": {"sequence_length": settings.get("max_position_embeddings") or 0},
                        "precision": PrecisionConfig(dtype="bf16" if dtype is torch.bfloat16 else "fp32").model_dump(),
                        "parallel": ParallelConfig().model_dump(),
                    },
                ),
            )
        (partial / "model.yaml").write_text(dump({"model": model.model_dump(mode="json")}))
        kept.save(partial)
        if fingerprint is not None:
            shutil.copyfile(tokenizer, partial / FILE_NAME)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    say(f"{folder} -> {out}: use base: {out}/model.yaml and checkpoint.init_from={out}")
    return 0


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another folder, or remove this one")
