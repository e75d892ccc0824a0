"""Processes that are forked from one that has imported what trials need (:mod:`~rld_lightning.fork_server`).

What starts processes does so through :func:`start`; where there is no such server, that starts ``python -m``. Every
process is one of its own: its session, folder, environment, output, signals and exit status are those that it would
have had.

multiprocessing has a server like it, which runs the user's script again in each process, keeps the environment that it
was started with itself, and shows its processes the signals of the terminal.
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
_POLL = 0.02  # seconds between two looks at processes that are to end
_TRIES = 2  # how often the server is started: one that has died once may do so again


@dataclass
class _Server:
    """The server as other processes know it."""

    address: str  # of its socket
    modules: tuple[str, ...]  # what it imports
    process: subprocess.Popen[bytes] | None = None  # the server, for the process that has started it
    alive: int = -1  # closed when that one ends
    left: int = 0  # how often it may be started again


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


def use(address: str, modules: Sequence[str]) -> None:
    """Has this process ask a server that another one has started."""
    global _server
    _server = _Server(address, tuple(modules))


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
        output: where it prints; None for where this process does.
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


def pass_on(processes: Iterable[Process], number: signal.Signals) -> None:
    """Sends a signal to those that still run."""
    for process in processes:
        if poll(process) is None:
            os.kill(process.pid, number)


def let_end(processes: Sequence[Process], seconds: float) -> None:
    """Waits until all have ended, at most so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(poll(process) is None for process in processes):
        time.sleep(_POLL)


def kill(process: Process) -> None:
    """Kills a process with all of its group, and waits until it has ended."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # not kind, but a rank in a collective hears nothing else
    while poll(process) is None:
        time.sleep(_POLL)


def prepare(function: str, *arguments: str) -> None:
    """Has the server do something once, so that what it forks from then on has it; what goes wrong is nobody's matter.

    Args:
        function: as ``module:function``.
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
    if server.left == 0 or server.process.returncode == UNFIT:
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
                [sys.executable, "-m", "rld_lightning.fork_server", str(listener.fileno()), str(end), *server.modules],
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
