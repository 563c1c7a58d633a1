"""What `checkpoint merge` takes of memory and time, on made-up weights of a real shape.

Conventions: the checkpoints are written here, in whole tensors, as one rank writes them, and removed at the end. The merge is a
process of its own; its memory is the most that was resident at any time, imports included. The time includes three readings of
every file: the checksums, the values, and the result, which is read back.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.config.load import load_yaml
from megatron_synth.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_synth.config.validation import validate
from megatron_synth.core.log import gib, human, say
from megatron_synth.model import architecture

_VOCABULARY = 128256


def main(argv: list[str]) -> int:
    """Write checkpoints, merge them, and say what it took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks merge", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-8b", help="configs/model/NAME.yaml")
    parser.add_argument("--checkpoints", type=int, default=2, help="how many are merged")
    parser.add_argument("--folder", type=Path, help="on the disk to use; default: that of temporary files")
    arguments = parser.parse_args(argv)
    model = validate(ModelConfig, load_yaml(f"model/{arguments.model}.yaml")["model"], arguments.model)
    parameters = sum(
        weight.size() * (model.num_layers if weight.in_layers else 1) for weight in architecture.weights(model, _VOCABULARY)
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        needed, free = 2 * parameters * (arguments.checkpoints + 1), shutil.disk_usage(folder).free
        if free < needed * 1.1:
            raise UserError(f"{folder}: {human(needed)} bytes are needed, {human(free)} are free; name another --folder")
        what = f"{human(parameters)} parameters in bf16, {arguments.checkpoints} checkpoints of {gib(2 * parameters)} GiB"
        say(f"{what} in {folder}")
        run = folder / "run"
        for step in range(1, arguments.checkpoints + 1):
            _write(run, model, step)
        words = [sys.executable, "-m", "megatron_synth", "checkpoint", "merge", str(run), "--steps"]
        words += [",".join(str(step) for step in range(1, arguments.checkpoints + 1)), "--out", str(folder / "out")]
        began = time.perf_counter()
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        took = time.perf_counter() - began
        if os.waitstatus_to_exitcode(status) != EXIT_OK:
            raise UserError(f"the merge ended with exit code {os.waitstatus_to_exitcode(status)}")
        busy, most = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20
        say(f"merged in {took:.0f} s, {busy:.0f} s of a core; most memory {most:.2f} GiB")
    return EXIT_OK


def _write(run: Path, model: ModelConfig, step: int) -> None:
    """A checkpoint of weights alone, every tensor one piece."""
    import torch

    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import Layout

    with process_group(Layout.single(), seed=0):
        from megatron_synth.train.checkpoint import files, resume
        from megatron_synth.train.checkpoint.sharding import METADATA
        from megatron_synth.train.checkpoint.writer import TensorFile, seal

        folder = run / "checkpoints" / files.name_of(step)
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(step)
        with TensorFile(folder / "__0_0.distcp") as file:
            for key, weight in architecture.by_key(model, _VOCABULARY).items():
                shape = weight.saved_shape(model.num_layers)
                for layer in range(model.num_layers if weight.in_layers else 1):
                    lead = (1,) if weight.in_layers else ()
                    values = torch.rand(1 << 16, generator=generator).bfloat16()
                    count = weight.size()
                    tensor = values.repeat(count // len(values) + 1)[:count].view(*lead, *weight.shape)
                    file.add(key, shape, (layer, *(0 for _ in weight.shape)) if lead else (0,) * len(shape), tensor)
        assert file.info is not None
        state = resume.TrainerState(
            step=step,
            samples=0,
            skipped=0,
            run_id="",
            plan_digest="",
            ledger={},
            vocab_size=_VOCABULARY,
            eod_id=None,
            tokenizer=None,
            config={
                "model": model.model_dump(mode="json"),
                "train": {"sequence_length": 4096},
                "precision": PrecisionConfig(dtype="bf16").model_dump(),
                "parallel": ParallelConfig().model_dump(),
            },
        )
        written = {"__0_0.distcp": file.info}
        seal(folder, file.entries, written, {"content_metadata": dict(METADATA)}, resume.trainer_file(state))
