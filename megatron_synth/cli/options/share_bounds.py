"""The option `--bounds` of verbs that search for mixtures."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.table.row_filter import number


def bounds_of(given: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Bounds by source of `--bounds SOURCE=LOW:HIGH`."""
    bounds = {}
    for text in given:
        name, _, span = text.partition("=")
        low, colon, high = span.partition(":")
        values = [number(part) for part in (low or "0", high or "1")]
        if not colon or None in values:
            raise UserError(f"--bounds '{text}': expected SOURCE=LOW:HIGH, such as web=0.2:0.9")
        bounds[name.strip()] = (float(values[0] or 0), float(values[1] or 0))
    return bounds
