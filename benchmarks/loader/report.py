"""One table of what several runs of `python -m benchmarks loader --json` have measured, such as one run per loader."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.loader.measure import package_lines, table_rows
from megatron_synth.bench.tables import header_lines, markdown_table
from megatron_synth.config.errors import EXIT_OK, UserError


def render(contents: Sequence[dict[str, Any]]) -> str:
    """The loaders of all files in one table; of loaders that occur again the last.

    Raises:
        UserError: the runs are not alike: another device, other versions or amounts of data.
    """
    first = contents[0]
    for other in contents[1:]:
        for key in ("device", "threads", "versions", "tokens"):
            if other[key] != first[key]:
                raise UserError(
                    f"no one table of unlike runs: {key} is {first[key]} in `{first['command']}` and {other[key]} in "
                    f"`{other['command']}`"
                )
    head = [line for line in header_lines(first) if not line.startswith(("- command", "- date"))]
    commands = "`, `".join(dict.fromkeys(one["command"] for one in contents))
    commits = dict.fromkeys(
        "none" if one["git"] is None else one["git"]["commit"] + " with local changes" * one["git"]["dirty"] for one in contents
    )
    dates = sorted(one["date"] for one in contents)
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    loaders = {loader["name"]: loader for one in contents for loader in one["loaders"]}
    results = list(loaders.values())
    lines = [f"- command: `{commands}`", f"- date: {when}, commit: {', '.join(commits)}", *head]
    lines += package_lines(results, first["versions"])
    return "\n".join([*lines, "", *markdown_table(table_rows(results))])


def main(argv: list[str]) -> int:
    """`python -m benchmarks loader-report FILE...`: one table of several files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks loader-report", description="One table of several measurements."
    )
    parser.add_argument("files", nargs="+", type=Path, help="what `python -m benchmarks loader --json` wrote")
    options = parser.parse_args(argv)
    contents = []
    for file in options.files:
        try:
            contents.append(json.loads(file.read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: {error}") from None
        if not isinstance(contents[-1], dict) or "loaders" not in contents[-1]:
            raise UserError(f"{file}: not written by `python -m benchmarks loader --json`")
    print(render(contents))
    return EXIT_OK
