"""Pickles from outside, read without running them.

A pickle is a program that names what it calls. Here it may name a few classes alone, and gets a stand-in for each: a record of
what the real one would have been made from. The stand-ins do nothing, so that nothing in the file can; what is made of them
is up to who reads it. Only the instructions that such data needs are understood, and keys of dictionaries are plain: a short
file exhausts neither the memory nor the stack of the process.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

_INSTRUCTIONS = (
    "PROTO FRAME STOP MARK MEMOIZE BINGET LONG_BINGET STACK_GLOBAL REDUCE NEWOBJ BUILD "
    "NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS"
).split()


class Refused(ValueError):
    """What is in a pickle is not what belongs there. The message says what."""


class Inert:
    """An object of a pickle, not made: its arguments, and the state that it would have been given."""

    name = ""
    """Module and name of its class or function, joined by a period."""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Inert:
        """Keep the arguments."""
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self


_InPython: Any = pickle._Unpickler  # whose instructions can be chosen


class _Unpickler(_InPython):
    def __init__(self, content: bytes, allowed: Callable[[str, str], bool]):
        super().__init__(io.BytesIO(content))
        self._allowed = allowed
        self._classes: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> type[Inert]:
        full = f"{module}.{name}"
        if not self._allowed(module, name):
            raise Refused(f"it names {full!r:.200}, which has no place there and might run code")
        if full not in self._classes:
            self._classes[full] = type(name, (Inert,), {"name": full})
        return self._classes[full]

    def load_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise Refused("it names a class by something that is not a text")
        self.append(self.find_class(module, name))

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.append(self._make(function, args))

    load_newobj = load_reduce

    @staticmethod
    def _make(function: Any, args: Any) -> Inert:
        if not (isinstance(function, type) and issubclass(function, Inert) and type(args) is tuple):
            raise Refused("it calls something that is not a class")
        return function(*args)

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Inert):
            raise Refused("it changes something that is not an object")
        target.state = state

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        # the hash of nested tuples would be found by recursion in C
        plain = all(type(key) is str or isinstance(key, Inert) for key in items[::2])
        if type(target) is not dict or len(items) % 2 or not plain:
            raise Refused("it has a dictionary whose keys are neither texts nor objects")
        target.update(zip(items[::2], items[1::2], strict=True))

    dispatch = {getattr(pickle, name)[0]: _InPython.dispatch[getattr(pickle, name)[0]] for name in _INSTRUCTIONS} | {
        pickle.STACK_GLOBAL[0]: load_stack_global,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def read_inert(content: bytes, allowed: Callable[[str, str], bool]) -> Any:
    """What a pickle describes, with an `Inert` in place of every object of a class.

    Args:
        content: the pickle.
        allowed: whether it may name what is called so in this module; nothing is imported.

    Raises:
        Refused: it names something else, or is not such a pickle.
    """
    try:
        return _Unpickler(content, allowed).load()
    except Refused:
        raise
    except KeyError as error:
        raise Refused(f"it has an instruction that does not belong there ({error})") from None
    except Exception as error:  # whatever a damaged pickle leads to
        raise Refused(f"it is damaged ({type(error).__name__}: {error})") from None
