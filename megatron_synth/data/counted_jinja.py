"""Jinja's sandbox for templates of strangers, with a limit of steps.

A step is a turn of a loop, a call, a filter, or so many characters of a text that is made. Steps are counted, not timed: a
template is refused on every machine or on none, in any process and thread. Numbers that make long texts of short ones at once,
as in `'x' * 10 ** 9`, are refused before they do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import Any, cast

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

STEPS = 1_000_000
"""Of one rendering, if its caller allows no more: hundreds of times what templates of models take."""
CHARACTERS = 64
"""Of a text that cost as much as a step."""
LARGEST = 1_000_000
"""Numbers that a template may give to methods of texts and to filters, and items that it may repeat."""
_GROWING = frozenset(
    ("replace", "join", "wordwrap", "expandtabs", "center", "ljust", "rjust", "zfill", "indent", "batch", "slice", "xmlattr")
)
"""Methods and filters that make as much as two of their values multiplied."""
_CALL = 4
"""Steps of a call, such as that of a macro."""
_UNSIZED = 100_000
"""Items that something without a length may have: the sandbox has no longer range."""
_WIDE_FORMAT = re.compile(r"\d{6}|%[^a-zA-Z%]*\*|:[^{}]*\{")
"""In a format: a width of six digits, and one that is an argument."""
_MOST_BITS = 4096


class TooManySteps(Exception):
    """A rendering took more steps than it may."""


class _Namespace(Namespace):
    """A namespace that keeps no names of the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        own, *others = args
        attributes = dict(*others, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(own, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace holds no {name!r:.80}: names that begin with _ are the interpreter's")


class _Dict:
    """`dict` without the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class CountedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox that counts steps. Of one thread at a time."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        """options: of Jinja's environment."""
        super().__init__(finalize=self._finalized, **options)
        self._limit = self._left = STEPS
        for name, of_values in list(self.filters.items()):
            self.add_filter(name, of_values)
        for name, test in list(self.tests.items()):
            self.tests[name] = self._counting(name, cast(Callable[..., Any], test))
        self.filters["_made"] = self._finalized
        self.globals.pop("lipsum")  # makes another text each time, of any length
        self.globals.update(dict=_Dict(), namespace=_Namespace)

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Let templates use a function as a filter, which costs by what it gets and makes."""
        self.filters[name] = self._counting(name, function)

    def begin(self, limit: int = STEPS) -> None:
        """Start a rendering of at most so many steps."""
        self._limit = self._left = limit

    def spend(self, steps: int) -> None:
        """Take steps from what is left."""
        self._left -= steps
        if self._left < 0:
            raise TooManySteps(f"more than {self._limit:,} steps")

    @property
    def step(self) -> bool:
        """A step, where compiled code reads this attribute; always true."""
        self._left -= 1
        if self._left < 0:
            self.spend(0)
        return True

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method from a template, which costs by what it gets and what it makes."""
        own = getattr(function, "__self__", None)
        if isinstance(own, str):
            self._check(function.__name__, own, *args, *kwargs.values())
        else:
            self.spend(_CALL)
        made = super().call(context, function, *args, **kwargs)
        self.spend(_cost(made))
        return made

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute what an operator makes of two values."""
        if operator == "+" and isinstance(left, str):  # nearly all that templates do
            made: Any = left + right
            self.spend(len(made) // CHARACTERS)
            return made
        if operator == "*" and not (isinstance(left, float) or isinstance(right, float)):
            sizes = [len(one) if hasattr(one, "__len__") else abs(int(one)) for one in (left, right)]
            if (hasattr(left, "__len__") or hasattr(right, "__len__")) and sizes[0] * sizes[1] > LARGEST:
                raise TooManySteps(f"a text or list of {sizes[0] * sizes[1]:,}, at most {LARGEST:,}")
        if operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MOST_BITS:
            raise TooManySteps(f"a number of more than {_MOST_BITS} bits")
        if operator == "%" and isinstance(left, str):
            self._check_format(left)
        made = super().call_binop(context, operator, left, right)
        self.spend(_cost(made))
        if isinstance(made, int) and made.bit_length() > _MOST_BITS:
            raise TooManySteps(f"a number of more than {_MOST_BITS} bits")
        return made

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """As the sandbox makes `format` of a text safe; a text that asks for great widths has none."""
        found = super().wrap_str_format(value)
        if found is not None:
            self._check_format(value.__self__)
        return found

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may see an attribute: no translation of a text, whose length nothing tells before."""
        return attr != "translate" and super().is_safe_attribute(obj, attr, value)

    def _generate(self, source: nodes.Template, name: Any, filename: Any, defer_init: bool = False) -> str:
        counted = _Counting().visit(source)
        counted.set_environment(self)
        return super()._generate(counted, name, filename, defer_init)

    def _finalized(self, value: Any) -> Any:
        """A value that becomes text, as it is."""
        if isinstance(value, str):
            self._left -= len(value) // CHARACTERS
            if self._left >= 0:
                return value
        self.spend(_cost(value))
        return value

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or test that costs by what it gets and what it makes."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # context, environment or the like

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if name == "format" and isinstance(args[first], str):
                self._check_format(args[first])
            else:
                self._check(name, *args[first:], *kwargs.values())
            made = function(*args, **kwargs)
            self.spend(_cost(made))
            return made

        return counted

    def _check_format(self, text: str) -> None:
        self.spend(1 + len(text) // CHARACTERS)
        if _WIDE_FORMAT.search(text):
            raise TooManySteps("a format of any width")

    def _check(self, name: str, value: Any, *others: Any) -> None:
        """Spend what it costs to go over values, and refuse what would make much of little. value: of which it is a method."""
        self.spend(1 + _cost(value) + sum(map(_cost, others)))
        numbers = [abs(one) for one in others if isinstance(one, int)]
        if numbers and max(numbers) > LARGEST:
            raise TooManySteps(f"{name} with a number of more than {LARGEST:,}")
        if name in _GROWING:
            sizes = [len(one) if hasattr(one, "__len__") else _UNSIZED for one in (value, *others) if not isinstance(one, int)]
            *_, before, most = sorted([1, 1, *sizes, *numbers])
            if name == "replace" and isinstance(value, str) and len(others) > 1 and isinstance(others[0], str):
                before, most = value.count(others[0]), sizes[2] if len(sizes) > 2 else 1
            if before * most > CHARACTERS * LARGEST:
                raise TooManySteps(f"{name} that makes up to {before * most:,} characters, at most {CHARACTERS * LARGEST:,}")


class _Counting(NodeTransformer):
    """Puts steps into loops, and around what is made or compared without a call."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        """A step for each turn, and for each item that a condition leaves out."""
        self.generic_visit(node)
        written = sum(len(one.data) for one in node.find_all(nodes.TemplateData)) // CHARACTERS
        # a loop around much text has several steps
        node.body[:0] = [nodes.ExprStmt(_step(node), lineno=node.lineno) for _ in range(1 + min(written, 1000))]
        if node.test is not None:
            node.test = nodes.And(_step(node), node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        """What `~` makes."""
        self.generic_visit(node)
        return _made(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        """A slice."""
        self.generic_visit(node)
        return _made(node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        """Values that are compared."""
        self.generic_visit(node)
        if not isinstance(node.expr, nodes.Const):
            node.expr = _made(node.expr)
        for operand in node.ops:
            if not isinstance(operand.expr, nodes.Const):
                operand.expr = _made(operand.expr)
        return node


def _step(node: nodes.Node) -> nodes.EnvironmentAttribute:
    return nodes.EnvironmentAttribute("step", lineno=node.lineno)


def _made(node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, "_made", [], [], None, None, lineno=node.lineno)


def _cost(made: Any) -> int:
    """Steps of a value that was made."""
    return (
        len(made) // CHARACTERS if isinstance(made, str) else len(made) if isinstance(made, (list, tuple, dict, range)) else 0
    )
