"""Rules that choose rows, such as `tokens>100e9` or `n_params<=2B and arm!=natural`; read here, never evaluated as Python."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_synth.config.errors import UserError

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_COMPARISON = re.compile(r"\s*(?P<name>[^<>=!]+?)\s*(?P<operator>>=|<=|==|!=|>|<)\s*(?P<value>[^<>=!]+?)\s*")
_NUMBER = re.compile(r"(?P<digits>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)(?P<suffix>[kKMBT]?)")
_SUFFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def matching(rule: str, columns: Mapping[str, ArrayLike | Sequence[Any]], rows: int) -> NDArray[np.bool_]:
    """Which of the rows [M] the rule chooses.

    A rule is comparisons (`name OP value`, OP one of >= <= == != > <), joined by `and` and `or`; `and` binds more tightly.
    A value is a number, also as 100e9, 100B or 1/3, or, with == and !=, a text. Where a column of numbers has no number (nan)
    no comparison chooses the row.

    Raises:
        UserError: the rule cannot be read, or names no column.
    """
    chosen = np.zeros(rows, dtype=bool)
    for alternative in re.split(r"\s+or\s+", rule.strip()):
        every = np.ones(rows, dtype=bool)
        for comparison in re.split(r"\s+and\s+", alternative):
            every &= _compare(comparison, rule, columns)
        chosen |= every
    return chosen


def number(text: str) -> float | None:
    """The finite number that a text such as 100e9, 100B or 1/3 is; None if it is none."""
    parts = text.split("/")
    found = [_NUMBER.fullmatch(part.strip()) for part in parts]
    if len(parts) > 2 or not all(found):
        return None
    values = [float(match["digits"]) * _SUFFIXES[match["suffix"]] for match in found if match]
    if len(values) == 2:
        values = [values[0] / values[1]] if values[1] else [math.nan]
    return values[0] if math.isfinite(values[0]) else None


def _compare(comparison: str, rule: str, columns: Mapping[str, ArrayLike | Sequence[Any]]) -> NDArray[np.bool_]:
    match = _COMPARISON.fullmatch(comparison)
    if match is None:
        raise UserError(
            f"rule '{rule}': expected comparisons such as tokens>100e9, joined by 'and' or 'or'; got '{comparison}'"
        )
    name, sign, text = match["name"], match["operator"], match["value"]
    if name not in columns:
        raise UserError(f"rule '{rule}': there is no column '{name}'; one of: {', '.join(columns)}")
    values, value = np.asarray(columns[name]), number(text)
    if np.issubdtype(values.dtype, np.number):
        if value is None:
            raise UserError(f"rule '{rule}': column '{name}' holds numbers; '{text}' is none")
        if sign in ("==", "!="):  # a third in a file is 0.333333
            equal = np.isclose(values.astype(np.float64), value, rtol=1e-6, atol=0)
            return np.asarray(equal if sign == "==" else ~equal & ~np.isnan(values.astype(np.float64)), dtype=bool)
        return np.asarray(_OPERATORS[sign](values, value), dtype=bool)
    if sign not in ("==", "!="):
        raise UserError(f"rule '{rule}': column '{name}' holds text, which can only be compared with == and !=")
    return np.asarray(_OPERATORS[sign](values.astype(str), text.strip("'\"")), dtype=bool)
