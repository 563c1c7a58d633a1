"""`megatron-synth train CONFIG [a.b=c ...]`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_synth.cli.options.types import count
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import digest, load_file
from megatron_synth.config.schema import Config
from megatron_synth.core.log import say
from megatron_synth.storage.remote import SCHEMES


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth train",
        description="Train a model on an exact mixture. A run directory that holds a checkpoint is resumed.",
        epilog="On N processes: launch/local.sh N CONFIG, or torchrun --nproc-per-node N -m megatron_synth train CONFIG",
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="settings that replace those of the file")
    parser.add_argument("--run-dir", type=Path, help="default: runs/<name of the file>-<digest of the configuration>")
    parser.add_argument("--dry-run", action="store_true", help="no GPU, no tokens read: check and describe the run")
    parser.add_argument("--world-size", type=count, help="ranks that a dry run plans for; default: this launch's")
    parser.add_argument(
        "--allow-tp-across-nodes", action="store_true", help="train even if tensor-parallel groups span nodes, which is slow"
    )
    return parser


def main(argv: list[str]) -> int:
    """Train, or say what would be trained. Returns the exit code."""
    arguments = parser().parse_intermixed_args(argv)
    config = load_file(Config, arguments.config, arguments.overrides)
    world_size = arguments.world_size or int(os.environ.get("WORLD_SIZE", 1))
    run_path = arguments.run_dir or default_run_dir(arguments.config, config)
    if run_path.parts[:1] and run_path.parts[0] in {f"{scheme}:" for scheme in SCHEMES}:
        raise UserError(
            f"--run-dir: {run_path}: expected a folder on a disk; checkpoints go to object storage by checkpoint.upload_to"
        )
    from megatron_synth.train.checkpoint import branch, fetched, files
    from megatron_synth.train.checkpoint.bucket import Bucket

    config = branch.resolved(config, run_path)
    if arguments.dry_run:
        from megatron_synth.train.dryrun import dry_run

        say(dry_run(config, world_size, branch.progress_of(config, run_path)))
        return 0

    from megatron_synth.data.loading.run_data import open_data
    from megatron_synth.data.shards.source import WHOLE
    from megatron_synth.parallel.plan import plan
    from megatron_synth.train.record.run_lock import refuse_used

    layout = plan(config, world_size)
    refuse_used(run_path)  # all ranks of a machine, before they wait for each other
    say(f"{arguments.config}: {layout.describe()}, to {run_path}; opens the data, then loads the engine, some seconds")
    # how long a run that goes on is follows from its checkpoint, which all ranks read together
    resumes = bool(files.candidates(run_path))
    if config.checkpoint.upload_to is not None:  # asked at once, whether it can be reached
        resumes = Bucket(config.checkpoint.upload_to).has_any() or resumes
    goes_on = resumes or config.checkpoint.branch_from is not None
    if not resumes:
        # each node copies what is in object storage before ranks wait for each other, which has a limit of time
        trunk = branch.trunk_of(config, run_path)
        other = config.checkpoint.init_from if trunk is None else trunk.url
        if other is not None:
            fetched.local(other, "checkpoint.init_from" if trunk is None else "checkpoint.branch_from")
    part = (int(os.environ.get("RANK", 0)), world_size) if "RANK" in os.environ else WHOLE
    data = open_data(config, staged=True, check_length=not goes_on, part=part)
    from megatron_synth.train.loop import train

    return train(config, layout, data, run_path, tensor_across_nodes=arguments.allow_tp_across_nodes)


def default_run_dir(file: str | Path, config: Config) -> Path:
    """Run directory of a configuration read from `file`, relative to the working directory."""
    return Path("runs") / f"{Path(file).stem}-{digest(config)}"
