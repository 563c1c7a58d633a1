"""`megatron-synth plan MODEL_OR_CONFIG --gpus N --gpu h200`: the layouts of a model on GPUs, on paper."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields
from typing import Any

from megatron_synth.cli.options.types import count, on_disk
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.config.load import apply_overrides, load_yaml, resolve
from megatron_synth.config.schema import Config
from megatron_synth.config.validation import validate
from megatron_synth.core.files import write_json
from megatron_synth.core.log import gib, human, say, table
from megatron_synth.estimate.flops import count_parameters
from megatron_synth.estimate.hardware import ACCELERATORS, Accelerator
from megatron_synth.estimate.search import FRAGMENTATION, RESERVED, Candidate, search
from megatron_synth.estimate.step_time import Assumptions

TOKENS_PER_STEP = 4 * 2**20
VOCABULARY = 50_304


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth plan",
        description="Every legal layout of a model on GPUs: memory, predicted speed and what bounds it. No GPU needed.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL_OR_CONFIG", help="a size of configs/model/, such as 3b, or a file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="settings that replace those of the file")
    parser.add_argument("--gpus", default="8", help="how many; several with commas: 8,64,512,4096; default 8")
    parser.add_argument("--gpu", default="h200", choices=sorted(ACCELERATORS), help="default h200")
    parser.add_argument("--sequence-length", type=count, help="default: the file's, or 4096")
    parser.add_argument("--global-batch-size", type=count, help="sequences per step; default: the file's, or 4M tokens")
    parser.add_argument("--micro-batch-size", type=count, help="default: 1 to 16 are tried")
    parser.add_argument("--vocab-size", type=count, help=f"default: the file's, that of its data, or {VOCABULARY}")
    parser.add_argument("--fp8", action="store_true", help="products of the layers in FP8")
    parser.add_argument("--no-overlap", action="store_true", help="gradients and weights travel beside nothing")
    parser.add_argument("--top", type=count, default=8, help="rows to show; default 8")
    parser.add_argument("--all", action="store_true", help="show all layouts")
    parser.add_argument("--assumptions", action="store_true", help="print every constant with its source")
    parser.add_argument("--check", action="store_true", help="hold the model of time against published runs instead")
    parser.add_argument("--json", type=on_disk, metavar="FILE", help="write every layout with its parts")
    return parser


def main(argv: list[str]) -> int:
    """Print the layouts of a model, best first."""
    options = parser().parse_intermixed_args(argv)
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(f"--json: {options.json.parent} is not a folder")
    if options.check:
        say(_check())
        return EXIT_OK
    if options.model is None:
        raise UserError("plan needs a model: a size of configs/model/ such as 3b, or a configuration file")
    chip = ACCELERATORS[options.gpu]
    written = []
    for gpus in _counts(options.gpus):
        config = configuration(options, gpus)
        fp8 = options.fp8 or config.precision.fp8 != "off"
        if fp8 and config.precision.dtype == "fp32":
            raise UserError(f"--fp8: {options.model} has precision.dtype fp32; add precision.dtype=bf16")
        if fp8 and chip.fp8_flops is None:
            raise UserError(f"FP8 was asked for, and {chip.name} has no FP8 products; leave it out, or choose another --gpu")
        micro = (options.micro_batch_size,) if options.micro_batch_size else (1, 2, 4, 8, 16)
        found = search(config, gpus, chip, micro_batch_sizes=micro, fp8=fp8, overlap=not options.no_overlap)
        if not found:
            raise UserError(
                f"{config.model.name} has no layout on {gpus} GPUs with {config.train.global_batch_size} sequences per step: "
                "the batch must be a multiple of the data-parallel size; change --global-batch-size or --gpus"
            )
        say(render(config, gpus, chip, found, fp8, len(found) if options.all else options.top))
        written.append({"gpus": gpus, "layouts": [to_json(one) for one in found]})
    say(_assumptions() if options.assumptions else _short_assumptions())
    if options.json is not None:
        head = {"model": options.model, "gpu": asdict(chip), "fp8": fp8, "assumptions": asdict(Assumptions())}
        write_json(options.json, {**head, "plans": written})
    return EXIT_OK


def _counts(text: str) -> list[int]:
    try:
        return [count(part) for part in text.split(",")]
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--gpus: {error}") from None


def configuration(options: argparse.Namespace, gpus: int) -> Config:
    """The run to plan: the named file, with what a bare model size leaves open filled in."""
    name = str(options.model)
    bare = not name.endswith(".yaml") and "/" not in name
    path = resolve(f"model/{name}.yaml" if bare else name)
    data = apply_overrides(load_yaml(path), options.overrides)
    of_data = "data" in data
    data.setdefault("data", {"sources": {"none": {"path": "none", "ratio": 1}}})
    model, train = data.setdefault("model", {}), data.setdefault("train", {})
    train.setdefault("steps", 1)
    length = options.sequence_length or train.get("sequence_length") or 4096
    train["sequence_length"] = length
    if options.global_batch_size or "global_batch_size" not in train:
        whole = max(1, round(TOKENS_PER_STEP / length / gpus)) * gpus
        train["global_batch_size"] = options.global_batch_size or whole
    train["micro_batch_size"] = options.micro_batch_size or 1
    if options.vocab_size:
        model["vocab_size"] = options.vocab_size
    elif not of_data:
        model["vocab_size"] = model.get("vocab_size") or VOCABULARY
    config = validate(Config, data, str(path))
    if config.model.vocab_size is not None:
        return config
    # that of the data, as far as it is prepared; a bare model needs none of these imports
    from megatron_synth.data.loading.run_data import vocab_size_of
    from megatron_synth.data.shards.source import check_compatible
    from megatron_synth.train.dryrun import open_if_prepared

    opened = [open_if_prepared(source.path, name) for name, source in config.data.sources.items()]
    size = vocab_size_of(config, check_compatible([source for source in opened if source])) or VOCABULARY
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})


def render(config: Config, gpus: int, chip: Accelerator, found: list[Candidate], fp8: bool, top: int) -> str:
    """The layouts of one number of GPUs."""
    parameters, train = count_parameters(config.model), config.train
    fitting = [one for one in found if one.fits]
    rest = sorted((one for one in found if not one.fits), key=lambda one: one.needed)
    head = (
        f"{config.model.name} ({human(parameters.total)} parameters) on {gpus} x {chip.name.upper()}, "
        f"{'FP8' if fp8 else config.precision.dtype.upper()}, vocabulary {config.model.vocab_size:,}: "
        f"{train.global_batch_size} sequences x {train.sequence_length} = "
        f"{human(train.tokens_per_step)} tokens per step; {len(fitting)} of {len(found)} layouts fit"
    )
    columns = ("layout", "GiB", "step", "tok/s/GPU", "MFU", "largest parts")
    rows: list[tuple[str, ...]] = [columns, *map(_row, fitting[:top])]
    lines = table(rows).splitlines()
    if rest and len(fitting) < top:
        shown = table([columns, *((*_row(one)[:5], _reason(one, chip)) for one in rest[: top - len(fitting)])])
        lines += [_grey(line) for line in shown.splitlines()[1:]]
    parts = [head, "\n".join(lines)]
    if config.precision.dtype == "fp32":
        parts.append("in FP32 products are slower than predicted: speeds are those of BF16, memory is that of FP32")
    if fitting:
        best = fitting[0]
        sizes = ", ".join(f"{name} {gib(size)}" for name, size in asdict(best.memory).items() if size)
        reserve = gib(best.needed - best.memory.total)
        parts.append(f"best, GiB on the fullest rank: {sizes}, reserve {reserve}\nsettings: {' '.join(best.overrides())}")
    else:
        parts.append(f"nothing fits in {gib(chip.memory)} GiB: more GPUs, a smaller --micro-batch-size or --sequence-length")
    return "\n\n".join(parts) + "\n"


def _row(one: Candidate) -> tuple[str, ...]:
    time = vars(one.time)
    largest = sorted(time, key=lambda name: -time[name])[:3]
    shares = ", ".join(f"{name} {100 * time[name] / one.time.total:.0f}%" for name in largest if time[name] > 0)
    step = f"{one.time.total:.3g} s"
    return one.describe(), gib(one.needed), step, f"{one.tokens_per_s:,.0f}", f"{100 * one.mfu:.1f}%", shares


def _reason(one: Candidate, chip: Accelerator) -> str:
    sizes = asdict(one.memory)
    largest = max(sizes, key=lambda name: int(sizes[name]))
    return f"needs {gib(one.needed)} of {gib(chip.memory)} GiB, most of it {largest} ({gib(sizes[largest])})"


def _grey(line: str) -> str:
    return f"\033[2m{line}\033[0m" if sys.stdout.isatty() else line


def _short_assumptions() -> str:
    return (
        "Predictions, not measurements: within about a third of published runs (plan --check); which layout is faster is "
        "surer than how fast it is. Constants and sources: --assumptions."
    )


def _assumptions() -> str:
    lines = ["assumptions"]
    assume = Assumptions()
    lines += [f"  {entry.name} = {getattr(assume, entry.name):g}: {entry.metadata['source']}" for entry in fields(Assumptions)]
    lines.append(f"  memory left free: {gib(RESERVED)} GiB + {100 * FRAGMENTATION:.0f} % of what is counted; assumed")
    lines += [f"  {chip.name}: {chip.source}" for chip in ACCELERATORS.values()]
    return "\n".join(lines)


def _check() -> str:
    from megatron_synth.estimate.published_runs import table_rows

    rows = table_rows()
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [rows[0], ["---", "---", "---", "---", *["---:"] * 4, "---", "---"], *rows[1:]]
    )


def to_json(one: Candidate) -> dict[str, Any]:
    """A layout with all that was computed of it."""
    return {
        "layout": one.describe(),
        "settings": one.overrides(),
        "fits": one.fits,
        "needed_bytes": round(one.needed),
        "memory_bytes": asdict(one.memory),
        "seconds": asdict(one.time),
        "step_s": one.time.total,
        "bound": one.time.bound,
        "tokens_per_s_per_gpu": one.tokens_per_s,
        "tflops_per_gpu": one.flops / 1e12,
        "mfu": one.mfu,
    }
