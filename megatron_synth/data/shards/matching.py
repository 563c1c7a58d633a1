"""Which documents an expression over columns means (config/expression.py)."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_synth.config.expression import Expression, constant, pairs
from megatron_synth.data.shards.columns import ColumnInfo, Values, text_id

Mask = npt.NDArray[np.bool_]
Lookup = Callable[[str], tuple[ColumnInfo, Values]]
"""A column by its name, with its values [N]."""

_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Gt: np.greater,
    ast.GtE: np.greater_equal,
}
_MIRRORED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.LtE: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.LtE,
    ast.Eq: ast.Eq,
    ast.NotEq: ast.NotEq,
}


def matches(expression: Expression, lookup: Lookup) -> Mask:
    """[N] bool: which documents it means.

    Raises:
        ValueError: a column is compared with what it cannot hold.
    """
    return _matches(expression.tree, lookup)


def _matches(node: ast.expr, lookup: Lookup) -> Mask:
    if isinstance(node, ast.BoolOp):
        parts = [_matches(value, lookup) for value in node.values]
        joined: Mask = (np.logical_and if isinstance(node.op, ast.And) else np.logical_or).reduce(parts)
        return joined
    if isinstance(node, ast.UnaryOp):
        return ~_matches(node.operand, lookup)
    assert isinstance(node, ast.Compare)
    found = [_compared(left, operator, right, lookup) for left, operator, right in pairs(node)]
    every: Mask = np.logical_and.reduce(found)
    return every


def _compared(left: ast.expr, operator: ast.cmpop, right: ast.expr, lookup: Lookup) -> Mask:
    kind = type(operator)
    if not isinstance(left, ast.Name):
        left, kind, right = right, _MIRRORED[kind], left
    assert isinstance(left, ast.Name)
    column, values = lookup(left.id)
    missing = column.is_missing(values)
    if kind is ast.Is:
        return missing
    if kind is ast.IsNot:
        return ~missing
    if kind in (ast.In, ast.NotIn):
        assert isinstance(right, ast.Tuple | ast.List | ast.Set)
        among = np.zeros(len(values), np.bool_)
        for element in right.elts:
            among |= values == _stored(column, constant(element))
        return (~among if kind is ast.NotIn else among) & ~missing
    value = _stored(column, constant(right))
    if kind in (ast.Eq, ast.NotEq):
        equal: Mask = values == value
        return (~equal if kind is ast.NotEq else equal) & ~missing
    if column.type not in ("int32", "float32"):
        raise ValueError(f"column {column.name!r} holds texts ({column.type}), which have no order: compare with ==, != or in")
    ordered: Mask = _ORDER[kind](values, value) & ~missing
    return ordered


def _stored(column: ColumnInfo, value: Any) -> Any:
    """What a column holds for a value; of a category that no document has something that equals none."""
    if column.type in ("int32", "float32"):
        if isinstance(value, str):
            raise ValueError(f"column {column.name!r} holds numbers ({column.type}), not texts such as {value!r:.80}")
        if column.type == "int32":
            return value
        with np.errstate(over="ignore"):
            return np.float32(value)
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, float):
        raise ValueError(f"column {column.name!r} holds texts ({column.type}), not numbers such as {value}")
    if column.type == "id":
        return text_id(str(value))
    try:
        return column.categories.index(str(value))
    except ValueError:
        return -2
