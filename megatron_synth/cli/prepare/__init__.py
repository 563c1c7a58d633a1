"""`megatron-synth prepare FILE [a.b=c ...]`, `prepare verify` and `prepare duplicates`."""

from __future__ import annotations

import argparse
import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from megatron_synth.cli.interrupts import Interrupted, interruptible
from megatron_synth.cli.options import slurm
from megatron_synth.cli.options.types import count
from megatron_synth.cli.prepare.tables import aligned
from megatron_synth.config.errors import EXIT_OK, EXIT_STOPPED, UserError
from megatron_synth.config.load import load_file
from megatron_synth.config.prepare import VALID_SUFFIX, PrepareConfig
from megatron_synth.core.log import show
from megatron_synth.core.share import Share
from megatron_synth.data.preparing.output import is_clean, partial_name
from megatron_synth.data.preparing.pipeline import Prepared
from megatron_synth.data.preparing.prepare import RECORD, SKIPPED, prepare, prepare_share
from megatron_synth.data.preparing.workers import core_count


def format_table(prepared: Sequence[Prepared]) -> str:
    """What was made, one line per source. Sources of one reading show its time; tokens/s counts both."""
    rows = [("source", "split", "documents", "tokens", "bytes", "bytes/token", "shards", "seconds", "tokens/s")]
    for one in prepared:
        counts, name = one.manifest.counts, one.manifest.name
        family = {name, name + VALID_SUFFIX, name.removesuffix(VALID_SUFFIX)}
        tokens = sum(other.manifest.counts.tokens for other in prepared if other.manifest.name in family)
        rows.append(
            (
                name,
                one.manifest.split,
                f"{counts.documents:,}",
                f"{counts.tokens:,}",
                f"{counts.text_bytes:,}",
                f"{counts.text_bytes / counts.tokens:.3f}",
                str(len(one.manifest.shards)),
                f"{one.seconds:.1f}",
                f"{tokens / max(one.seconds, 1e-9):,.0f}",
            )
        )
    return "\n".join(aligned(rows))


class _Stopped(Interrupted):
    """A scheduler asks to stop: the time is up, or the node is wanted."""


@contextlib.contextmanager
def _stopped_by_a_scheduler() -> Iterator[None]:
    """Within, SIGUSR1 raises `_Stopped`, as does SIGTERM unless something else listens to it. Main thread."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise _Stopped(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_verb(verb: str) -> Callable[[list[str]], int]:
    if verb == "verify":
        from megatron_synth.cli.prepare.verify import main as check_files

        return check_files
    from megatron_synth.cli.prepare.duplicates import main as count_duplicates

    return count_duplicates


def _kept(output: Path) -> str:
    """What an interrupted preparation leaves."""
    if is_clean(output):
        return "nothing was written; the same command starts again"
    return f"what is done is kept in {partial_name(output)}; the same command goes on from there"


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth prepare",
        description="Turn text into token shards.",
        epilog="Of prepared folders: `prepare verify FOLDER...` compares checksums, `prepare duplicates FOLDER...` "
        "counts texts that several share.",
    )
    parser.add_argument("file", help="what to prepare (YAML); see configs/data/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings to replace, such as output=data/mine"
    )
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all that says how something is prepared, and where."""
    parser.add_argument("--workers", type=count, help=f"processes that tokenize (default: all cores, here {core_count()})")
    parser.add_argument("--force", action="store_true", help="replace a finished output")
    parser.add_argument(
        "--share", metavar="K/N", help="only tokenize share K, from 0, of N; without it the same command takes all shares over"
    )
    parser.add_argument("--status", action="store_true", help="how far the shares are, and their jobs")
    parser.add_argument("--slurm", action="store_true", help="the shares as an array of SLURM, and then the rest")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="by the nodes of a Ray cluster, of which this machine is one: HOST:PORT of its head, or auto",
    )
    group = parser.add_argument_group("with --slurm")
    group.add_argument(
        "--tasks", type=count, metavar="N", help="shares, each on a node; --workers: of each, default all its cores"
    )
    slurm.add_options(group)


def _submit(config: PrepareConfig, arguments: argparse.Namespace) -> int:
    from megatron_synth.cluster.preparation import JobOptions, submit_preparation
    from megatron_synth.data.preparing.prepare import check_inputs

    if arguments.tasks is None:
        raise UserError("--tasks: say how many shares the array has")
    if arguments.force:
        raise UserError("--force: not with --slurm; remove the output, or give another")
    if not check_inputs(config):
        show(f"{config.output}: up to date")
        return EXIT_OK
    cluster = slurm.cluster_of(arguments)
    submit_preparation(config, JobOptions(arguments.tasks, arguments.workers, cluster, arguments.dry_run))
    return EXIT_OK


def status_text(output: Path) -> str:
    """How far a preparation is, and the states of its jobs."""
    from megatron_synth.cluster.preparation import job_states
    from megatron_synth.data.preparing.shared import progress_text

    text = f"{output}: prepared" if (output / RECORD).is_file() else progress_text(output)
    return "\n".join([text, *(f"job {job}: {state.state}" for job, state in job_states(output).items())])


def _prepared(config: PrepareConfig, arguments: argparse.Namespace, workers: int) -> list[Prepared] | None:
    if arguments.ray is None:
        return prepare(config, workers=workers, force=arguments.force)
    if arguments.workers is not None:
        raise UserError(
            "--workers: not with --ray, which uses the processors that the cluster gives; see `ray start --num-cpus`"
        )
    from megatron_synth.cluster.ray_tasks import prepare_on_ray

    return prepare_on_ray(config, arguments.ray, force=arguments.force)


def _share(config: PrepareConfig, text: str, workers: int) -> int:
    share = Share.parse(text)
    found = prepare_share(config, share, workers=workers)
    if found is None:
        show(f"{config.output}: up to date")
        return EXIT_OK
    made, there = found
    show(f"{config.output}: share {text}: {made:,} splits tokenized, {there:,} were there; the command without --share goes on")
    return EXIT_OK


def main(argv: list[str]) -> int:
    """`megatron-synth prepare FILE [a.b=c ...] [--workers N] [--force]`, `prepare verify` and `prepare duplicates`."""
    if argv and argv[0] in ("verify", "duplicates"):
        return _check_verb(argv[0])(argv[1:])
    arguments = parser().parse_intermixed_args(argv)
    return run(load_file(PrepareConfig, arguments.file, arguments.overrides), arguments)


def run(config: PrepareConfig, arguments: argparse.Namespace) -> int:
    """Prepare as the options of `add_options` say; the exit code."""
    chosen = [f"--{name}" for name in ("share", "slurm", "ray", "status") if getattr(arguments, name) not in (None, False)]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)}: one of them at a time")
    if arguments.status:
        show(status_text(Path(config.output)))
        return EXIT_OK
    if arguments.slurm:
        return _submit(config, arguments)
    slurm.refuse_without_slurm(arguments, "tasks")
    workers = arguments.workers or core_count()
    start = time.perf_counter()
    try:
        with _stopped_by_a_scheduler():
            if arguments.share is not None:
                return _share(config, arguments.share, workers)
            with interruptible(lambda: _kept(Path(config.output))):
                prepared = _prepared(config, arguments, workers)
    except _Stopped:
        show(f"{config.output}: stopped on request; what is done is kept, and the same command goes on", error=True)
        return EXIT_STOPPED
    if prepared is None:
        show(f"{config.output}: up to date")
        return EXIT_OK
    show(format_table(prepared))
    for one in prepared:
        if one.skipped:
            listed = f"{config.output}/{one.manifest.name}/{SKIPPED}"
            show(f"{one.manifest.name}: {len(one.skipped):,} records were no text and are left out; {listed} lists them")
        packing, counts = one.manifest.packing, one.manifest.counts
        if packing is not None:
            show(
                f"{one.manifest.name}: {packing.cut_documents:,} of {counts.documents:,} documents are longer than "
                f"{packing.sequence_length} tokens and cut ({packing.cut_without:,} would be cut end to end); padding "
                f"{packing.padding_tokens / counts.tokens:.3%} of the tokens"
            )
    show(f"{config.output}: prepared in {time.perf_counter() - start:.1f} s")
    return EXIT_OK
