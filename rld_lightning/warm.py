"""A process that has imported what trials need, and forks one for each that is asked for.

What starts processes does so through :func:`start`; where there is no such process, that starts ``python -m``. Every
process is one of its own: its session, folder, environment, output, signals and exit status are those that it would
have had.

multiprocessing has a server like it, which runs the user's script again in each process, keeps the environment that it
was started with itself, and shows its processes the signals of the terminal.
"""

import atexit
import gc
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn, TypeAlias

from rld_lightning.distributed import STOPS, leave

PYTHON_M = (sys.executable, "-m")
_TRIES = 2  # how often the server is started: one that has died once may do so again
_IGNORABLE = (*STOPS, signal.SIGUSR1)


@dataclass
class _Server:
    """The server as other processes know it.

    Attributes:
        address: of its socket.
        modules: what it imports.
        process: the server, for the process that has started it.
        alive: closed when that one ends.
        left: how often it may be started again.
    """

    address: str
    modules: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None
    alive: int = -1
    left: int = 0


_server: _Server | None = None


class Forked:
    """A process that the server has forked, as ``subprocess.Popen`` has them.

    Attributes:
        pid: its number, which is that of its process group as well.
        returncode: its exit status, minus a signal's number, or None while it runs.
    """

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection = connection
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status; None while it runs. A process whose server was lost has been killed with it."""
        if self.returncode is None:
            with suppress(BlockingIOError):
                self._connection.setblocking(False)
                self.returncode = _number(self._connection, -signal.SIGKILL)
                self._connection.close()
        return self.returncode


Process: TypeAlias = "subprocess.Popen[bytes] | Forked"

# In the process that asks


def warm_up(modules: Sequence[str]) -> None:
    """Starts the server, which imports while this process goes on; does nothing where there is one, or cannot be.

    Args:
        modules: what it imports, in this order.
    """
    global _server
    if _server is None and sys.platform == "linux":  # elsewhere libraries do not outlive a fork
        _server = _Server("", tuple(modules), left=_TRIES)
        _start_server(_server)
        atexit.register(cool_down)


def cool_down() -> None:
    """Ends the server that this process has started, and all that it has forked."""
    global _server
    if _server is not None and _server.process is not None:
        _end_server(_server)
        _server = None


def start(command: Sequence[str], env: Mapping[str, str], output: IO[bytes] | None = None) -> Process:
    """Starts a process in a session of its own: forks ``python -m module ...`` where there is a server.

    Args:
        command: what is started. A module that is forked has ``main(arguments)``, which returns the exit status.
        env: the process's environment.
        output: where it prints; None for where this process does.
    """
    if tuple(command[:2]) == PYTHON_M:
        out = (1, 2) if output is None else (output.fileno(), output.fileno())
        ignored = [number for number in _IGNORABLE if signal.getsignal(number) is signal.SIG_IGN]
        job = {
            "module": command[2],
            "arguments": command[3:],
            "env": dict(env),
            "cwd": str(Path.cwd()),
            "ignored": ignored,
        }
        connection, pid = _asked(job, out)
        if connection is not None:
            return Forked(connection, pid)
    return subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
    )


def poll(process: Process) -> int | None:
    """The exit code of a process, None while it runs.

    ``Popen.poll`` takes a lock, which stays taken where the handler of a signal raises in between: whoever then waits
    for the process waits for ever.
    """
    if isinstance(process, Forked):
        return process.poll()
    if process.returncode is None:
        try:
            ended, status = os.waitpid(process.pid, os.WNOHANG)
        except ChildProcessError:  # such a signal came between the answer and its noting
            process.returncode = 1
        else:
            if ended:
                process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode


def prepare(function: str, *arguments: str) -> None:
    """Has the server do something once, so that what it forks from then on has it; what goes wrong is nobody's matter.

    Args:
        function: as ``module:function``.
        arguments: what it takes.
    """
    if _server is not None:
        module, _, name = function.partition(":")
        connection, _ = _asked({"module": module, "function": name, "arguments": list(arguments)}, (1, 2), wait=False)
        if connection is not None:
            connection.close()


def _asked(job: dict[str, Any], out: tuple[int, int], *, wait: bool = True) -> tuple[socket.socket | None, int]:
    """Hands a job to the server; returns the connection, and the number of the process."""
    body = json.dumps(job).encode()
    while _server is not None:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(_server.address)
            socket.send_fds(connection, [len(body).to_bytes(8, "big")], out)
            connection.sendall(body)
            if not wait:
                return connection, 0
            if pid := _number(connection, 0):
                return connection, pid
        except OSError:  # it has gone
            pass
        except BaseException:  # a signal's, and what was asked for is not wanted any more
            connection.close()
            raise
        connection.close()
        if not _started_again(_server):
            return None, 0
    return None, 0


def _started_again(server: _Server) -> bool:
    """Starts a server again that has ended, where this process may; one that has found itself unfit is let go."""
    if server.process is None:
        return False
    with suppress(subprocess.TimeoutExpired):
        server.process.wait(timeout=5)
    _end_server(server)
    if server.left == 0 or server.process.returncode == _UNFIT:
        server.left = 0
        return False
    _start_server(server)
    return True


def _start_server(server: _Server) -> None:
    folder = tempfile.mkdtemp(prefix="rld-warm-")  # which nobody else can enter
    server.address, server.left = f"{folder}/socket", server.left - 1
    end, server.alive = os.pipe()
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        try:
            listener.bind(server.address)
            listener.listen(128)  # it answers when it has imported
            # One thread of OpenBLAS, whose others would be there before the fork.
            server.process = subprocess.Popen(
                [sys.executable, "-m", "rld_lightning.warm", str(listener.fileno()), str(end), *server.modules],
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=(listener.fileno(), end),
                start_new_session=True,
            )
        except OSError:  # a path that is too long, say
            server.left = 0
            shutil.rmtree(folder, ignore_errors=True)
    os.close(end)


def _end_server(server: _Server) -> None:
    if server.alive >= 0:
        os.close(server.alive)
        server.alive = -1
    if server.process is not None:
        with suppress(subprocess.TimeoutExpired):  # it kills what it has forked, unless it is still importing
            server.process.wait(timeout=0.5)
        server.process.kill()
        server.process.wait()
    shutil.rmtree(Path(server.address).parent, ignore_errors=True)


def _number(connection: socket.socket, otherwise: int) -> int:
    """The next line that comes, a number; ``otherwise`` where nothing comes any more."""
    line = b""
    while not line.endswith(b"\n"):
        try:
            byte = connection.recv(1)
        except ConnectionError:
            byte = b""
        if not byte:
            return otherwise
        line += byte
    return int(line)


# In the server, and in what it forks

_UNFIT = 3  # exit status of a server that must not fork


def serve(listener: socket.socket, alive: int, modules: Sequence[str]) -> "partial[int] | None":
    """Imports, and forks until the process that has started this one ends.

    Args:
        listener: where jobs come from.
        alive: a pipe that closes when that process ends.
        modules: what is imported.

    Returns:
        in a process that was forked what it is to do, and None in the end.
    """
    global _server
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
    _server = _Server(listener.getsockname(), tuple(modules))  # for those that are forked
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
        leave(_UNFIT)


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
    for number in _IGNORABLE:
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


def end_with(parent: int) -> None:
    """Ends this process and its data loaders within a second when its parent is gone, killed for example.

    Args:
        parent: the parent's number.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


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
    from rld_lightning.warm import _main as _main_of_module  # whose state those have that are forked

    _main_of_module(*sys.argv[1:])
