"""The server of :mod:`rld_lightning.forked_processes`: imports what trials need and forks processes on request."""

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

from rld_lightning.distributed import exit_now, exit_with_parent
from rld_lightning.forked_processes import IGNORABLE, UNFIT, use_server


def serve(listener: socket.socket, alive: int, modules: Sequence[str]) -> "partial[int] | None":
    """Imports the modules, then forks on request until the process that started this one ends.

    Args:
        alive: a pipe that closes when that process ends.

    Returns:
        the job to run, in a forked process; None in the server, at its end.
    """
    selector = selectors.DefaultSelector()
    selector.register(alive, selectors.EVENT_READ)
    for module in modules:
        if selector.select(0):
            return None
        with suppress(Exception):  # for example an extra that is not installed; its user reports that
            importlib.import_module(module)
    threads = _disable_thread_pool()
    ended, wake = os.pipe()
    for end in (ended, wake):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    selector.register(ended, selectors.EVENT_READ)
    selector.register(listener, selectors.EVENT_READ)
    use_server(listener.getsockname(), modules)  # for the forked processes
    children: dict[int, socket.socket] = {}
    try:
        _freeze()
        while True:
            for key, _ in selector.select():
                if key.fileobj == alive:
                    return None
                if key.fileobj == ended:
                    with suppress(BlockingIOError):
                        os.read(ended, 1024)
                    _reap(children, selector)
                elif key.fileobj is listener:
                    connection, _ = listener.accept()
                    if (job := _read(connection)) is None:
                        connection.close()
                    elif (pid := os.fork()) == 0:
                        selector.close()
                        for other in (listener, *children.values()):
                            other.close()
                        for end in (alive, ended, wake):
                            os.close(end)
                        children = {}
                        return partial(_run_forked, job, connection, threads)
                    else:
                        children[pid] = connection
                        selector.register(connection, selectors.EVENT_READ, pid)
                        for end in job["out"]:
                            os.close(end)
                elif key.data in children:  # its requester has closed the connection
                    selector.unregister(key.fileobj)
                    _kill(key.data)
    finally:
        for pid in children:
            _kill(pid)


def _freeze() -> None:
    """Prepares forking; exits if a thread (of OpenMP, for example) or a GPU handle would be broken in a fork."""
    gc.collect()
    gc.freeze()  # otherwise collections write to shared pages
    threads = len(list(Path("/proc/self/task").iterdir()))
    on_gpu = any(name.startswith("/dev/nvidia") for name in map(_target, Path("/proc/self/fd").iterdir()))
    if threads > 1 or on_gpu:
        exit_now(UNFIT)


def _target(link: Path) -> str:
    with suppress(OSError):
        return str(link.readlink())
    return ""


def _disable_thread_pool() -> int:
    """Disables PyTorch's thread pool in this process; returns the number of threads it would have used."""
    if (torch := sys.modules.get("torch")) is None:
        return 0
    threads: int = torch.get_num_threads()
    torch.set_num_threads(1)
    return threads


def _read(connection: socket.socket) -> dict[str, Any] | None:
    """Reads a request; returns the job to fork with its output files, or None if it was run here or is invalid."""
    try:
        head, out, _, _ = socket.recv_fds(connection, 8, 2)
        size, body = int.from_bytes(head, "big"), b""
        while len(body) < size:
            if not (part := connection.recv(size - len(body))):
                break
            body += part
        job: dict[str, Any] = json.loads(body)
    except (OSError, ValueError):  # the requester has gone
        return None
    if "function" not in job:
        return job | {"out": out}
    for end in out:
        os.close(end)
    with suppress(Exception):  # a trial that needs it reports the error
        getattr(importlib.import_module(job["module"]), job["function"])(*job["arguments"])
    _freeze()
    return None


def _reap(children: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    """Reports ended processes and their exit statuses to their requesters."""
    with suppress(ChildProcessError):
        while (ended_child := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = ended_child
            connection = children.pop(pid)
            with suppress(KeyError):
                selector.unregister(connection)
            with suppress(OSError), connection:
                connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # it may not have created its group yet
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _run_forked(job: Mapping[str, Any], connection: socket.socket, threads: int) -> int:
    """Turns a fork of the server into the requested process and runs its job; returns the exit status."""
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
    # As Python opens them in a new process: stdout is line-buffered only in a terminal.
    sys.stdout = os.fdopen(1, "w", 1 if os.isatty(1) else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    sys.argv = [job["module"], *job["arguments"]]
    if (torch := sys.modules.get("torch")) is not None:
        wanted = job["env"].get("OMP_NUM_THREADS", "")
        torch.set_num_threads(int(wanted) if wanted.isdecimal() and int(wanted) else threads)
    exit_with_parent(server)
    with closing(connection), suppress(OSError):
        connection.sendall(b"%d\n" % os.getpid())
    return int(importlib.import_module(job["module"]).main(job["arguments"]))


def _main(listener: str, alive: str, *modules: str) -> NoReturn:
    with closing(socket.socket(fileno=int(listener))) as opened:
        folder = Path(opened.getsockname()).parent
        job = serve(opened, int(alive), modules)
    if job is None:
        shutil.rmtree(folder, ignore_errors=True)
    exit_now(0 if job is None else _run_job(job))


def _run_job(job: "partial[int]") -> int:
    """Runs a job and Python's exit handlers; returns the exit status.

    Does not free memory: that would copy shared pages.
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
