"""The server of :mod:`rld_lightning.forked_processes`: imports what trials need, and forks a process when asked to."""

import atexit
import gc
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rld_lightning.distributed import end_with, leave
from rld_lightning.forked_processes import IGNORABLE, UNFIT, use


def serve(listener: socket.socket, alive: int, modules: Sequence[str]) -> "partial[int] | None":
    """Imports, and forks until the process that has started this one ends.

    Args:
        alive: a pipe that closes when that process ends.

    Returns:
        in a process that was forked what it is to do, and None in the end.
    """
    choose = selectors.DefaultSelector()
    choose.register(alive, selectors.EVENT_READ)
    for module in modules:
        if choose.select(0):
            return None
        with suppress(Exception):  # an extra is not there, say; who needs it says so
            importlib.import_module(module)
    threads = _one_thread()
    ended, wake = os.pipe()
    for end in (ended, wake):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    choose.register(ended, selectors.EVENT_READ)
    choose.register(listener, selectors.EVENT_READ)
    use(listener.getsockname(), modules)  # those that are forked
    children: dict[int, socket.socket] = {}
    try:
        _freeze()
        while True:
            for key, _ in choose.select():
                if key.fileobj == alive:
                    return None
                if key.fileobj == ended:
                    with suppress(BlockingIOError):
                        os.read(ended, 1024)
                    _reap(children, choose)
                elif key.fileobj is listener:
                    connection, _ = listener.accept()
                    if (job := _read(connection)) is None:
                        connection.close()
                    elif (pid := os.fork()) == 0:
                        choose.close()
                        for other in (listener, *children.values()):
                            other.close()
                        for end in (alive, ended, wake):
                            os.close(end)
                        children = {}
                        return partial(_become, job, connection, threads)
                    else:
                        children[pid] = connection
                        choose.register(connection, selectors.EVENT_READ, pid)
                        for end in job["out"]:
                            os.close(end)
                elif key.data in children:  # nobody waits for it any more
                    choose.unregister(key.fileobj)
                    _kill(key.data)
    finally:
        for pid in children:
            _kill(pid)


def _freeze() -> None:
    """Gets ready to fork; ends this process where a thread, OpenMP's say, or a GPU would be broken in a fork."""
    gc.collect()
    gc.freeze()  # else collections write into pages that all share
    threads = len(list(Path("/proc/self/task").iterdir()))
    on_gpu = any(name.startswith("/dev/nvidia") for name in map(_target, Path("/proc/self/fd").iterdir()))
    if threads > 1 or on_gpu:
        leave(UNFIT)


def _target(link: Path) -> str:
    with suppress(OSError):
        return str(link.readlink())
    return ""


def _one_thread() -> int:
    """Lets PyTorch compute without a pool of threads in this process; returns how many it would have taken."""
    if (torch := sys.modules.get("torch")) is None:
        return 0
    threads: int = torch.get_num_threads()
    torch.set_num_threads(1)
    return threads


def _read(connection: socket.socket) -> dict[str, Any] | None:
    """What is to be forked, with where it prints; None where there is nothing, or it was done here."""
    try:
        head, out, _, _ = socket.recv_fds(connection, 8, 2)
        size, body = int.from_bytes(head, "big"), b""
        while len(body) < size:
            if not (part := connection.recv(size - len(body))):
                break
            body += part
        job: dict[str, Any] = json.loads(body)
    except (OSError, ValueError):  # who asks has gone
        return None
    if "function" not in job:
        return job | {"out": out}
    for end in out:
        os.close(end)
    with suppress(Exception):  # a trial that needs it says what is wrong
        getattr(importlib.import_module(job["module"]), job["function"])(*job["arguments"])
    _freeze()
    return None


def _reap(children: dict[int, socket.socket], choose: selectors.BaseSelector) -> None:
    """Tells those who wait what has ended, and how."""
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = found
            connection = children.pop(pid)
            with suppress(KeyError):
                choose.unregister(connection)
            with suppress(OSError), connection:
                connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # a group it may not have made yet
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _become(job: Mapping[str, Any], connection: socket.socket, threads: int) -> int:
    """Turns a fork of the server into the process that was asked for, and does its work; returns the exit status."""
    server = os.getppid()
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in IGNORABLE:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in job["ignored"] else usual)
    for end, place in zip(job["out"], (1, 2), strict=True):
        os.dup2(end, place)
        os.close(end)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    # As Python opens them in a new process: by line where they are looked at.
    sys.stdout = os.fdopen(1, "w", 1 if os.isatty(1) else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    sys.argv = [job["module"], *job["arguments"]]
    if (torch := sys.modules.get("torch")) is not None:
        wanted = job["env"].get("OMP_NUM_THREADS", "")
        torch.set_num_threads(int(wanted) if wanted.isdecimal() and int(wanted) else threads)
    end_with(server)
    with closing(connection), suppress(OSError):
        connection.sendall(b"%d\n" % os.getpid())
    return int(importlib.import_module(job["module"]).main(job["arguments"]))


def _main(listener: str, alive: str, *modules: str) -> NoReturn:
    with closing(socket.socket(fileno=int(listener))) as opened:
        folder = Path(opened.getsockname()).parent
        job = serve(opened, int(alive), modules)
    if job is None:
        shutil.rmtree(folder, ignore_errors=True)
    leave(0 if job is None else _done(job))


def _done(job: "partial[int]") -> int:
    """Does a job and ends what it has started, as Python does at the end of a program; returns the exit status.

    Memory is left as it is: to clear up what all share would copy it.
    """
    try:
        code = job()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    vars(threading)["_shutdown"]()
    vars(atexit)["_run_exitfuncs"]()
    return code


if __name__ == "__main__":
    _main(*sys.argv[1:])
