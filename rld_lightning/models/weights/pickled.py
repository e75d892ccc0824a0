"""Pickles that would hang or end the process that reads them, told by their operations before any of these is done.

PyTorch's reader calls nothing that it does not know, but it makes what it is told to. A few bytes make a tuple that
holds another one twice, which holds another one twice, ...: as a key of a dictionary it would be hashed for years, and
tuples within tuples, a million deep, end Python itself.
"""

import pickletools
from itertools import repeat
from typing import IO, Any

_MOST_OPERATIONS = 1 << 23  # PyTorch's own take some thirty a tensor
_MOST_WORK = 1 << 27  # values that are put into others, with all in them; a checkpoint has some 100,000
_DEEPEST = 500  # values within each other; Lightning's lie some ten deep
_REFUSED = (
    *("__builtin__ bytearray", "builtins bytearray"),  # of a length that is given as a number
    *("punycode", "idna"),  # encodings that take the square of a text's length
)
_CHANGES = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")  # what is on the stack


class _Value:
    """A value to be: how many it is made of, how deep they lie, and whether it is part of another one."""

    __slots__ = ("depth", "held", "size")

    def __init__(self, size: int = 1, depth: int = 1) -> None:
        self.size, self.depth, self.held = size, depth, False


_PLAIN, _MARK = _Value(), _Value()


def bomb_in(file: IO[bytes], pickles: int = 1) -> str:
    """What is wrong with pickles that lie one behind the other; nothing where they may be read, or are none at all.

    Args:
        file: which is left where the look ends.
    """
    try:
        return next(filter(None, (_wrong(file) for _ in repeat(None, pickles))), "")
    except (ValueError, IndexError, KeyError):  # no pickle: PyTorch's reader ends at the same operation
        return ""


def _wrong(file: IO[bytes]) -> str:
    stack: list[_Value] = []
    memo: dict[Any, _Value] = {}
    work = 0
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        name, before = operation.name, operation.stack_before
        if count > _MOST_OPERATIONS:
            return f"its pickle takes more than {_MOST_OPERATIONS:,} steps"
        if name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MARK":
            stack.append(_MARK)
        elif not before:
            if isinstance(argument, str) and argument.lower() in _REFUSED:
                return f"it wants to make something with {argument}, which no weights do"
            stack += [_Value() if name.startswith("EMPTY_") else _PLAIN for _ in operation.stack_after]
        else:
            marked = pickletools.markobject in before
            at = _last_mark(stack) if marked else len(stack) - len(before) + (name in _CHANGES)
            parts = stack[at:]
            del stack[at:]
            parts = parts[1:] if parts and parts[0] is _MARK else parts
            if _MARK in parts or at < 0:
                return ""
            size, depth = sum(part.size for part in parts), max((part.depth for part in parts), default=0)
            work += size
            if work > _MOST_WORK or depth > _DEEPEST:
                return "it holds the same values over and over, or thousands deep in each other"
            for part in parts:
                part.held = True
            if name not in _CHANGES:
                stack += [_Value(1 + size, 1 + depth) for _ in operation.stack_after]
                continue
            changed = stack[-1]
            if changed.held or changed is _PLAIN:  # or sizes that were looked at would not be those that come
                return "it goes on filling what is part of something else already"
            changed.size, changed.depth = changed.size + size, max(changed.depth, 1 + depth)
    return ""


def _last_mark(stack: list[_Value]) -> int:
    return len(stack) - 1 - stack[::-1].index(_MARK)
