"""`megatron-synth submit CONFIG [a.b=c ...] --nodes N --gpus-per-node G`."""

from __future__ import annotations

import argparse
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from megatron_synth.cli.options.types import count, count_or_zero, on_disk
from megatron_synth.cli.train import default_run_dir
from megatron_synth.cluster import sbatch, slurm, snapshot
from megatron_synth.cluster.progress import jobs_of
from megatron_synth.config.cluster import ClusterConfig, ContainerConfig
from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.config.load import digest, load_file, to_yaml
from megatron_synth.config.schema import Config, Progress
from megatron_synth.core.files import write_atomic, write_json
from megatron_synth.core.log import human, say
from megatron_synth.data.loading.run_data import open_data
from megatron_synth.parallel.placement import check_placement
from megatron_synth.parallel.plan import Layout, plan
from megatron_synth.train.checkpoint import branch
from megatron_synth.train.record.run_dir import JOBS, RunDir, versions
from megatron_synth.train.record.run_lock import refuse_used


def main(argv: list[str]) -> int:
    """Check a run, write its job and put it into SLURM's queue. Returns the exit code."""
    options = parser().parse_intermixed_args(argv)
    config = load_file(Config, options.config, options.overrides)
    cluster = _cluster(options)
    gpus = options.gpus_per_node if options.gpus_per_node is not None else cluster.gpus_per_node
    if gpus is None:
        raise UserError("--gpus-per-node: say how many, 0 for nodes without GPUs, or name a --cluster that does")
    ranks = options.ranks_per_node or gpus
    if ranks == 0:
        raise UserError("--ranks-per-node: nodes without GPUs need it, there is one rank per GPU otherwise")
    if gpus and ranks != gpus:
        raise UserError(f"--ranks-per-node {ranks}: there is one rank per GPU, and {gpus} GPUs per node")
    layout = plan(config, options.nodes * ranks)
    if not options.allow_tp_across_nodes:
        check_placement(layout, [f"node {rank // ranks + 1}" for rank in range(layout.world_size)])
    run_dir = (options.run_dir or default_run_dir(options.config, config)).resolve()
    config = branch.resolved(config, run_dir)
    progress = branch.progress_of(config, run_dir)
    # sources are there, whole, and large enough
    open_data(config, check_length=False).check_length(config, progress)
    if not (run_dir / "run.json").exists():
        RunDir.check_free(run_dir)
    name = options.name or run_dir.name
    folder = run_dir / JOBS / datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]
    arguments = [str(folder / "config.yaml"), "--run-dir", str(run_dir)]
    if options.allow_tp_across_nodes:
        arguments.append("--allow-tp-across-nodes")
    spec = sbatch.JobSpec(
        name=name,
        folder=folder,
        chdir=Path.cwd(),
        arguments=tuple(arguments),
        nodes=options.nodes,
        ranks_per_node=ranks,
        gpus_per_node=gpus,
        cluster=cluster,
        mounts=(run_dir,),
        code=folder / "code",
    )
    say(f"run {name}: config {digest(config)}, {layout.describe()} on {options.nodes} nodes")
    if options.dry_run:
        script = sbatch.render(spec)
        if shutil.which("sbatch") is not None:
            say(f"sbatch: {slurm.test(script)}")
        say(f"would be {folder}/train.sbatch:\n\n{script}")
        return EXIT_OK
    _refuse_second_job(run_dir)
    job, code = _submit(spec, config, run_dir, layout)
    _announce(job, code, spec, run_dir, config, progress)
    return EXIT_OK


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth submit",
        description="Train on SLURM nodes. The run saves and goes back to the queue at its time limit, when it is preempted "
        "and when a node is lost, and resumes exactly; an error that comes again stops it.",
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="settings that replace those of the file")
    parser.add_argument("--nodes", type=count, required=True, metavar="N")
    parser.add_argument(
        "--gpus-per-node", type=count_or_zero, metavar="G", help="0 for nodes without GPUs; default: the cluster's"
    )
    parser.add_argument("--ranks-per-node", type=count, metavar="R", help="on nodes without GPUs: processes on each")
    parser.add_argument("--cluster", metavar="NAME", help="settings: configs/cluster/NAME.yaml, or a file.yaml")
    for option in ("partition", "account", "qos", "time"):
        parser.add_argument(f"--{option}", help=f"the cluster's `{option}`, for this job")
    parser.add_argument("--container", metavar="IMAGE", help="image that ranks run in")
    parser.add_argument("--stop-lead", type=count_or_zero, metavar="SECONDS", help="before the time limit, to save and stop")
    parser.add_argument("--max-restarts", type=count_or_zero, metavar="N", help="restarts after failures")
    parser.add_argument("--run-dir", type=on_disk, help="default: runs/<name of the file>-<digest of the configuration>")
    parser.add_argument("--name", help="name in the queue; default: that of the run directory")
    parser.add_argument("--allow-tp-across-nodes", action="store_true", help="tensor-parallel groups may span nodes")
    parser.add_argument("--dry-run", action="store_true", help="check all and print the script; nothing is written")
    return parser


def _cluster(options: argparse.Namespace) -> ClusterConfig:
    cluster = sbatch.load_cluster(options.cluster)
    container = cluster.container
    if options.container is not None:
        container = (container or ContainerConfig(image=options.container)).model_copy(update={"image": options.container})
    return sbatch.changed(
        cluster,
        partition=options.partition,
        account=options.account,
        qos=options.qos,
        time=options.time,
        stop_lead_s=options.stop_lead,
        max_restarts=options.max_restarts,
        container=None if container is None else container.model_dump(),
    )


def _refuse_second_job(run_dir: Path) -> None:
    """Two jobs in one run directory would write over each other, as would a job and who trains there without one."""
    refuse_used(run_dir)
    jobs = [job.id for job in jobs_of(run_dir) if job.id is not None]
    active = [(job, state) for job, state in slurm.states(jobs).items() if state.active]
    if active:
        job, state = active[0]
        raise UserError(
            f"{run_dir}: job {job} of this run is {state.state} already, and goes on by itself; "
            f"`scancel {job}` ends it, or choose another --run-dir"
        )


def _submit(spec: sbatch.JobSpec, config: Config, run_dir: Path, layout: Layout) -> tuple[str, str]:
    """Write the job's folder and submit it; the job's id and what code it runs. Nothing is left of a refused one."""
    slurm.test(sbatch.render(spec))
    made = next(folder for folder in (run_dir, run_dir / JOBS, spec.folder) if not folder.exists())
    spec.folder.mkdir(parents=True)
    try:
        write_atomic(spec.folder / "config.yaml", to_yaml(config))
        assert spec.code is not None
        code = snapshot.take(spec.code)
        info = {
            "run_dir": str(run_dir),
            "digest": digest(config),
            "layout": layout.describe(),
            "nodes": spec.nodes,
            "ranks_per_node": spec.ranks_per_node,
            "gpus_per_node": spec.gpus_per_node,
            "code": code,
            "versions": versions(),
            "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
            "submitted_by": os.environ.get("USER", str(os.getuid())),
        }
        write_json(spec.folder / "job.json", info)
        return sbatch.submit(spec), code
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _announce(job: str, code: str, spec: sbatch.JobSpec, run_dir: Path, config: Config, progress: Progress) -> None:
    tokens = human(config.samples_at_end(progress) * config.window_length)
    shown = os.path.relpath(run_dir)
    say(f"job {job} is in the queue: {config.train.steps} steps, {tokens} tokens, code {code}")
    say(f"  {spec.folder}")
    say(f"  megatron-synth status {shown} --watch")
    say(f"  megatron-synth logs {shown} --follow")
    say(f"  scancel --signal=USR1 {job}    saves and requeues it;  scancel {job}    ends it")
