"""`megatron-synth kernels`: which implementation of each operation this machine uses, and what Triton kernels compile to."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_synth.cli.options.types import on_disk
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.core.log import show

if TYPE_CHECKING:
    from megatron_synth.model.kernels import Compiled

COMPILED_FOR = {"llama-1.3b": 50_304, "llama-3b": 128_256, "llama-8b": 128_256}
"""Shipped models, and the size of the vocabulary that they are compiled with."""
TOKENS = 8192  # of a micro-batch; launches do not depend on it but for their number


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth kernels",
        description="The implementation of each operation on this machine, the reason, and why not the others.",
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        default=[],
        metavar="[CONFIG] a.b=c",
        help="a run's configuration: its precision and its kernels section",
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="without CONFIG; default bf16")
    parser.add_argument(
        "--compile", action="store_true", help="instead, compile every Triton kernel for Hopper; needs Triton and no GPU"
    )
    parser.add_argument("--json", type=on_disk, metavar="FILE", help="with --compile: write the table to FILE, too")
    return parser


def main(argv: list[str]) -> int:
    """Print a table and return the exit code."""
    options = parser().parse_intermixed_args(argv)
    if not options.compile:
        if options.json is not None:
            raise UserError("--json goes with --compile")
        show(choices_table(options.arguments, options.dtype))
        return EXIT_OK
    if options.arguments:
        raise UserError(
            f"--compile takes no configuration, found '{options.arguments[0]}': it is for {', '.join(COMPILED_FOR)}"
        )
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(f"--json: {options.json.parent} is not a folder")
    compiled = compile_kernels()
    show(compiled_table(compiled))
    if options.json is not None:
        from megatron_synth.core.files import write_atomic

        rows = [{**asdict(kernel), "warps_per_processor": kernel.warps_per_processor} for kernel in compiled]
        write_atomic(options.json, json.dumps(rows, indent=1) + "\n")
    return EXIT_OK


def choices_table(arguments: list[str], dtype: str) -> str:
    """The choices for a configuration, or for a data type alone, as text.

    Raises:
        ConfigError: the configuration is wrong, or names a backend that is unavailable.
    """
    from megatron_synth.config.load import load_file
    from megatron_synth.config.schema import Config
    from megatron_synth.core.log import table

    config = load_file(Config, arguments[0], arguments[1:]) if arguments else None

    from megatron_synth.model import kernels

    if config is None:
        choices = kernels.choose_auto(dtype)
    else:
        choices, dtype = kernels.select(config), config.precision.dtype
    rows: list[tuple[str, ...]] = [("operation", "backend", "why", "others")]
    for choice in choices.values():
        others = "; ".join(f"{name}: {why}" for name, why in choice.others)
        rows.append((choice.operation, choice.backend, choice.reason, others))
    return f"kernels on {kernels.torch_name()}, {dtype}\n{table(rows, words=True)}"


def compile_kernels() -> list[Compiled]:
    """Every Triton kernel at the shapes of COMPILED_FOR, in bf16.

    Raises:
        UserError: Triton is not installed, or set to interpret.
    """
    from megatron_synth.model import kernels

    return kernels.compile_all(kernels.model_sizes(COMPILED_FOR, TOKENS))


def compiled_table(compiled: list[Compiled]) -> str:
    """What came out of the assembler, as Markdown."""
    head = [
        "kernel",
        "operation",
        "model",
        "warps",
        "registers",
        "shared, B",
        "stack, B",
        "warps/SM of 64",
        "instructions",
        "issue / memory",
    ]
    rows = [
        [
            *(f"`{k.kernel}`", k.operation, k.shape),
            *map(str, (k.warps, k.registers, k.shared, k.stack, k.warps_per_processor, k.instructions or "a loop")),
            "" if k.issue is None else f"{k.issue:.2f}",
        ]
        for k in compiled
    ]
    lines = [head, ["---", "---", "---", *["---:"] * 7], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
