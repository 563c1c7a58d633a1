"""The table of what each setting does, from the file that the measurement wrote."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def spread(ratios: Sequence[float]) -> str:
    """Ratios as `x1.01 (0.99 to 1.02)`: the median, the least and the largest."""
    return f"x{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})" if ratios else ""


def render(document: dict[str, Any]) -> str:
    """What `to_json` made, as Markdown."""
    from megatron_synth.bench.tables import header_lines, markdown_table

    config, base = document["config"], document["base"]
    model, train, blocks = config["model"], config["train"], base["step_s"]
    base_ms = 1000 * statistics.median(second for block in blocks for second in block)
    lines = [
        *header_lines(document),
        f"- base: {model['name']}, {config['precision']['dtype']}, sequence_length {train['sequence_length']}, "
        f"global_batch_size {train['global_batch_size']}, micro_batch_size {train['micro_batch_size']}; {document['layout']}",
        f"- base: {base_ms:.1f} ms/step, peak {base['peak_bytes'] / 2**20:.1f} MiB of tensors on the busiest rank, first step "
        f"after {base['first_step_s']:.1f} s",
        f"- each variant in processes of its own, in turn with the base: blocks of {len(blocks[0])} steps; ratios to the base "
        "in the same turn, median (min to max): below 1 is faster or smaller",
    ]
    lines += [f"- {one['turned_to']}: {one['status']}: {one['error']}" for one in document["levers"] if one["error"]]
    return "\n".join([*lines, "", *markdown_table(table_rows(document))])


def table_rows(document: dict[str, Any]) -> list[list[str]]:
    """One row per variant, then the levers that cannot be turned here, with the reason."""
    on_cpu = bool(document["base"]["cpu_step_s"][0])
    rows = [["lever", "turned to", "step time", *(["CPU time"] if on_cpu else []), "peak memory", "losses", "first step, s"]]
    blank = [""] * (len(rows[0]) - 3)
    for one in document["levers"]:
        row = [one["lever"], f"`{one['turned_to']}`"]
        if one["status"] != "measured":
            rows.append([*row, one["status"], *blank])
            continue
        apart = one["losses_apart"]
        row += [spread(one["step_time_ratios"]), *([spread(one["cpu_time_ratios"])] if on_cpu else [])]
        row += [f"x{one['peak_ratio']:.3f}", "bit-equal" if apart == 0 else f"within {apart:.0e}"]
        rows.append([*row, f"{one['first_step_s']:.1f}"])
    for one in document["refused"]:
        turned = f"`{' '.join(one['settings'])}`: " if one["settings"] else ""
        rows.append([one["lever"], f"{turned}not here: {one['reason']}", "", *blank])
    return rows
