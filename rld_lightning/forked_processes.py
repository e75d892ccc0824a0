"""Starts processes by forking a server that has imported what trials need (:mod:`~rld_lightning.fork_server`).

Processes are started with :func:`start`; without a server, it runs ``python -m``. Every process has its own session,
folder, environment, output, signals and exit status, as if started without the server.

multiprocessing's fork server, in contrast, runs the user's script again in each process, keeps the environment that it
was started with, and exposes its processes to the terminal's signals.
"""

import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

from rld_lightning.distributed import STOPS

PYTHON_M = (sys.executable, "-m")
IGNORABLE = (*STOPS, signal.SIGUSR1)  # signals that a process may be told to ignore
UNFIT = 3  # exit status of a server that must not fork
_POLL = 0.02  # seconds between checks for ended processes
_STARTS = 2  # starts of the server: if it died once it may die again


@dataclass
class _Server:
    """The server, as other processes know it."""

    address: str  # of its socket
    modules: tuple[str, ...]  # modules that it imports
    process: subprocess.Popen[bytes] | None = None  # set in the process that started the server
    alive: int = -1  # write end of a pipe, closed when that process ends
    left: int = 0  # remaining restarts


_server: _Server | None = None


class Forked:
    """A process forked by the server, with the interface of ``subprocess.Popen``.

    Attributes:
        pid: its process id, also that of its process group.
        returncode: its exit status, or minus a signal's number; None while it runs.
    """

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection = connection
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Returns the exit status, None while it runs. If the server was lost, its processes were killed with it."""
        if self.returncode is None:
            with suppress(BlockingIOError):
                self._connection.setblocking(False)
                self.returncode = _read_number(self._connection, -signal.SIGKILL)
                self._connection.close()
        return self.returncode


Process: TypeAlias = "subprocess.Popen[bytes] | Forked"


def start_server(modules: Sequence[str]) -> None:
    """Starts the server, which imports in the background, unless it is running already or cannot run here.

    Args:
        modules: the modules to import, in this order.
    """
    global _server
    if _server is None and sys.platform == "linux":  # on other systems libraries do not survive a fork
        _server = _Server("", tuple(modules), left=_STARTS)
        _spawn_server(_server)
        atexit.register(stop_server)


def use_server(address: str, modules: Sequence[str]) -> None:
    """Makes this process use a server that another process started."""
    global _server
    _server = _Server(address, tuple(modules))


def stop_server() -> None:
    """Ends the server that this process started, with all processes that it forked."""
    global _server
    if _server is not None and _server.process is not None:
        _stop_server(_server)
        _server = None


def start(command: Sequence[str], env: Mapping[str, str], output: IO[bytes] | None = None) -> Process:
    """Starts a process in its own session; forks ``python -m module ...`` if there is a server.

    Args:
        command: the command. A forked module has ``main(arguments)``, which returns the exit status.
        output: where it prints; None for this process's output.
    """
    if tuple(command[:2]) == PYTHON_M:
        out = (1, 2) if output is None else (output.fileno(), output.fileno())
        ignored = [number for number in IGNORABLE if signal.getsignal(number) is signal.SIG_IGN]
        job = {
            "module": command[2],
            "arguments": command[3:],
            "env": dict(env),
            "cwd": str(Path.cwd()),
            "ignored": ignored,
        }
        connection, pid = _request(job, out)
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
    """Returns the exit code of a process, None while it runs.

    ``Popen.poll`` takes a lock that stays locked if a signal handler raises meanwhile; whoever then waits for the
    process waits for ever.
    """
    if isinstance(process, Forked):
        return process.poll()
    if process.returncode is None:
        try:
            ended, status = os.waitpid(process.pid, os.WNOHANG)
        except ChildProcessError:  # a signal came after waitpid and before the status was stored
            process.returncode = 1
        else:
            if ended:
                process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode


def send_signal(processes: Iterable[Process], number: signal.Signals) -> None:
    """Sends a signal to the processes that still run."""
    for process in processes:
        if poll(process) is None:
            os.kill(process.pid, number)


def wait_for_end(processes: Sequence[Process], seconds: float) -> None:
    """Waits until all processes have ended, for at most this many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(poll(process) is None for process in processes):
        time.sleep(_POLL)


def kill(process: Process) -> None:
    """Kills a process with its group, and waits until it has ended."""
    with suppress(ProcessLookupError, PermissionError):  # the latter on macOS, for a group that has just ended
        os.killpg(process.pid, signal.SIGKILL)  # a rank in a collective reacts to nothing else
    while poll(process) is None:
        time.sleep(_POLL)


def run_in_server(function: str, *arguments: str) -> None:
    """Runs a function once in the server, so that processes forked later share its result; ignores its errors.

    Args:
        function: as ``module:function``.
    """
    if _server is not None:
        module, _, name = function.partition(":")
        connection, _ = _request({"module": module, "function": name, "arguments": list(arguments)}, (1, 2), wait=False)
        if connection is not None:
            connection.close()


def _request(job: dict[str, Any], out: tuple[int, int], *, wait: bool = True) -> tuple[socket.socket | None, int]:
    """Sends a job to the server; returns the connection and the process id."""
    body = json.dumps(job).encode()
    while _server is not None:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(_server.address)
            socket.send_fds(connection, [len(body).to_bytes(8, "big")], out)
            connection.sendall(body)
            if not wait:
                return connection, 0
            if pid := _read_number(connection, 0):
                return connection, pid
        except OSError:  # the server has gone
            pass
        except BaseException:  # a signal: the process is no longer wanted
            connection.close()
            raise
        connection.close()
        if not _restart_server(_server):
            return None, 0
    return None, 0


def _restart_server(server: _Server) -> bool:
    """Restarts a server that has ended, if this process may; not if the server must not fork."""
    if server.process is None:
        return False
    with suppress(subprocess.TimeoutExpired):
        server.process.wait(timeout=5)
    _stop_server(server)
    if server.left == 0 or server.process.returncode == UNFIT:
        server.left = 0
        return False
    _spawn_server(server)
    return True


def _spawn_server(server: _Server) -> None:
    folder = tempfile.mkdtemp(prefix="rld-warm-")  # accessible to this user only
    server.address, server.left = f"{folder}/socket", server.left - 1
    end, server.alive = os.pipe()
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        try:
            listener.bind(server.address)
            listener.listen(128)  # it answers once it has imported
            # OpenBLAS with one thread: further threads would exist before the fork.
            server.process = subprocess.Popen(
                [sys.executable, "-m", "rld_lightning.fork_server", str(listener.fileno()), str(end), *server.modules],
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=(listener.fileno(), end),
                start_new_session=True,
            )
        except OSError:  # for example if the path is too long
            server.left = 0
            shutil.rmtree(folder, ignore_errors=True)
    os.close(end)


def _stop_server(server: _Server) -> None:
    if server.alive >= 0:
        os.close(server.alive)
        server.alive = -1
    if server.process is not None:
        with suppress(subprocess.TimeoutExpired):  # it kills the processes that it forked, unless it is still importing
            server.process.wait(timeout=0.5)
        server.process.kill()
        server.process.wait()
    shutil.rmtree(Path(server.address).parent, ignore_errors=True)


def _read_number(connection: socket.socket, otherwise: int) -> int:
    """Reads the next line, a number; returns ``otherwise`` if the connection is closed."""
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
