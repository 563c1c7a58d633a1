"""Jinja's sandbox for untrusted templates, with a limit of steps.

A step is a turn of a loop, a call, a filter, an item that is gone over, or so many characters of a text. Steps are counted, not
timed: a template is refused on every machine or on none, in any process and thread. What makes much of little at once, as
`'x' * 10 ** 9` does, is refused before it does.

What is made costs its own size. What a filter, a comparison or an output goes over costs all that is in it, each time that it
is there: lists that hold themselves twice, again and again, are short, and their text is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Set
from functools import wraps
from types import MappingProxyType
from typing import Any, cast

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

STEPS = 1_000_000
"""Of one rendering, if its caller allows no more: hundreds of times what templates of models take."""
CHARACTERS = 64
"""Of a text that cost as much as a step."""
LARGEST = 1_000_000
"""Numbers that a template may give to what makes long texts, and items that it may repeat."""
LONGEST_TEMPLATE = 200_000
"""Characters: several times the longest of any model."""
DEEPEST = 100
"""Lists in lists."""
_NODES = 32
"""Of a template's syntax, that cost as much as a step where they are run again."""
_GROWING = frozenset(
    ("replace", "join", "wordwrap", "expandtabs", "center", "ljust", "rjust", "zfill", "indent", "batch", "slice", "xmlattr")
)
"""Methods and filters that make as much as two of their values multiplied."""
_OF_ITEMS = frozenset(("join", "batch", "slice", "xmlattr"))
"""Of these, those that take items; the others take any value as its text."""
_SEARCHING = frozenset(
    (
        "find",
        "rfind",
        "index",
        "rindex",
        "count",
        "split",
        "rsplit",
        "partition",
        "rpartition",
        "strip",
        "lstrip",
        "rstrip",
        "trim",
    )
)
"""Methods and filters that may look at two texts' characters multiplied."""
_TEST = "is "
"""Before the name of a test: some filters have the same."""
_AT_ONCE = frozenset("length count first last default d attr".split()).union(
    _TEST + name
    for name in "boolean callable defined escaped filter float integer iterable mapping none number sameas sequence string "
    "test true false undefined".split()
)
"""Filters and tests that do not go over their value."""
_LAZY = frozenset("map select reject selectattr rejectattr items reverse list batch slice".split())
"""Filters that hand items on as they are."""
_ITERATING = frozenset((*"join sort unique groupby min max sum".split(), _TEST + "in"))
"""Filters and tests that go over what others hand on."""
_BY_ATTRIBUTE = frozenset("join sort unique groupby min max sum selectattr rejectattr map".split())
"""Filters that apply one of their values to each item."""
_LONGEST_PATH = 200
_METHODS_AT_ONCE = frozenset(("get", "keys", "values", "items", "copy"))
"""Of dicts."""
_HIDDEN = frozenset(("translate", "encode", "to_bytes"))
"""Methods whose results no length tells before, or are bytes, which have methods of texts."""
_REMOVED = ("random", "urlize", "pprint")
"""Filters: one makes another text each time, others take time that nothing tells before."""
_CALL = 4
"""Steps of a call, such as that of a macro."""
_MOST_DIGITS = 1000
"""That `round` may keep."""
_NUMBER = re.compile(r"\d+")
_WIDE_FORMAT = re.compile(r"\d{6}|%[^a-zA-Z%]*\*|:[^{}]*\{")
"""In a format: a width of six digits, and one that is an argument."""
_MOST_BITS = 4096
_HOLDING: Any = (list, tuple, dict, range, type({}.keys()), type({}.values()), type({}.items()), MappingProxyType)


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

    def __repr__(self) -> str:
        return "<Namespace>"  # not what it holds, which may be itself, or long


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace holds no {name!r:.80}: names that begin with _ are the interpreter's")


class _Dict:
    """`dict` without the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class CountedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox that counts steps. Of one thread at a time."""

    intercepted_binops = frozenset(("+", "-", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        """options: of Jinja's environment."""
        # what is worked out when a template is compiled would cost nothing when it runs
        super().__init__(finalize=self._finalized, optimized=False, **options)
        self._limit = self._left = STEPS
        for name in _REMOVED:
            del self.filters[name]
        for name, of_values in list(self.filters.items()):
            self.add_filter(name, of_values)
        for name, test in list(self.tests.items()):
            self.tests[name] = self._counting(_TEST + name, cast(Callable[..., Any], test))
        self.filters.update(_made=self._paid, _used=self._used, _sought=self._sought, _steps=self._steps)
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

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method from a template, which costs by what it gets and what it makes."""
        own = getattr(function, "__self__", None)
        if not isinstance(function, (Macro, BlockReference, LoopContext)):  # these hand on what they get
            args = tuple(self._items(one) for one in args)
            if isinstance(own, str):
                self._check(function.__name__, own, args, kwargs)
            else:
                for one in (*args, *kwargs.values()):
                    self._go_over(one)
                if not (isinstance(own, dict) and function.__name__ in _METHODS_AT_ONCE):
                    self._go_over(own)
        self.spend(_CALL + len(args) + len(kwargs))
        return self._paid(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute what an operator makes of two values."""
        if operator == "+" and isinstance(left, str):  # nearly all that templates do
            made: Any = left + right
            self.spend(len(made) // CHARACTERS)
            return made
        if operator == "-" and (isinstance(left, Set) or isinstance(right, Set)):
            raise SecurityError("keys less other keys have no order that is always the same")
        if operator == "*" and not (isinstance(left, float) or isinstance(right, float)):
            sizes = [len(one) if hasattr(one, "__len__") else abs(int(one)) for one in (left, right)]
            if (hasattr(left, "__len__") or hasattr(right, "__len__")) and sizes[0] * sizes[1] > LARGEST:
                raise TooManySteps(f"a text or list of {sizes[0] * sizes[1]:,}, at most {LARGEST:,}")
        if operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MOST_BITS:
            raise TooManySteps(f"a number of more than {_MOST_BITS} bits")
        if operator == "%" and isinstance(left, str):
            self._check_format(left, "%", (right,))
        return self._paid(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """As the sandbox makes `format` of a text safe; a text that asks for great widths is refused."""
        found = super().wrap_str_format(value)
        if found is None:
            return None

        def counted(*args: Any, **kwargs: Any) -> str:
            self._check_format(value.__self__, "{", (*args, *kwargs.values()))
            return found(*args, **kwargs)

        return counted

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may see an attribute."""
        return attr not in _HIDDEN and super().is_safe_attribute(obj, attr, value)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > LONGEST_TEMPLATE:
            raise TemplateSyntaxError(f"{len(source):,} characters, at most {LONGEST_TEMPLATE:,}", 1, name, filename)
        return super()._parse(source, name, filename)

    def _generate(self, source: nodes.Template, name: Any, filename: Any, defer_init: bool = False) -> str:
        counted = _Counting().visit(source)
        counted.set_environment(self)
        return super()._generate(counted, name, filename, defer_init)

    @pass_context  # or Jinja would finalize what is constant when it compiles
    def _finalized(self, _: Any, value: Any) -> Any:
        """A value that becomes text, as it is."""
        if isinstance(value, str):
            self._left -= len(value) // CHARACTERS
            if self._left >= 0:
                return value
        self._go_over(value)
        return value

    def _used(self, value: Any) -> Any:
        """A value that is compared, looked up or becomes part of a text, as it is."""
        self._go_over(value)
        return value

    def _sought(self, value: Any) -> Any:
        """A value in which another is sought, as it is."""
        if isinstance(value, dict):
            return value
        return self._used(self._items(value))

    def _steps(self, number: int) -> bool:
        """Spend steps; always true."""
        if type(number) is not int or number < 1:  # a template may ask for this filter by its name
            raise SecurityError("no number of steps")
        self._left -= number
        if self._left < 0:
            self.spend(0)
        return True

    def _paid(self, made: Any) -> Any:
        """A value that was made, as it is."""
        if isinstance(made, int) and made.bit_length() > _MOST_BITS:
            raise TooManySteps(f"a number of more than {_MOST_BITS} bits")
        self.spend(_size(made))
        return made

    def _items(self, value: Any) -> Any:
        """The items of what hands on others' one by one, as a list; any other value as it is."""
        if not isinstance(value, Iterator):
            return value
        found = []
        for one in value:
            self.spend(1)
            found.append(one)
        return found

    def _go_over(self, value: Any) -> int:
        """Spend what it costs to go over a value with all that is in it, and tell how much that is."""
        if not isinstance(value, _HOLDING):
            steps = _size(value)
            self.spend(steps)
            return steps
        before, level = self._left, [value]
        for _ in range(DEEPEST):
            inner: list[Any] = []
            for one in level:
                self.spend(_size(one))
                if isinstance(one, (dict, MappingProxyType)):
                    inner += one
                    inner += one.values()
                elif isinstance(one, _HOLDING) and not isinstance(one, range):
                    inner += one
            if not inner:
                return before - self._left
            level = inner
        raise TooManySteps(f"a value of lists in lists, {DEEPEST} or more deep")

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or test that costs by what it gets and what it makes."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # context, environment or the like

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if len(args) > first:
                value, others = args[first], args[first + 1 :]
                if name in _ITERATING:
                    value, others = self._items(value), tuple(map(self._items, others))
                    args = (*args[:first], value, *others)
                if name in _BY_ATTRIBUTE:
                    _check_path(name, others, kwargs)
                if name == "format" and isinstance(value, str):
                    self._check_format(value, "%", (*others, *kwargs.values()))
                else:
                    self._check(name, value, others, kwargs)
            return self._paid(function(*args, **kwargs))

        return counted

    def _check_format(self, text: str, mark: str, values: tuple[Any, ...]) -> None:
        """Refuse a format that makes much of little. mark: begins a field in it."""
        fields = text.count(mark)
        self.spend(1 + fields + len(text) // CHARACTERS)
        if _WIDE_FORMAT.search(text):
            raise TooManySteps("a format of any width")
        widest = max(map(int, _NUMBER.findall(text)), default=0)
        each = widest + CHARACTERS * (len(values) + sum(map(self._go_over, values)))
        _refuse_long("a format", fields, each)

    def _check(self, name: str, value: Any, others: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Spend what it costs to go over values, and refuse what would make much of little. value: of which it is a method."""
        given = (*others, *named.values())
        self.spend(1 + len(given))
        if name in _AT_ONCE and not isinstance(value, str):
            return
        steps = self._go_over(value) if name not in _LAZY else _size(value)
        self.spend(steps if name in _LAZY else 0)
        for one in given:
            self._go_over(one)
        numbers = [abs(one) for one in given if isinstance(one, int)]
        texts = [len(one) for one in given if isinstance(one, str)]
        if name == "round" and max(numbers, default=0) > _MOST_DIGITS:
            raise TooManySteps(f"round to more than {_MOST_DIGITS:,} digits")
        if name == "tojson":
            written = [len(one) for both in given if isinstance(both, (list, tuple)) for one in both if isinstance(one, str)]
            if widest := sum(numbers) + sum(texts) + sum(written):
                _refuse_long(name, DEEPEST * (1 + steps), widest)
        if name in _SEARCHING and isinstance(value, str) and texts:
            self.spend(len(value) * max(texts) // CHARACTERS**2)
        if name == "wordwrap":
            text = str(value)
            word = max(map(len, text.split()), default=0)
            # word by word; one that is too long is cut again and again
            self.spend(len(text) // 8 + word * word // (max(1, min(numbers, default=79)) * CHARACTERS**2))
        if name in _GROWING:
            self._check_growing(name, value, given, numbers)

    def _check_growing(self, name: str, value: Any, given: tuple[Any, ...], numbers: list[int]) -> None:
        if numbers and max(numbers) > LARGEST:
            raise TooManySteps(f"{name} with a number of more than {LARGEST:,}")
        self.spend(sum(numbers) // CHARACTERS)
        sizes = [_length(one, of_items=name in _OF_ITEMS) for one in (value, *given) if not isinstance(one, int)]
        *_, before, most = sorted([1, 1, *sizes, *numbers])
        if name == "replace" and isinstance(value, str) and len(given) > 1 and isinstance(given[0], str):
            before, most = value.count(given[0]), len(str(given[1]))
        _refuse_long(name, before, most)


class _Counting(NodeTransformer):
    """Puts steps into what is run again, and around what is made or gone over without a call."""

    def visit_For(self, node: nodes.For) -> Any:
        """Steps for each turn, and for each item that a condition leaves out."""
        tested = 0 if node.test is None else _steps_of([node.test])
        node = self._in_body(node)
        if node.test is not None:
            node.test = nodes.And(_steps(node, tested), node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> Any:
        """Steps for each time that it is run, as for what else has a body."""
        return self._in_body(node)

    visit_CallBlock = visit_Block = visit_Macro

    def _in_body(self, node: Any) -> Any:
        steps = _steps_of(node.body)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_steps(node, steps), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> Any:
        """What `~` makes, and of what."""
        self.generic_visit(node)
        node.nodes = [_filtered("_used", one) for one in node.nodes]
        return _filtered("_made", node)

    def visit_Getitem(self, node: nodes.Getitem) -> Any:
        """A slice; a key."""
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filtered("_made", node)
        node.arg = _filtered("_used", node.arg)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        """A key."""
        self.generic_visit(node)
        node.key = _filtered("_used", node.key)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        """Values that are compared."""
        self.generic_visit(node)
        node.expr = _filtered("_used", node.expr)
        for operand in node.ops:
            operand.expr = _filtered("_sought" if operand.op in ("in", "notin") else "_used", operand.expr)
        return node


def _steps_of(body: list[Any]) -> int:
    """Steps of running parts of a template once, without what they call."""
    parts = [one for part in body for one in (part, *part.find_all(nodes.Node))]
    written = sum(len(one.data) for one in parts if isinstance(one, nodes.TemplateData))
    return 1 + written // CHARACTERS + len(parts) // _NODES


def _steps(node: nodes.Node, number: int) -> nodes.Filter:
    return nodes.Filter(nodes.Const(number, lineno=node.lineno), "_steps", [], [], None, None, lineno=node.lineno)


def _filtered(name: str, node: nodes.Expr) -> Any:
    if isinstance(node, (nodes.Const, nodes.TemplateData)):
        return node
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _check_path(name: str, others: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Refuse an attribute, or what stands for one, that would take long for each item."""
    if name == "join":
        if isinstance(next(iter(others), named.get("d")), _HOLDING):
            raise TooManySteps("join with what is no text")
        others, named = others[1:], {key: one for key, one in named.items() if key != "d"}
    elif name in ("map", "selectattr", "rejectattr"):  # what else they get is for another filter or test
        others, named = others[:1], {key: one for key, one in named.items() if key == "attribute"}
    for one in (*others, *named.values()):
        if isinstance(one, _HOLDING) or (isinstance(one, str) and len(one) > _LONGEST_PATH):
            raise TooManySteps(f"{name} by a list, or by a text of more than {_LONGEST_PATH} characters")


def _length(value: Any, *, of_items: bool) -> int:
    """Characters of a value that becomes text, or items of one that is taken by items."""
    return len(value) if isinstance(value, str) or (of_items and isinstance(value, _HOLDING)) else len(str(value))


def _refuse_long(name: str, number: int, each: int) -> None:
    if number * each > CHARACTERS * LARGEST:
        raise TooManySteps(f"{name} that makes up to {number * each:,} characters, at most {CHARACTERS * LARGEST:,}")


def _size(made: Any) -> int:
    """Steps of a value without what is in it."""
    if isinstance(made, str):
        return len(made) // CHARACTERS
    if isinstance(made, int):
        return made.bit_length() // (4 * CHARACTERS)
    return len(made) if isinstance(made, _HOLDING) else 0
