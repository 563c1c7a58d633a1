"""`megatron-synth generate MODEL --prompt TEXT`: what a run, or a model of Hugging Face, writes."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_synth.cli.interrupts import interruptible
from megatron_synth.cli.options.types import count, count_or_zero
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.core.log import say, show, visible

if TYPE_CHECKING:
    from megatron_synth.synthesis.engines.continuations import Continuation
    from megatron_synth.train.record.samples import Sample

MOST_PROMPTS = 100_000
MARGIN = "  | "
"""Before each line of a text: no text can pass for a line of this program."""


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth generate",
        description="Let a model continue prompts. A run's newest checkpoint is exported into the run's folder, once, and its "
        "texts stand in samples.jsonl there; `megatron-synth report` shows them.",
    )
    parser.add_argument("model", help="run directory, checkpoint, folder in Hugging Face's format, or URL[@STEP] of a run")
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help='to continue; again for more; "" begins a document'
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="many: one a line, or of a .jsonl the key `prompt` of each line"
    )
    parser.add_argument("--samples", type=count, default=1, metavar="N", help="texts of each prompt (default 1)")
    parser.add_argument("--seed", type=count_or_zero, default=1, help="other texts, of all prompts (default 1)")
    parser.add_argument("--max-tokens", type=count, metavar="N", help="of a text (default 128, or what the context leaves)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="likeliest tokens of so much probability (0.95)")
    parser.add_argument(
        "--top-k", type=count_or_zero, default=0, metavar="K", help="so many of the likeliest tokens (default all)"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end a text before this; again for more")
    parser.add_argument("--chat", action="store_true", help="prompts are messages, for a model with a chat template")
    parser.add_argument("--ema", action="store_true", help="the average of the weights (optim.ema_decay) in place of them")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help="what runs the model")
    parser.add_argument("--device", default="auto", help="of transformers: cpu, cuda, or auto (default)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of transformers' weights")
    parser.add_argument("--batch-size", type=count, default=16, metavar="N", help="of transformers: texts at a time")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each text")
    return parser


def main(argv: list[str]) -> int:
    """Continue prompts and return the exit code."""
    arguments = parser().parse_args(argv)
    with interruptible("no text was written; the same command starts again"):
        return _main(arguments)


def _main(arguments: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from megatron_synth.config.synthesis import EngineConfig, SamplingConfig

    prompts = _prompts(arguments)
    if arguments.temperature == 0 and arguments.samples > 1:
        raise UserError(
            "--samples: texts of one prompt are all equal at temperature 0; set --temperature, or leave --samples out"
        )
    if "" in arguments.stop:
        raise UserError("--stop: expected text, found none, which every text begins with")
    try:
        sampling = SamplingConfig(temperature=arguments.temperature, top_p=arguments.top_p, top_k=arguments.top_k)
        engine = EngineConfig(
            name=arguments.engine, batch_size=arguments.batch_size, device=arguments.device, dtype=arguments.dtype
        )
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{option}: {first['msg']}, got {first['input']!r}") from None
    run, step, folder = _exported(arguments)
    from megatron_synth.synthesis.engines.continuations import continue_prompts

    found = continue_prompts(
        folder,
        prompts,
        samples=arguments.samples,
        seed=arguments.seed,
        sampling=sampling,
        max_tokens=arguments.max_tokens,
        engine=engine,
        stop=arguments.stop,
        chat=arguments.chat,
    )
    now = datetime.now(UTC).isoformat()
    samples = [_sample(arguments, prompts[one.prompt], one, step, now) for one in found]
    if run is not None:
        from megatron_synth.train.record import samples as record

        record.add(run, samples)
    for one, sample in zip(found, samples, strict=True):
        if arguments.json:
            show(json.dumps(sample))  # in ASCII: nothing that a terminal would obey
        else:
            _show(one, sample, len(prompts))
    return EXIT_OK


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """All prompts, those of the command line first.

    Raises:
        UserError: there are none, or the file is not what it should be.
    """
    found: list[str] = list(arguments.prompt)
    for number, prompt in enumerate(found, start=1):
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise UserError(f"--prompt, number {number}: not text in UTF-8")
    if arguments.prompts is not None:
        found += _of_file(arguments.prompts)
    if not found:
        raise UserError('no prompts: give --prompt TEXT or --prompts FILE; --prompt "" lets the model begin a document')
    if len(found) > MOST_PROMPTS:
        raise UserError(f"{len(found)} prompts, at most {MOST_PROMPTS} are continued at once; split {arguments.prompts}")
    return found


def _of_file(file: Path) -> list[str]:
    from typing_extensions import TypedDict

    from megatron_synth.core.records import Reader, read_text

    lines = read_text(file).split("\n")
    if file.suffix != ".jsonl":
        return [line.removesuffix("\r") for line in lines if line.strip()]

    class Line(TypedDict):
        prompt: str

    reader: Reader[Line] = Reader(Line, 'expected {"prompt": "..."} in each line')
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return [reader.parse(line, f"{file}, line {number}")["prompt"] for number, line in numbered]


def _exported(arguments: argparse.Namespace) -> tuple[Path | None, int | None, Path]:
    """The run directory and step, if there are any, and the folder in Hugging Face's format."""
    from megatron_synth.train.checkpoint import fetched

    model = fetched.local(arguments.model)
    if not model.is_dir():
        raise UserError(
            f"{model}: no such folder; expected a run directory, a checkpoint, or a folder in Hugging Face's format"
        )
    if (model / "config.json").is_file():
        if arguments.ema:
            raise UserError(f"--ema: {model} is a folder in Hugging Face's format, which has one set of weights; name the run")
        return None, None, model
    from megatron_synth.interop.export import kept_export

    kept = kept_export(model, average=arguments.ema)
    if not arguments.json:
        how = "as exported before to" if kept.reused else "exported to"
        say(f"{kept.mark['checkpoint']}, step {kept.mark['step']:,}, {how} {kept.folder}")
    run = kept.folder.parent.parent
    return run if (run / "run.json").is_file() else None, kept.mark["step"], kept.folder


def _sample(arguments: argparse.Namespace, prompt: str, one: Continuation, step: int | None, now: str) -> Sample:
    return {
        "time": now,
        "step": step or 0,
        "average": arguments.ema,
        "prompt": prompt,
        "text": one.text,
        "finish": one.finish,
        "tokens": one.tokens,
        "seed": one.seed,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
    }


def _show(one: Continuation, sample: Sample, prompts: int) -> None:
    size = "" if one.tokens is None else f", {one.tokens} tokens"
    show(f"\nprompt {one.prompt + 1} of {prompts}, sample {one.sample + 1}, seed {one.seed}{size}, ends by {one.finish}")
    for name, text in (("prompt", sample["prompt"]), ("text", sample["text"])):
        show(f"{name}:")
        # also where no terminal reads it: what is printed may be shown on one later
        show("\n".join(MARGIN + line for line in visible(text).split("\n")))
