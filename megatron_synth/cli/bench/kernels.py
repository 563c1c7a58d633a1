"""`megatron-synth bench kernels`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_synth.cli.options.types import count, on_disk
from megatron_synth.config.errors import EXIT_OK, UserError

if TYPE_CHECKING:
    from megatron_synth.bench.kernels.measure import Ceilings, Row
    from megatron_synth.model.kernels import Sizes

BASELINES = ("eager", "compile", "liger", "te", "megatron")
MODELS = {"llama-1.3b": 50_304, "llama-3b": 131_072}
"""Shipped models, and the size of the vocabulary of their cross-entropy."""


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth bench kernels",
        description="Each operation by every backend that this machine has, beside baselines, against a copy and a product.",
    )
    parser.add_argument("--only", metavar="TEXT", help="operations whose name holds TEXT")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--tokens", type=count, help="of the micro-batch; default 8192, on a CPU 256")
    parser.add_argument(
        "--vs", help=f"baselines: any of {', '.join(BASELINES)} with commas, or none; default all, on a CPU eager"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: that everything runs, not how fast")
    parser.add_argument("--json", type=on_disk, metavar="FILE", help="write all that was measured")
    return parser


def main(argv: list[str]) -> int:
    """Measure every operation and print a table."""
    options = parser().parse_args(argv)
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(f"--json: {options.json.parent} is not a folder")
    if options.tokens is not None and options.tokens < 1:
        raise UserError(f"--tokens {options.tokens}: at least 1")
    baselines = None if options.vs is None else [] if options.vs == "none" else list(dict.fromkeys(options.vs.split(",")))
    unknown = [name for name in baselines or [] if name not in BASELINES]
    if unknown:
        raise UserError(f"--vs: unknown baseline '{unknown[0]}'; any of {', '.join(BASELINES)} with commas, or none")

    import torch

    from megatron_synth.bench import tables
    from megatron_synth.bench.kernels import measure as benchmark
    from megatron_synth.core.files import write_json
    from megatron_synth.core.log import say
    from megatron_synth.model.kernels import model_sizes

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    on_cpu = device.type == "cpu"
    if baselines is None:
        baselines = ["eager"] if on_cpu else list(BASELINES)
    effort = benchmark.SMOKE if options.smoke else benchmark.CPU if on_cpu else benchmark.GPU
    head = tables.header("bench", ["kernels", *argv])
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    sizes = smoke_sizes() if options.smoke else model_sizes(MODELS, options.tokens or (256 if on_cpu else 8192))
    limits, rows = benchmark.run(sizes, dtype, device, effort, options.only, baselines)
    say("\n" + "\n".join([*tables.header_lines(head), *conventions(sizes, options.dtype, limits), "", *table(rows)]))
    if options.json is not None:
        content = {"dtype": options.dtype, "sizes": [asdict(one) for one in sizes], "ceilings": asdict(limits)}
        write_json(options.json, {**head, **content, "rows": [asdict(row) for row in rows]})
    return EXIT_OK


def smoke_sizes() -> list[Sizes]:
    """Sizes that take no time."""
    from megatron_synth.model.kernels import Sizes

    return [Sizes("smoke", tokens=16, hidden=96, ffn=80, heads=4, groups=2, head_dim=8, vocabulary=300)]


def conventions(sizes: list[Sizes], dtype: str, limits: Ceilings) -> list[str]:
    """What the figures mean."""
    shapes = "; ".join(
        f"{s.name}: {s.tokens} tokens, hidden {s.hidden}, MLP {s.ffn}, heads {s.heads}/{s.groups} x {s.head_dim}, "
        f"vocabulary {s.vocabulary:,}"
        for s in sizes
    )
    return [
        f"- {dtype}; {shapes}",
        f"- ceilings of this run: copy {limits.copy / 1e9:,.0f} GB/s, product of matrices {limits.product / 1e12:.3g} TFLOP/s",
        "- rate: the least bytes the operation can move, or its FLOPs (causal attention: the half that is not masked), over "
        "the median time; inputs rotate beyond the cache; implementations agree with torch's",
    ]


def table(rows: list[Row]) -> list[str]:
    """Markdown; what could not be run has its reason in the last column."""
    from megatron_synth.bench.tables import markdown_table
    from megatron_synth.core.log import gib

    cells = [["operation", "sizes", "pass", "by", "time, us", "rate", "of ceiling", "peak GiB", "against eager", "not run"]]
    eager = {(r.operation, r.shape, r.direction): r.seconds for r in rows if r.contender == "eager"}
    for r in rows:
        if r.seconds is None or r.rate is None or r.ceiling is None:
            cells.append([r.operation, r.shape, "", r.contender, *[""] * 5, r.problem or ""])
            continue
        rate = f"{r.rate / 1e12:.3g} TFLOP/s" if r.flops else f"{r.rate / 1e9:,.1f} GB/s"
        base = eager.get((r.operation, r.shape, r.direction))
        cells.append(
            [
                *(r.operation, r.shape, r.direction, r.contender, f"{1e6 * r.seconds:,.1f}", rate, f"{100 * r.ceiling:.1f}%"),
                "n/a" if r.peak_bytes is None else gib(r.peak_bytes),
                "" if base is None else f"x{base / r.seconds:.2f}",
                "",
            ]
        )
    return markdown_table(cells)
