"""`python -m benchmarks NAME [ARGUMENT ...]`, from the top of a clone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from megatron_synth.cli.main import guarded
from megatron_synth.config.errors import EXIT_OK, UserError

BENCHMARKS: dict[str, tuple[str, str]] = {
    "loader": ("benchmarks.loader.cli:main", "speed, start-up, memory and exactness of data loaders"),
    "loader-report": ("benchmarks.loader.report:main", "one table of several files of `loader --json`"),
    "prepare": ("benchmarks.prepare.cli:main", "tokens/s of turning text into shards, beside Megatron-LM's way"),
    "duplicates": ("benchmarks.duplicates.cli:main", "near duplicates: speed, memory, recall and precision, beside others"),
    "chosen": ("benchmarks.chosen:main", "speed of documents chosen by `where`, beside the whole source"),
    "checkpoint": ("benchmarks.checkpoint_cli:main", "how long a save keeps training waiting"),
    "merge": ("benchmarks.merge:main", "memory and time of merging checkpoints"),
    "fp8": ("benchmarks.fp8_cli:main", "losses at the end of training in FP8 beside those of BF16"),
    "laws": ("benchmarks.laws.cli:main", "laws on public tables beside published ones; designs and intervals, simulated"),
    "coverage": ("benchmarks.coverage:main", "what coverage selection covers, beside random choices"),
    "filters": ("benchmarks.filters:main", "precision and recall of the filters of synthetic text"),
    "token-editing": ("benchmarks.token_editing:main", "how much of natural text token editing changes"),
    "synthesis": ("benchmarks.synthesis.cli:main", "how much of a server's speed the client of `synthesize` leaves unused"),
    "synthesis-vllm": ("benchmarks.synthesis.vllm:main", "tokens/s of the client of `synthesize` beside `vllm bench serve`"),
    "mup": ("benchmarks.mup:main", "whether a learning rate carries from narrow models to wide ones"),
    "scale": ("benchmarks.scale.cli:main", "start-up at 1e13 tokens, doctor and launch on 512 nodes, simulated"),
    "launch": ("benchmarks.slurm_launch:main", "time until ranks run on SLURM nodes"),
}


def usage() -> str:
    """The text of --help."""
    width = max(map(len, BENCHMARKS))
    lines = (f"  {name:<{width}}  {text}" for name, (_, text) in BENCHMARKS.items())
    return "\n".join(["usage: python -m benchmarks NAME [ARGUMENT ...]; each tells more with --help", "", *lines])


def main(argv: list[str]) -> int:
    """Run the benchmark that `argv[0]` names."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return EXIT_OK
    if argv[0] not in BENCHMARKS:
        raise UserError(f"unknown benchmark '{argv[0]}'; one of: {', '.join(BENCHMARKS)}")
    module, _, function = BENCHMARKS[argv[0]][0].partition(":")
    run: Callable[[list[str]], int] = getattr(import_module(module), function)
    return run(argv[1:])


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
