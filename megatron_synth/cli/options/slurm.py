"""Options of verbs whose work can be an array of SLURM: which cluster, and what the jobs ask of it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from megatron_synth.config.errors import UserError

if TYPE_CHECKING:
    from megatron_synth.config.cluster import ClusterConfig

SETTINGS = ("partition", "account", "qos", "time")
"""Of the cluster, that an option replaces."""


def add_options(group: Any) -> None:
    """Add the options to a group of a parser."""
    group.add_argument("--cluster", metavar="NAME", help="settings: configs/cluster/NAME.yaml, or a file.yaml")
    for option in SETTINGS:
        group.add_argument(f"--{option}", help=f"the cluster's `{option}`, for these jobs")
    group.add_argument("--dry-run", action="store_true", help="check all and print the scripts; nothing is written")


def cluster_of(arguments: argparse.Namespace) -> ClusterConfig:
    """The cluster that the options name, with what they replace.

    Raises:
        UserError: there is no such cluster, or its file is wrong.
    """
    from megatron_synth.cluster.sbatch import changed, load_cluster

    return changed(load_cluster(arguments.cluster), **{name: getattr(arguments, name) for name in SETTINGS})


def refuse_without_slurm(arguments: argparse.Namespace, *more: str) -> None:
    """Refuse options that have no effect without `--slurm`; more: names of those that the verb has besides.

    Raises:
        UserError: names the first of them.
    """
    given = (*more, "cluster", *SETTINGS, "dry_run")
    if wrong := [name for name in given if getattr(arguments, name) not in (None, False)]:
        raise UserError(f"--{wrong[0].replace('_', '-')}: is for --slurm, which was not given")
