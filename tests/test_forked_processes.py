"""Processes forked from a server with the imports done behave like newly started ones."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rld_lightning import forked_processes as forked
from rld_lightning.forked_processes import Forked

JOB = """
import json, os, random, signal, subprocess, sys, time, uuid
kept, at_import = [], os.getpid()

def keep(text):
    kept.append(text)

def main(arguments):
    out, what = arguments[0], arguments[1]
    if what == "say":
        print("out"), print("err", file=sys.stderr)
        facts = {
            "pid": os.getpid(), "group": os.getpgrp(), "session": os.getsid(0), "cwd": os.getcwd(),
            "argv": sys.argv[1:], "x": os.environ.get("X"), "path": os.environ.get("PATH") is not None,
            "usr1": signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN, "chance": [random.random(), uuid.uuid4().hex],
            "int": signal.getsignal(signal.SIGINT) == signal.default_int_handler, "kept": kept,
            "stdin": sys.stdin.read(), "warm": at_import != os.getpid(), "files": len(os.listdir("/proc/self/fd")),
        }
        open(out, "w").write(json.dumps(facts))
    elif what == "fail":
        raise RuntimeError("wrong")
    elif what == "exit":
        sys.exit(int(arguments[2]))
    elif what == "wait":
        worker = subprocess.Popen(["sleep", "100"])
        open(out, "w").write(f"{os.getpid()} {worker.pid}")
        time.sleep(100)
    elif what == "nest":
        from rld_lightning import forked_processes as forked
        inner = forked.start([*forked.PYTHON_M, "warm_job", out, *arguments[2:]], os.environ)
        while forked.poll(inner) is None:
            time.sleep(0.005)
        return inner.returncode + 10 * (type(inner).__name__ == "Forked")
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a module to run in forked processes; stops the server at the end."""
    (tmp_path / "warm_job.py").write_text(JOB)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(forked, "_server", None)
    yield tmp_path
    forked.stop_server()


def start(place, *arguments, **environment):
    with (place / "log").open("ab") as log:
        command = [*forked.PYTHON_M, "warm_job", str(place / "out"), *arguments]
        return forked.start(command, {**os.environ, **environment}, log)


def finish(process):
    until = time.monotonic() + 20
    while forked.poll(process) is None:
        assert time.monotonic() < until
        time.sleep(0.005)
    return process.returncode


def read(path):
    until = time.monotonic() + 20
    while not path.exists() or not path.read_text():
        assert time.monotonic() < until
        time.sleep(0.005)
    return path.read_text()


def is_gone(pid):
    for _ in range(400):
        if not (stat := Path(f"/proc/{pid}/stat")).exists() or " Z " in stat.read_text():
            return True
        time.sleep(0.01)
    return False


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes are started anew")


def test_a_forked_process_behaves_like_a_started_one(place, monkeypatch):
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        plain, facts = start(place, "say", X="1"), []
        assert isinstance(plain, subprocess.Popen)
        assert finish(plain) == 0
        facts.append(json.loads((place / "out").read_text()))
        forked.start_server(["warm_job"])
        monkeypatch.chdir(place)
        for value in ("2", "3"):
            process = start(place, "say", X=value)
            assert isinstance(process, Forked)
            assert finish(process) == 0
            facts.append(json.loads((place / "out").read_text()))
            assert facts[-1]["pid"] == process.pid
    finally:
        signal.signal(signal.SIGUSR1, before)
    for fact in facts:
        assert fact["pid"] == fact["group"] == fact["session"]
    assert [fact["x"] for fact in facts] == ["1", "2", "3"]
    assert [fact["warm"] for fact in facts] == [False, True, True]
    assert facts[1]["cwd"] == str(place)
    for key in ("argv", "path", "usr1", "int", "stdin", "files"):
        assert facts[0][key] == facts[1][key] == facts[2][key], key
    assert len({value for fact in facts for value in fact["chance"]}) == 6
    assert sorted((place / "log").read_text().split()) == ["err"] * 3 + ["out"] * 3


def test_exit_codes_are_returned_and_errors_are_printed(place):
    forked.start_server(["warm_job"])
    assert finish(start(place, "fail")) == 1
    assert "RuntimeError: wrong" in (place / "log").read_text()
    assert finish(start(place, "exit", "7")) == 7
    process = start(place, "wait")
    read(place / "out")
    os.kill(process.pid, signal.SIGKILL)
    assert finish(process) == -signal.SIGKILL


def test_a_process_and_its_children_end_when_the_connection_closes(place):
    forked.start_server(["warm_job"])
    process = start(place, "wait")
    pid, worker = read(place / "out").split()
    process._connection.close()  # as when the requesting process ends
    assert is_gone(pid)
    assert is_gone(worker)


def test_a_killed_servers_processes_end_and_it_is_restarted_once(place):
    forked.start_server(["warm_job"])
    process = start(place, "wait")
    pid, worker = read(place / "out").split()
    os.kill(forked._server.process.pid, signal.SIGKILL)
    assert finish(process) == -signal.SIGKILL
    assert is_gone(pid)
    assert is_gone(worker)
    again = start(place, "exit", "5")
    assert isinstance(again, Forked)
    assert finish(again) == 5
    os.kill(forked._server.process.pid, signal.SIGKILL)
    plain = start(place, "exit", "6")
    assert isinstance(plain, subprocess.Popen)
    assert finish(plain) == 6


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("import threading; threading.Thread(target=threading.Event().wait).start()", subprocess.Popen),
        ("1 / 0", Forked),
    ],
)
def test_a_server_with_threads_does_not_fork(place, code, kind):
    (place / "odd.py").write_text(code)
    forked.start_server(["odd", "warm_job"])
    process = start(place, "exit", "4")
    assert isinstance(process, kind)
    assert finish(process) == 4


def test_forked_processes_can_fork_and_keep_prepared_data(place):
    forked.start_server(["warm_job"])
    forked.run_in_server("warm_job:keep", "data")
    forked.run_in_server("warm_job:nothing_of_this_name")
    assert finish(start(place, "nest", "exit", "3")) == 13
    assert finish(start(place, "nest", "say")) == 10
    assert json.loads((place / "out").read_text())["kept"] == ["data"]


def test_a_server_ends_with_its_parent(place):
    script = (
        "import os, signal, sys, time; from rld_lightning import forked_processes as forked\n"
        "forked.start_server(['warm_job'])\n"
        f"process = forked.start([*forked.PYTHON_M, 'warm_job', {str(place / 'out')!r}, 'wait'], os.environ)\n"
        f"while not os.path.exists({str(place / 'out')!r}): time.sleep(0.01)\n"
        "print(forked._server.process.pid, forked._server.address, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=False, timeout=60)
    server, address = done.stdout.split()
    pid, worker = read(place / "out").split()
    assert is_gone(server)
    assert is_gone(pid)
    assert is_gone(worker)
    assert not Path(address).parent.exists()


@pytest.mark.slow
def test_trial_imports_start_no_threads_and_trials_have_all_theirs(place, monkeypatch):
    from rld_lightning.hydra.sweep_only import _TRIAL_MODULES

    (place / "look.py").write_text(
        "import os, sys\n"
        "def main(arguments):\n"
        "    import torch\n"
        "    torch.ones(4_000_000).exp().sum()  # by OpenMP's pool\n"
        "    facts = torch.get_num_threads(), torch.cuda.is_initialized(), len(sys.modules) > 2000\n"
        "    open(arguments[0], 'w').write(repr(facts))\n"
        "    return 0\n"
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    forked.start_server(_TRIAL_MODULES)
    for wanted in ({"OMP_NUM_THREADS": "3"}, {}):
        with (place / "log").open("ab") as log:
            process = forked.start([*forked.PYTHON_M, "look", str(place / "out")], {**os.environ, **wanted}, log)
        assert isinstance(process, Forked)
        until = time.monotonic() + 100
        while forked.poll(process) is None and time.monotonic() < until:
            time.sleep(0.01)
        assert process.returncode == 0
        threads = int(wanted.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))
        assert (place / "out").read_text() == repr((threads, False, True))
