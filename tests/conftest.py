"""Fixtures and hooks for all tests."""

import atexit
import gc
import os
import sys
from collections import defaultdict
from math import ceil
from pathlib import Path
from zlib import crc32

import pytest

os.environ.setdefault("WANDB_MODE", "disabled")
# On a busy machine with two cores, two threads are several times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_CHECKOUT = Path(__file__).parents[1]
_FOLDERS_BEFORE = pytest.StashKey()
_SHARED_RUN_FILES = {f"tests/tracking/test_{name}.py" for name in ("dashboard", "logger")}


def pytest_configure(config):
    """Sets torch up in the processes that run tests, not in xdist's controller."""
    if config.getoption("numprocesses", None):
        return
    if hasattr(config, "workerinput"):
        atexit.register(_exit_at_once)  # registered first, so called last
    gc.disable()  # imports and collection create no garbage; searching for it takes a sixth of their time
    import torch

    torch.set_num_threads(1)
    # For missing devices, torch queues each seed with its traceback: two milliseconds, twice per test.
    for device in (torch.cuda, torch.xpu, torch.mtia):
        if not device.is_available():
            device.manual_seed_all = lambda seed: None


def _exit_at_once():
    """Exits without cleanup, which takes seconds, when a worker has returned its results."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def _same_arithmetic():
    """Starts every test from the same seed, and restores the default dtype."""
    import torch

    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session", autouse=True)
def _no_curves():
    """Skips drawing curves, which takes as long as a short training; tests of the curves import the function."""
    with pytest.MonkeyPatch.context() as patch:
        if "rld_lightning.tasks.fit" in sys.modules:
            patch.setattr("rld_lightning.reporting.curves.plot_curves", _blank)
        yield


def _blank(run, title, summary=None):
    (run / "curves.png").write_bytes(b"\x89PNG")


@pytest.fixture(autouse=True)
def _own_command():
    """Removes the variable with the command that a script in the test's process sets for its subprocesses."""
    yield
    os.environ.pop("RLD_LIGHTNING_COMMAND", None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks all but one in n cases of a ``thinned(n)`` test as slow; the choice is always the same."""
    cases = defaultdict(list)
    for item in items:
        if thinned := item.get_closest_marker("thinned"):
            cases[item.function.__module__, item.function.__qualname__, *thinned.args].append(item)
    for (*_, n), group in cases.items():
        group.sort(key=lambda item: crc32(item.nodeid.encode()))
        for item in group[ceil(len(group) / n) :]:
            item.add_marker(pytest.mark.slow)
    items.sort(key=_order)


def _order(item):
    """Folders with long files come first and the many quick tests of losses last, so that no core is idle."""
    folder = item.nodeid.removeprefix("tests/").split("/")[0]
    return {"end_to_end": 0, "tracking": 1, "tasks": 2, "losses": 4}.get(folder, 3)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Schedules whole files; those that share a W&B run, which takes ten seconds, go to the same worker."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "a run of W&B" if file in _SHARED_RUN_FILES else file

    return Scheduling(config, log)


def pytest_sessionstart(session):
    session.stash[_FOLDERS_BEFORE] = _run_folders()


def pytest_collection_finish():
    """Excludes imported objects from garbage collection in tests, where it takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish(session):
    gc.unfreeze()  # libraries report objects that still exist at the end
    if new := _run_folders() - session.stash.get(_FOLDERS_BEFORE, set()):
        print(f"\nA test has written {', '.join(sorted(new))} into the checkout: tests write below tmp_path only.")
        session.exitstatus = session.exitstatus or 1


def _run_folders():
    """The existing folders of the checkout that runs write by default."""
    return {
        name for name in ("data", "multirun", "outputs", "runs", "teachers", "wandb") if (_CHECKOUT / name).exists()
    }
