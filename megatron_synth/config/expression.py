"""Expressions over columns of documents, such as `score >= 0.8 and kind in ('qa', 'textbook')`: which documents are meant.

    expression := comparison | expression (and | or) expression | not expression | ( expression )
    comparison := column (== | != | < | <= | > | >=) value | value ... column | low <= column < high
                | column (in | not in) (value, ...) | column (is | is not) None
    value      := number | 'text' | True | False

They are read by Python's parser and never run: whatever is not in this list is refused. Numbers are compared with int32 and
float32 (in the column's own precision), texts with categories and ids, these for equality alone. A document without a value is
in no comparison but `is None`, not even in `!=`; `not` takes all that the expression after it leaves out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_CHARACTERS, MAX_NODES = 4096, 1000


@dataclass(frozen=True)
class Expression:
    """An expression that was found to be one. `parse` makes it."""

    tree: ast.expr

    @property
    def canonical(self) -> str:
        """The expression in one spelling: as it is named in digests."""
        return ast.unparse(self.tree)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that it speaks of, each once."""
        return tuple(dict.fromkeys(node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)))


def parse(text: str) -> Expression:
    """The expression that a text spells.

    Raises:
        ValueError: it spells none; says what is wrong.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"has {len(text)} characters, at most {MAX_CHARACTERS} are read")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
            raise ValueError(f"has more than {MAX_NODES} parts")
        _check(tree)
    except SyntaxError as error:
        raise ValueError(f"no expression: {error.msg}{_at(error.offset)}; such as score >= 0.8 and kind == 'qa'") from None
    except (RecursionError, MemoryError):
        raise ValueError("nested too deeply to be read") from None
    return Expression(tree)


def _at(offset: int | None) -> str:
    return f" at character {offset}" if offset else ""


def _check(node: ast.expr) -> None:
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check(value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check(node.operand)
    elif isinstance(node, ast.Compare):
        for left, operator, right in pairs(node):
            _check_pair(node, left, operator, right)
    else:
        raise ValueError(_unknown(node, "expected comparisons such as score >= 0.8, joined by and, or, not"))


def _check_pair(node: ast.Compare, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> None:
    if isinstance(operator, ast.Is | ast.IsNot):
        if not (isinstance(left, ast.Name) and isinstance(right, ast.Constant) and right.value is None):
            raise ValueError(_unknown(node, "`is` asks whether a column has no value: column is None"))
    elif isinstance(operator, ast.In | ast.NotIn):
        if not (isinstance(left, ast.Name) and isinstance(right, ast.Tuple | ast.List | ast.Set)):
            raise ValueError(_unknown(node, "expected column in ('one', 'two'), with a comma after a single value"))
        for element in right.elts:
            constant(element)
    elif isinstance(left, ast.Name) == isinstance(right, ast.Name):
        raise ValueError(_unknown(node, "a comparison is between a column and a value"))
    else:
        constant(right if isinstance(left, ast.Name) else left)


def _unknown(node: ast.expr, expected: str) -> str:
    return f"`{ast.unparse(node)[:80]}` at character {node.col_offset + 1}: {expected}"


def pairs(node: ast.Compare) -> Iterator[tuple[ast.expr, ast.cmpop, ast.expr]]:
    """`a < b < c` as the comparisons a < b and b < c."""
    return zip([node.left, *node.comparators[:-1]], node.ops, node.comparators, strict=True)


def constant(node: ast.expr) -> Any:
    """A number, a text or a truth value.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = constant(node.operand)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float | str):
        return node.value
    raise ValueError(_unknown(node, "expected a number, a text in quotes, True or False"))
