"""Makes Ctrl-C end a script with one sentence, from its first import on; scripts import this first."""

import os
import sys
from types import TracebackType

_others = sys.excepthook


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        _others(kind, error, trace)
        return
    print(" stopped  by Ctrl-C, before anything was done", flush=True)
    os._exit(130)


sys.excepthook = _end
