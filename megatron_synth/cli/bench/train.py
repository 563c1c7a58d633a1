"""`megatron-synth bench train`: throughput of training."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_synth.cli.options.types import count, file_and_overrides, on_disk
from megatron_synth.config.errors import EXIT_OK, UserError

if TYPE_CHECKING:
    from megatron_synth.bench.train.compare import Comparison
    from megatron_synth.config.schema import Config
    from megatron_synth.parallel.plan import Layout

DEFAULT_CONFIG = "bench/tiny-7m.yaml"


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth bench train",
        description="Tokens per second of the training engine on random tokens, beside plain loops of the same model.",
        epilog="On several processes: torchrun --nproc-per-node N -m megatron_synth bench train ... --vs none",
    )
    parser.add_argument("arguments", nargs="*", default=[], metavar="[CONFIG] a.b=c", help=f"default CONFIG: {DEFAULT_CONFIG}")
    parser.add_argument("--vs", default=None, help="baselines: hf, plain, both with a comma (default on one rank), or none")
    parser.add_argument("--pairs", type=count, default=5, help="blocks of steps of each contender, in turn; default 5")
    parser.add_argument("--steps", type=count, default=8, help="timed optimizer steps in a block; default 8")
    parser.add_argument("--warmup", type=count, default=3, help="optimizer steps before the first block; default 3")
    parser.add_argument("--json", type=on_disk, metavar="FILE", help="write all that was measured")
    parser.add_argument("--model", help="sizes of configs/model/ instead of the file's model; several with commas")
    parser.add_argument("--data", choices=("random", "real"), default="random", help="real: the file's sources, by the loader")
    parser.add_argument("--profile", action="store_true", help="also tell what a step's time goes to")
    parser.add_argument("--trace", type=on_disk, metavar="FILE", help="write the profile as a Chrome trace; implies --profile")
    sweeping = parser.add_argument_group("ablations and sweep, every point in processes of its own")
    sweeping.add_argument(
        "--ablations",
        nargs="?",
        const="",
        metavar="L1,L2",
        help="turn what makes a step faster, one at a time",
    )
    sweeping.add_argument("--levers", nargs="?", const="", help=argparse.SUPPRESS)
    sweeping.add_argument("--budget", type=count, metavar="S", help="start no variant that would end after S seconds")
    sweeping.add_argument("--sweep", action="store_true", help="walk micro-batch sizes, recomputation and, on ranks, layouts")
    sweeping.add_argument("--ranks", type=count, help="processes of a point; default: as many as there are GPUs, or 1")
    sweeping.add_argument(
        "--vary", action="append", default=[], metavar="KEY=V1,V2", help="walk these values instead; may be repeated"
    )
    sweeping.add_argument("--limit", type=count, help="points to measure at most")
    sweeping.add_argument("--timeout", type=count, default=600, metavar="S", help="longest time of a point; default 600")
    return parser


def main(argv: list[str]) -> int:
    """Throughput of training, the engine alone or beside plain training loops."""
    options = parser().parse_intermixed_args(argv)
    if options.levers is not None:
        raise UserError("--levers is --ablations now")
    path, overrides = file_and_overrides(options.arguments, DEFAULT_CONFIG)
    for what, file in (("--json", options.json), ("--trace", options.trace)):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{what}: {file.parent} is not a folder")
    models = options.model.split(",") if options.model else []
    if options.ablations is not None:
        from megatron_synth.cli.bench.ablations import run as run_ablations

        return run_ablations(path, overrides, models, options, argv)
    if options.sweep or options.vary or len(models) > 1:
        from megatron_synth.cli.bench.sweep import run

        return run(path, overrides, models, options, argv)

    from megatron_synth.cli.bench.sweep import model_settings
    from megatron_synth.config.load import load_file
    from megatron_synth.config.schema import Config
    from megatron_synth.parallel.plan import plan

    for model in models:
        overrides = [*model_settings(model), *overrides]
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    baselines = _baselines(options.vs, world_size)
    config, data = load_file(Config, path, overrides), None
    if options.data == "real":
        if baselines and options.vs is not None:
            raise UserError("--data real: the baselines have no loader; give --vs none")
        baselines = []
        from megatron_synth.bench.train.data import with_data

        config, data = with_data(config, options.warmup + options.pairs * options.steps + 1)
    layout = plan(config, world_size)

    from megatron_synth.bench import tables
    from megatron_synth.bench.train.compare import compare
    from megatron_synth.core.files import write_json
    from megatron_synth.core.log import is_first_rank, say

    head = tables.header("bench", ["train", *argv])

    def keep(result: Comparison) -> None:
        if options.json is not None and is_first_rank():
            write_json(options.json, to_json(head, config, layout, result))

    result = compare(
        config,
        layout,
        baselines,
        pairs=options.pairs,
        steps=options.steps,
        warmup=options.warmup,
        data=data,
        profiled=options.profile or options.trace is not None,
        trace=options.trace,
        so_far=keep,
    )
    say("\n" + render(head, config, layout, result))
    keep(result)
    return EXIT_OK


def _baselines(text: str | None, world_size: int) -> list[str]:
    known = ("hf", "plain")
    if text is None:
        return list(known) if world_size == 1 else []
    names = [] if text == "none" else list(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--vs: unknown baseline '{unknown[0]}'; any of {', '.join(known)} with commas, or none")
    return names


def render(head: dict[str, Any], config: Config, layout: Layout, result: Comparison) -> str:
    """The result as Markdown."""
    from megatron_synth.bench.tables import header_lines, markdown_table
    from megatron_synth.core.log import gib
    from megatron_synth.estimate.hardware import show_mfu

    engine, train_config = result.rows[0], config.train
    pairs, steps = len(engine.blocks), len(engine.blocks[0].step_s)
    on_cpu, compared = engine.cpu_s is not None, len(result.rows) > 1
    rows = [["loop", "ms/step", "tokens/s/rank", "TFLOP/s/rank", "MFU", "peak GiB", "first loss"]]
    rows[0] += ["engine / loop"] * compared + ["CPU ms/step"] * on_cpu
    rows[0] += ["engine / loop, CPU time"] * (on_cpu and compared)
    for row in result.rows:
        rates = row.rates
        cells = [
            row.name,
            f"{1000 * rates.step_s:.1f}",
            f"{rates.tokens_per_s_per_rank:,.0f}",
            f"{rates.tflops_per_rank:.3g}",
            show_mfu(rates.mfu),
            "n/a" if row.peak_bytes is None else gib(row.peak_bytes),
            f"{row.losses[0]:.5f}",
        ]
        if compared:
            cells.append("" if row is engine else _spread(engine.speedups_over(row)))
        if row.cpu_s is not None:
            cells.append(f"{1000 * row.cpu_s:.1f}")
            if compared:
                cells.append("" if row is engine else _spread(engine.cpu_speedups_over(row)))
        rows.append(cells)
    turns = f"{pairs} blocks of {steps} optimizer steps"
    if compared:
        turns += " of each loop, in turn in one process; engine / loop is the ratio of tokens/s in blocks of one turn, "
        turns += "median (min to max)"
    lines = [
        *header_lines(head),
        f"- model: {config.model.name}, {config.precision.dtype}, sequence_length {train_config.sequence_length}, "
        f"global_batch_size {train_config.global_batch_size}, micro_batch_size {train_config.micro_batch_size}",
        f"- layout of the engine: {layout.describe()}",
        f"- timing: {turns}; ms/step is the median of all steps",
        "- FLOPs/token: 6 x (body + head parameters) + 12 x layers x query channels x sequence, full attention; MFU against "
        f"the device's dense BF16 peak; {'data loading included' if result.real_data else 'data loading not included'}",
    ]
    if result.shares is not None:
        parts = ", ".join(f"{name} {100 * share:.1f} %" for name, share in result.shares.items())
        lines.append(f"- one profiled step of rank 0: {parts}")
    if on_cpu:
        lines.append(
            "- CPU time is that of all threads of the process: with one thread on shared cores it is what a step costs"
        )
    if compared:
        lines.append(
            f"- same computation: over {len(engine.losses)} warm-up steps losses differ by {apart(result):.1e} at most"
        )
        if config.precision.dtype == "bf16":
            lines.append(
                "- the baselines hold weights, gradients and moments in bf16; the engine's gradients, moments and master "
                "weights are fp32"
            )
    return "\n".join([*lines, "", *markdown_table(rows)])


def apart(result: Comparison) -> float:
    """Largest difference between a baseline's loss and the engine's, over all warm-up steps."""
    expected = result.rows[0].losses
    return max(abs(a - b) for row in result.rows[1:] for a, b in zip(expected, row.losses, strict=True))


def _spread(ratios: Sequence[float]) -> str:
    import statistics

    return f"x{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def to_json(head: dict[str, Any], config: Config, layout: Layout, result: Comparison) -> dict[str, Any]:
    """The result with every single step time."""
    from dataclasses import asdict

    engine = result.rows[0]
    return {
        **head,
        "layout": layout.describe(),
        "world_size": result.world_size,
        "data": "real" if result.real_data else "random",
        "shares": result.shares,
        "config": config.model_dump(mode="json"),
        "rows": [
            {
                "name": row.name,
                **asdict(row.rates),
                "peak_bytes": row.peak_bytes,
                "warmup_losses": row.losses,
                "step_s": [block.step_s for block in row.blocks],
                "cpu_step_s": [block.cpu_s for block in row.blocks],
                "engine_speedup": None if row is engine else engine.speedups_over(row),
                "engine_cpu_speedup": None if row is engine else engine.cpu_speedups_over(row),
            }
            for row in result.rows
        ],
    }
