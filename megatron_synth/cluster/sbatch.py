"""SLURM jobs: from what is wanted to a batch script, and from there into the queue.

A job is a folder that holds all it needs: its script, the scripts that this one calls, and whatever the caller puts there.
The scripts are those of launch/; what is specific to a job is written into their head. Other packages use this module:

    spec = JobSpec("study", folder=runs / "job", chdir=Path.cwd(), gpus_per_node=1, cluster=load_cluster("default"))
    job = submit_array(spec, ["megatron-synth train ...", "..."], limit=8)
    slurm.states([job])
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_synth.cluster import slurm
from megatron_synth.config.cluster import ClusterConfig
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import load_file, shipped, validate
from megatron_synth.core.files import write_atomic

SCRIPTS = ("env.sh", "job.sh", "node.sh")
_MARK = "#--- settings\n"
_SAVE_MARGIN_S = 15
"""Between the moment at which torchrun kills ranks that have not saved yet and Slurm's own limit."""


@dataclass(frozen=True)
class JobSpec:
    """What is asked for. The cluster's settings say how."""

    name: str
    """Name of the job in the queue."""
    folder: Path
    """The job's folder, on a filesystem that all nodes see. It is made, and must not hold another job."""
    chdir: Path
    """Working directory of the job: relative paths of data start there."""
    arguments: tuple[str, ...] = ()
    """Arguments of `megatron-synth train` for each rank; those of an array come with it."""
    command: tuple[str, ...] = ()
    """What srun starts once on each node, instead of torchrun with training."""
    nodes: int = 1
    """Nodes; of each task in an array, always 1."""
    ranks_per_node: int = 1
    """Processes that torchrun starts on each node."""
    gpus_per_node: int = 0
    """GPUs of each node; 0 for CPUs alone."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The cluster's settings."""
    mounts: tuple[Path, ...] = ()
    """Folders that a container needs besides `folder` and `chdir`."""
    code: Path | None = None
    """Folder from which ranks import the package. Default: as in this process."""

    @property
    def log(self) -> Path:
        """Where the job writes; `%a` stands for the number of an array's task."""
        return self.folder / "job.log"


def load_cluster(name: str | None) -> ClusterConfig:
    """The settings in configs/cluster/NAME.yaml, in a file of one's own, or (None) the defaults.

    UserError, or ConfigError with all problems at once, if there is no such file or it is wrong.
    """
    if name is None:
        return ClusterConfig()
    path = name if name.endswith((".yaml", ".yml")) else f"cluster/{name}.yaml"
    return load_file(ClusterConfig, path)


def changed(cluster: ClusterConfig, **settings: object) -> ClusterConfig:
    """`cluster` with those `settings` that are not None, checked as a file is."""
    given = {name: value for name, value in settings.items() if value is not None}
    return validate(ClusterConfig, {**cluster.model_dump(), **given}, "cluster settings")


def render(spec: JobSpec) -> str:
    """The batch script of a training job on all nodes of `spec`."""
    options = [f"--nodes={spec.nodes}", f"--output={_literal(spec.log)}"]
    script = _render("train.sbatch", spec, options, spec.arguments)
    if spec.command:
        script = script[: script.rindex("run_step ")] + f"run_step {shlex.join(spec.command)}\n"
    return script


def render_array(spec: JobSpec, tasks: int, limit: int | None = None) -> str:
    """The batch script of an array that runs the lines of `spec.folder`/commands.txt, at most `limit` at a time."""
    assert tasks >= 1 and (limit is None or limit >= 1)
    array = f"--array=0-{tasks - 1}" + (f"%{limit}" if limit else "")
    options = ["--nodes=1", array, f"--output={_literal(spec.folder)}/task-%a.log"]
    return _render("array.sbatch", spec, options, [str(spec.folder / "commands.txt")])


def submit(spec: JobSpec) -> str:
    """Put a training job into the queue; its job id.

    Raises:
        UserError: SLURM refuses it, in its own words, or the folder holds another job. Nothing is left of it then.
    """
    return _submit(spec, render(spec), "train.sbatch", {})


def submit_array(spec: JobSpec, commands: Sequence[str], limit: int | None = None) -> str:
    """Put shell commands into the queue as tasks 0, 1, ... of one array, each on a node; the array's job id.

    Args:
        spec: what each task gets; its name and folder are those of the array.
        commands: one line each. Exit code 75 means "stopped on request, run me again", and is answered by a requeue.
        limit: tasks that run at a time.

    Raises:
        UserError: SLURM refuses the array, in its own words, or the folder holds another job. Nothing is left of it then.
    """
    assert commands and all(command.strip() and "\n" not in command for command in commands)
    content = {"commands.txt": "".join(f"{command}\n" for command in commands)}
    return _submit(spec, render_array(spec, len(commands), limit), "array.sbatch", content)


def _submit(spec: JobSpec, script: str, name: str, content: dict[str, str]) -> str:
    path = spec.folder / name
    if path.exists():
        raise UserError(f"{spec.folder}: holds a job already; a job needs a folder of its own")
    texts = {file: (shipped("launch") / file).read_text(encoding="utf-8") for file in SCRIPTS}
    texts |= {**content, name: script}
    slurm.test(script)
    spec.folder.mkdir(parents=True, exist_ok=True)
    try:
        for file, text in texts.items():
            # what `env:` of the cluster's settings holds, such as keys, stands in the script
            write_atomic(spec.folder / file, text, private=bool(file == name and spec.cluster.env))
        job = slurm.client(["sbatch", "--parsable", str(path)]).strip().partition(";")[0]
    except BaseException:
        for file in texts:
            (spec.folder / file).unlink(missing_ok=True)
        if not any(spec.folder.iterdir()):
            spec.folder.rmdir()
        raise
    write_atomic(spec.folder / "job.id", f"{job}\n")
    return job


def _render(template: str, spec: JobSpec, options: list[str], arguments: Sequence[str]) -> str:
    text = (shipped("launch") / template).read_text(encoding="utf-8")
    head, _, body = text.partition(_MARK)
    comments = [line for line in head.splitlines() if line.startswith("# ") and not line.startswith("#SBATCH")]
    lines = ["#!/usr/bin/env bash"]
    lines += [directive(option) for option in [*_options(spec), *options, *spec.cluster.sbatch]]
    lines += [*comments[:1], "set -uo pipefail", *_settings(spec), f"set -- {shlex.join(arguments)}"]
    return "\n".join(lines) + "\n" + body


def _options(spec: JobSpec) -> list[str]:
    cluster = spec.cluster
    asked = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.time,
        "mem": cluster.mem,
    }
    options = [f"--job-name={spec.name}", f"--chdir={spec.chdir}", "--ntasks-per-node=1"]
    options += [f"--{name}={value}" for name, value in asked.items() if value is not None]
    if spec.gpus_per_node:
        kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
        options.append(f"--gpus-per-node={kind}{spec.gpus_per_node}")
    if cluster.cpus_per_rank is not None:
        options.append(f"--cpus-per-task={cluster.cpus_per_rank * spec.ranks_per_node}")
    if cluster.exclusive:
        options.append("--exclusive")
    return [*options, f"--signal=B:USR1@{cluster.stop_lead_s}", "--requeue", "--open-mode=append"]


def _settings(spec: JobSpec) -> list[str]:
    """Assignments of the variables that the scripts read, and what a node does before its ranks."""
    cluster = spec.cluster
    values = {
        "LAUNCH": str(spec.folder),
        "JOB_DIR": str(spec.folder),
        "PYTHON": interpreter(cluster),
        "RANKS_PER_NODE": str(spec.ranks_per_node),
        "SAVE_WAIT": str(max(cluster.stop_lead_s - _SAVE_MARGIN_S, 5)),
        "MAX_RESTARTS": str(cluster.max_restarts),
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    if spec.code is not None:
        lines.append(f"export PYTHONPATH={shlex.quote(str(spec.code))}${{PYTHONPATH:+:$PYTHONPATH}}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()]
    lines += cluster.setup
    srun, runner = container_command(cluster, spec.chdir, (spec.folder, *spec.mounts), bool(spec.gpus_per_node))
    if srun:
        # the batch shell is outside the image: what it asks of Python runs as a step of its own
        lines.append(f"HOST_RUNNER=({shlex.join(['srun', '--nodes=1', '--ntasks=1', '--overlap', *srun])})")
    elif runner:
        lines += [f"HOST_RUNNER=({shlex.join(runner)})", 'NODE_RUNNER=("${HOST_RUNNER[@]}")']
    options = [*cluster.srun, *srun]
    if options:
        lines.append(f"SRUN_OPTIONS=({shlex.join(options)})")
    return lines


def interpreter(cluster: ClusterConfig) -> str:
    """The Python of a job: the cluster's, or the one that submits; in a container `python`."""
    return cluster.python or ("python" if cluster.container else sys.executable)


def container_command(cluster: ClusterConfig, chdir: Path, folders: Sequence[Path], gpus: bool) -> tuple[list[str], list[str]]:
    """Options of srun, and the command before each rank's, that start the cluster's container; both empty without one.

    Args:
        cluster: its settings.
        chdir: working directory inside.
        folders: further folders that are mounted under their own names.
        gpus: whether GPUs are used.
    """
    container = cluster.container
    if container is None:
        return [], []
    mounts = [*(f"{folder}:{folder}" for folder in dict.fromkeys((chdir, *folders))), *container.mounts]
    if container.runtime == "pyxis":
        inside = [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"]
        return [*inside, f"--container-workdir={chdir}", *container.options], []
    binds = [argument for mount in mounts for argument in ("--bind", mount)]
    command = ["apptainer", "exec", *(["--nv"] if gpus else []), *binds, "--pwd", str(chdir)]
    return [], [*command, *container.options, container.image]


def directive(option: str) -> str:
    """The `#SBATCH` line of one option, such as `--job-name=a b`.

    sbatch reads these lines with rules of its own: a quote or a backslash changes what follows, a line break ends the
    option, and what comes after it may be another option or a shell command. None of them can be written so that every
    version reads it back, so they are refused.

    Raises:
        UserError: the value holds one of them, or another character that cannot be shown.
    """
    for character in option:
        if character in "\"'\\" or not (character.isprintable() or character == " "):
            name, _, value = option.partition("=")
            raise UserError(
                f"{name}: {value!a} cannot be passed to Slurm, the character {character!a} has a meaning of its own there; "
                "choose another name"
            )
    return f'#SBATCH "{option}"' if " " in option or "#" in option else f"#SBATCH {option}"


def _literal(path: Path) -> str:
    """A path for `--output`, where Slurm replaces `%x` and the like."""
    return str(path).replace("%", "%%")
