"""The file that `megatron-synth submit --cluster` reads: how jobs are asked for on one SLURM cluster."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_synth.config.prepare import as_tuple
from megatron_synth.config.section import NonNegativeInt, PositiveInt, Section

# minutes, minutes:seconds, hours:minutes:seconds; after days: hours, hours:minutes, hours:minutes:seconds
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d\d))?(?::(?P<third>\d\d))?")
_EARLY_S = 60
"""SLURM may send a job's signal so much earlier than asked."""


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_as_text)]
"""A string that may be written as a number: `time: 60`, `mem: 0`."""


def time_limit_s(text: str) -> int | None:
    """Seconds of a time limit in any of SLURM's forms; None if it is none of them."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    parts = [int(part) for part in match.group("first", "second", "third") if part is not None]
    scale = (3600, 60, 1) if match["days"] is not None else (3600, 60, 1) if len(parts) == 3 else (60, 1, 0)
    return int(match["days"] or 0) * 86_400 + sum(part * factor for part, factor in zip(parts, scale, strict=False))


class ContainerConfig(Section):
    """The image that ranks run in. The working directory, the job folder and the run directory are always mounted."""

    image: str
    """Image: a .sqsh file or registry name for pyxis, a .sif file or docker:// name for apptainer."""
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """What starts it: SLURM's pyxis plugin, or apptainer (also named singularity)."""
    mounts: tuple[str, ...] = ()
    """Further folders as `outside:inside`, such as data and tokenizers."""
    options: tuple[str, ...] = ()
    """Further arguments for srun (pyxis) or `apptainer exec`."""


class ClusterConfig(Section):
    """A SLURM cluster, as its users ask for jobs."""

    partition: str | None = None
    """Partition. Default: the cluster's."""
    account: str | None = None
    """Account that is charged. Default: the user's."""
    qos: str | None = None
    """Quality of service. Default: the user's."""
    time: Text | None = None
    """Time limit of a job: `minutes`, `hours:minutes:seconds` or `days-hours:minutes:seconds`. Default: the partition's.
    A run may take longer: before the limit it saves and goes back to the queue."""
    gpus_per_node: NonNegativeInt | None = None
    """GPUs of a node. Default: must be given to `submit`."""
    gpu_type: str | None = None
    """Type of GPU as the cluster names it, such as `h100`."""
    cpus_per_rank: PositiveInt | None = None
    """Cores for each rank. Default: the cluster's, which may be a single one per node: name it."""
    mem: Text | None = None
    """Memory per node, such as `480G`; `0` is all of it. Default: the cluster's."""
    exclusive: bool = False
    """Ask for whole nodes."""
    stop_lead_s: Annotated[int, Field(ge=20)] = 300
    """How long before the time limit a run is asked to save and stop. SLURM may do it up to 60 s earlier. Longer than a
    step and a save take together."""
    max_restarts: NonNegativeInt = 20
    """Restarts after failures; those after a time limit or a preemption do not count."""
    sbatch: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Further options of sbatch, such as `--constraint=ib` or `--reservation=NAME`."""
    srun: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Further options of srun, such as `--mpi=none`."""
    setup: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Shell lines of the job before its ranks start, such as `module load cuda/12.8`. What they export reaches every node."""
    env: dict[str, str] = {}
    """Environment variables of the ranks. They win over those of launch/env.sh."""
    python: str | None = None
    """Interpreter of the ranks. Default: the one that submits; in a container, `python`."""
    container: ContainerConfig | None = None
    """Image that ranks run in. Default: none."""

    @model_validator(mode="after")
    def _sound(self) -> ClusterConfig:
        if self.time is not None:
            limit = time_limit_s(self.time)
            if limit is None:
                raise ValueError(f"time: expected minutes, h:mm:ss or d-hh:mm:ss, got '{self.time}'")
            if limit <= self.stop_lead_s + _EARLY_S:
                stopped = (
                    f"stop_lead_s: runs are asked to stop {self.stop_lead_s} s before the limit, up to {_EARLY_S} s earlier"
                )
                raise ValueError(f"{stopped}, which leaves nothing of the {limit} s of time '{self.time}'")
        for option in (*self.sbatch, *self.srun):
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"sbatch and srun: expected options such as --constraint=ib, got '{option}'")
        wrong = [name for name in self.env if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)]
        if wrong:
            raise ValueError(f"env: '{wrong[0]}' cannot be the name of an environment variable")
        return self
