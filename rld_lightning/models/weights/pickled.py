"""Detects pickles that would hang or crash the reading process, from their opcodes, before executing any.

PyTorch's reader calls only functions that it knows, but builds any value. A few bytes describe a tuple that holds
another one twice, which holds another one twice, ...: as a dictionary key it would be hashed for years, and tuples
nested a million deep crash Python itself.
"""

import pickletools
from itertools import repeat
from typing import IO, Any

_MOST_OPERATIONS = 1 << 23  # PyTorch's files have some thirty per tensor
_MOST_WORK = 1 << 27  # total size of all values put into others; some 100,000 in a checkpoint
_DEEPEST = 500  # nesting depth; some ten in Lightning's checkpoints
_REFUSED = (
    *("__builtin__ bytearray", "builtins bytearray"),  # allocates a length given as a number
    *("punycode", "idna"),  # encodings with quadratic run time
)
_CHANGES = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")  # modify the value on top of the stack


class _Value:
    """Stands for a value that the pickle would build: its total size and depth, and whether another value holds it."""

    __slots__ = ("depth", "held", "size")

    def __init__(self, size: int = 1, depth: int = 1) -> None:
        self.size, self.depth, self.held = size, depth, False


_PLAIN, _MARK = _Value(), _Value()


def pickle_fault(file: IO[bytes], pickles: int = 1) -> str:
    """Returns what is wrong with consecutive pickles; empty if they may be read, or if the file holds none.

    Args:
        file: read from its position on, which moves.
    """
    try:
        return next(filter(None, (_wrong(file) for _ in repeat(None, pickles))), "")
    except (ValueError, IndexError, KeyError):  # no valid pickle: PyTorch's reader fails at the same opcode
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
            at = len(stack) - 1 - stack[::-1].index(_MARK) if marked else len(stack) - len(before) + (name in _CHANGES)
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
            if changed.held or changed is _PLAIN:  # its counted size is already in others'
                return "it keeps filling an object that is part of another already"
            changed.size, changed.depth = changed.size + size, max(changed.depth, 1 + depth)
    return ""
