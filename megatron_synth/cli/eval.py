"""`megatron-synth eval RUN [a.b=c ...]`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_synth.cli.interrupts import interruptible
from megatron_synth.cli.options.types import count, count_or_zero
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.core.files import write_json
from megatron_synth.core.log import is_first_rank, say, table
from megatron_synth.data.tokenizer import FILE_NAME
from megatron_synth.storage.remote import is_remote
from megatron_synth.train.record import metrics

if TYPE_CHECKING:
    from megatron_synth.data.loading.run_data import RunData
    from megatron_synth.parallel.plan import Layout

# A checkpoint can be read in any layout: by default ranks are spent on data parallelism alone.
_ONE_RANK_PER_COPY = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.virtual_pipeline_model_parallel_size=null",
    "parallel.sequence_parallel=null",
)


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth eval",
        description="Loss per token (nats) and bits per byte of a run's newest checkpoint on each validation domain.",
        epilog="Overrides such as eval.batches=8 or data.validation.code.path=data/code are welcome.",
    )
    parser.add_argument("run", help="run directory, or URL[@STEP] of a run in a bucket")
    parser.add_argument("--ema", action="store_true", help="the average of the weights (optim.ema_decay) in place of them")
    tasks = parser.add_argument_group("downstream tasks, by lm-evaluation-harness, in place of the domains")
    tasks.add_argument("--tasks", metavar="A,B", help="names, such as arc_easy,hellaswag; RUN may be a Hugging Face folder")
    tasks.add_argument("--task-path", type=Path, metavar="FOLDER", help="tasks of your own; their files may run Python")
    tasks.add_argument("--few-shot", type=count_or_zero, metavar="N", help="examples before a question (default: the task's)")
    tasks.add_argument("--limit", type=count, metavar="N", help="questions of each task (default: all)")
    tasks.add_argument("--batch-size", type=count, default=8, metavar="N", help="questions at a time (default 8)")
    tasks.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="settings that replace those of the run")
    return parser


def main(argv: list[str]) -> int:
    """Evaluate the newest checkpoint of a run on its validation domains, whole; writes RUN/eval.json."""
    arguments = parser().parse_intermixed_args(argv)
    with interruptible(f"nothing was written, {arguments.run} is as it was; the same command starts again"):
        from megatron_synth.train.checkpoint import fetched, files

        weights = fetched.local(arguments.run)
        # of a step of a run in a bucket it is that checkpoint, in a run directory
        run = files.run_of(weights) if is_remote(arguments.run) and weights.parent.name == files.FOLDER else weights
        return _main(arguments, run, weights) if arguments.tasks is None else _tasks(arguments, run, weights)


def _main(arguments: argparse.Namespace, run: Path, weights: Path) -> int:
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run}: not a run directory, there is no config.yaml in it")
    # unlike training, an evaluation covers each domain whole unless an option says otherwise
    config = load_file(Config, file, arguments.overrides, first=(*_ONE_RANK_PER_COPY, "eval.batches=null"))
    from megatron_synth.data.loading.run_data import open_data
    from megatron_synth.parallel.plan import plan

    layout = plan(config, int(os.environ.get("WORLD_SIZE", 1)))
    if config.data.tokenizer is None and (run / FILE_NAME).is_file():  # the data may be elsewhere by now
        own = config.data.model_copy(update={"tokenizer": str(run / FILE_NAME)})
        config = config.model_copy(update={"data": own})
    data = open_data(config, staged=True, training=False)
    if not data.validation and not data.answers:
        raise UserError(f"{file}: data.validation: no domains; add data.validation.NAME.path=FOLDER")
    result = _evaluate(config, layout, data, weights, average=arguments.ema)
    say(_table(result, list(data.validation)))
    if is_first_rank():
        write_json(run / "eval.json", result)
        say(f"written to {run / 'eval.json'}")
    return 0


def _tasks(arguments: argparse.Namespace, run: Path, weights: Path) -> int:
    """Downstream tasks; their results go to RUN/tasks.json, metrics.jsonl and the tracker."""
    from megatron_synth.train.record import tasks as record
    from megatron_synth.train.record.run_lock import refuse_used

    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks: expected names, such as arc_easy,hellaswag")
    if arguments.overrides:
        raise UserError(f"{arguments.overrides[0]}: has no effect with --tasks, which asks the exported model; leave it out")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--tasks: is for one process; start it without torchrun")
    if arguments.task_path is not None and not arguments.task_path.is_dir():
        raise UserError(f"--task-path: {arguments.task_path}: no such folder")
    is_run = (run / "run.json").is_file()
    if is_run:
        refuse_used(run)
    folder, step = run, 0
    if not (run / "config.json").is_file():
        from megatron_synth.interop.export import kept_export

        kept = kept_export(weights, average=arguments.ema)
        folder, step = kept.folder, kept.mark["step"]
    elif arguments.ema:
        raise UserError(f"--ema: {run} is a folder in Hugging Face's format, which has one set of weights; name the run")
    from megatron_synth.interop.tasks import run_tasks

    found = run_tasks(
        folder,
        names,
        own=arguments.task_path,
        few_shot=arguments.few_shot,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        device=arguments.device,
    )
    rows: list[tuple[str, ...]] = [("task", "metric", "value")]
    rows += [(task, name, f"{value:.4f}") for task, values in found.items() for name, value in values.items()]
    say(table(rows))
    if is_run:
        asked = {"few_shot": arguments.few_shot, "limit": arguments.limit}
        record.record(run, {"step": step, "average": arguments.ema, "tasks": found, "settings": asked})
        say(f"written to {run / record.FILE}, and to the record of step {step:,}")
    return 0


def _evaluate(config: Config, layout: Layout, data: RunData, run: Path, *, average: bool) -> dict[str, Any]:
    """Load the newest checkpoint into a model of this layout and evaluate it."""
    from megatron_synth.model.run_plan import decide
    from megatron_synth.parallel.groups import process_group

    decided = decide(config, layout)
    with process_group(layout, config.train.seed) as ranks:
        from megatron_synth.model.build import build_model
        from megatron_synth.parallel.wrap import wrap_ddp
        from megatron_synth.train.checkpoint import averages, resume
        from megatron_synth.train.evaluate import evaluate
        from megatron_synth.train.step import Pipeline

        found = resume.newest_sound(run, config.checkpoint.verify)
        if found is None:
            raise UserError(f"{run / 'checkpoints'}: no whole checkpoint to evaluate; train the run first")
        saved = resume.read_trainer(found)
        resume.check_architecture(found, saved, config.model, data.vocab_size)
        resume.check_tokenizer(found, saved, data)
        chunks = wrap_ddp(build_model(decided, data.vocab_size), config)
        resume.load(found, chunks, None, what="take weights")
        if average:
            averages.load_average_as_weights(found, chunks)
        result = evaluate(Pipeline(config, chunks, ranks), data, layout)
        assert result is not None  # nobody asks it to stop
        return {"step": saved.step, **result}


def _table(result: dict[str, Any], domains: list[str]) -> str:
    """One row per domain, and one for all of them by tokens."""

    def row(name: str, loss: float | None, bpb: float | None, tokens: int) -> tuple[str, ...]:
        return (name, *("n/a" if value is None else f"{value:.4f}" for value in (loss, bpb)), f"{tokens:,}")

    tokens = {name: result[metrics.EVAL_DOMAIN_TOKENS + name] for name in domains}
    rows: list[tuple[str, ...]] = [("domain", "loss", "bits/byte", "tokens")]
    for name in domains:
        loss, bpb = result[metrics.EVAL_DOMAIN_LOSS + name], result.get(metrics.EVAL_DOMAIN_BPB + name)
        rows.append(row(name, loss, bpb, tokens[name]))
    if domains:
        rows.append(row("all", result[metrics.EVAL_LOSS], result.get(metrics.EVAL_BPB), sum(tokens.values())))
    return f"step {result['step']}\n" + "\n".join([*([table(rows)] if domains else []), *_answers(result)])


def _answers(result: dict[str, Any]) -> list[str]:
    """A table of the answers' scores; empty without any."""
    scored = metrics.parts(result, metrics.EVAL_ANSWERS_BPB)
    if not scored:
        return []
    rows: list[tuple[str, ...]] = [("answers", "bits/byte", "accuracy", "per byte", "mean rank")]
    for name, bits in scored.items():
        others = (
            result.get(prefix + name) for prefix in (metrics.EVAL_ACCURACY, metrics.EVAL_ACCURACY_PER_BYTE, metrics.EVAL_RANK)
        )
        rows.append((name, f"{bits:.4f}", *("" if value is None else f"{value:.4f}" for value in others)))
    return ["", table(rows)]
