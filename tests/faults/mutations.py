"""`python -m tests.faults.mutations --count 20000`: a checkpoint with a file changed, again and again, opened as by an export.

Half of the time the manifest is made to fit, as by a stranger who made the file; else it is that of before, as after a fault of
a disk. Damage must be refused. What a stranger made must be refused, or give tensors; nothing in it may run, and nothing but
UserError may be raised.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.train.checkpoint import files

_OPCODES = [getattr(pickle, name) for name in dir(pickle) if name.isupper() and isinstance(getattr(pickle, name), bytes)]
_WORDS = (b"null", b"-1", b"1e999", b'"../x"', b"[]", b"{}", b"9" * 5000, b"\xff", b"\\u0000", b"true", b"[" * 3000)


def _mutated(content: bytes, draw: random.Random, mark: Path) -> bytes:
    """Another content of a file."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 3, 10))):
        place = draw.randrange(len(changed) + 1)
        length = draw.choice((1, 4, 16, 200))
        kind = draw.randrange(8)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place : place + length] = bytes(length)
        elif kind == 2:
            del changed[place : place + length]
        elif kind == 3:
            changed[place:place] = draw.randbytes(length)
        elif kind == 4:
            changed[place : place + 1] = draw.choice(_OPCODES)
        elif kind == 5:
            changed[place : place + draw.choice((0, 1, 5))] = draw.choice(_WORDS)
        elif kind == 6:
            changed[place:place] = f"cos\nsystem\n(S'touch {mark}'\ntR".encode()
        else:
            del changed[place:]
    return bytes(changed)


def _sign(checkpoint: Path) -> None:
    names = [path.name for path in checkpoint.iterdir() if path.name != files.MANIFEST]
    listed = {name: {"bytes": (checkpoint / name).stat().st_size, "xxh3": files.hash_file(checkpoint / name)} for name in names}
    (checkpoint / files.MANIFEST).write_text(json.dumps({"files": listed}))


def campaign(folder: str, count: int, seed: int) -> dict[str, int]:
    """Change a file of a checkpoint `count` times, on one rank. Returns how often what happened.

    Raises:
        AssertionError: something in a file ran, or damage was not seen.
    """
    from megatron_synth.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import Layout

    draw, root = random.Random(seed), Path(folder)
    mark = root / "ran"
    happened: Counter[str] = Counter()
    with process_group(Layout.single(), 0):
        import torch

        from megatron_synth.model import architecture
        from megatron_synth.train.checkpoint import resume

        model = ModelConfig(num_layers=2, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2, vocab_size=64)
        config: dict[str, Any] = {
            "model": model.model_dump(mode="json"),
            "train": {"sequence_length": 8},
            "precision": PrecisionConfig(dtype="fp32").model_dump(),
            "parallel": ParallelConfig().model_dump(),
        }
        trainer = resume.TrainerState(0, 0, 0, "", "", {}, 64, 0, None, config)
        table = architecture.by_key(model, 64).values()
        weights = {name: torch.randn(weight.shape) for weight in table for name in weight.names(model.num_layers)}
        checkpoint = resume.save_full_weights(root / "checkpoints", weights, trainer)
        original = {path.name: path.read_bytes() for path in checkpoint.iterdir()}

        def opened() -> dict[str, torch.Tensor]:
            found = resume.newest_sound(root, "checksums", lambda text: None)
            assert found == checkpoint
            saved = resume.read_trainer(found)
            resume.saved_model(found, saved)
            resume.saved_shape(found, saved)
            resume.tokenizer_of(found, saved)
            return resume.full_weights(found)

        assert set(opened()) == set(weights)
        for _ in range(count):
            name = draw.choice(sorted(original))
            stranger = draw.random() < 0.5 and name != files.MANIFEST
            content = _mutated(original[name], draw, mark)
            (checkpoint / name).write_bytes(content)
            if stranger:
                _sign(checkpoint)
            try:
                found = opened()
            except UserError as error:
                assert str(checkpoint) in str(error), error
                happened["refused"] += 1
            else:
                same = set(found) == set(weights) and all(torch.equal(found[key], weights[key]) for key in weights)
                # what is not part of the weights may be changed by who signs; a manifest may say the same in other words
                assert stranger or content == original[name] or (name == files.MANIFEST and same), f"{name}: not seen"
                happened["read" if same else "read, with other weights of a stranger"] += 1
            assert not mark.exists(), f"something in {name} ran"
            for back in (name, files.MANIFEST):
                (checkpoint / back).write_bytes(original[back])
    return dict(happened)


def main(argv: list[str]) -> int:
    """Run a campaign and print what happened."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.mutations", description=__doc__)
    parser.add_argument("--count", type=int, default=20_000, help="changed files (default 20,000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    folder, began = tempfile.mkdtemp(prefix="mutations-"), time.monotonic()
    try:
        happened = campaign(folder, options.count, options.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{options.count} changed files in {time.monotonic() - began:.0f} s: "
        + ", ".join(f"{n} {what}" for what, n in happened.items())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
