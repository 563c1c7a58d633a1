"""What every benchmark's output begins with, and its tables, as Markdown and as JSON."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_synth.train.record.run_dir import device_name, git_state, versions


def header(verb: str, argv: Sequence[str]) -> dict[str, Any]:
    """When, where and from what a table was made, and the command that makes it again.

    Args:
        verb: such as `bench`.
        argv: the arguments after it.
    """
    import torch

    found = versions()
    try:
        found["transformers"] = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        found["transformers"] = "absent"
    return {
        "command": shlex.join([*_launcher(), verb, *argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(Path(__file__).parent),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "versions": found,
    }


def _launcher() -> list[str]:
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return ["megatron-synth"]
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    nodes = ["--nnodes", str(world_size // per_node)] if per_node < world_size else []
    return ["torchrun", *nodes, "--nproc-per-node", str(per_node), "-m", "megatron_synth"]


def header_lines(head: dict[str, Any]) -> list[str]:
    """A header as a Markdown list."""
    git = head["git"]
    commit = "none" if git is None else git["commit"] + (" with local changes" if git["dirty"] else "")
    versions_text = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    return [
        f"- command: `{head['command']}`",
        f"- date: {head['date']}, commit: {commit}",
        f"- device: {head['device']}, {head['threads']} host thread{'' if head['threads'] == 1 else 's'} per process",
        f"- versions: {versions_text}",
    ]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; `rows[0]` is the head, the first column is text and all others numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return [line(rows[0]), rule, *(line(row) for row in rows[1:])]
