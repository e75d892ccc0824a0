"""Pieces that tests of several rooms share."""

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
# Two threads fighting a busy machine for two cores are several times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_CHECKOUT = Path(__file__).parents[1]
_LEFT = pytest.StashKey()
_OF_ONE_RUN = {f"tests/tracking/test_{name}.py" for name in ("dashboard", "logger")}


def pytest_configure(config):
    """Makes torch ready where tests run, which is not in the process that hands them out."""
    if config.getoption("numprocesses", None):
        return
    if hasattr(config, "workerinput"):
        atexit.register(_leave)  # first, so after all others
    gc.disable()  # what is imported and collected is no garbage: looking through it takes a sixth of the time
    import torch

    torch.set_num_threads(1)
    # A seed for devices that are not there would be kept with its traceback: two milliseconds, twice a test.
    for device in (torch.cuda, torch.xpu, torch.mtia):
        if not device.is_available():
            device.manual_seed_all = lambda seed: None


def _leave():
    """A process that has handed its results over takes nothing apart, which takes seconds."""
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
    """Every test starts from the same seed and leaves no default type behind."""
    import torch

    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session", autouse=True)
def _no_curves():
    """Drawing the curves of a short training takes as long as the training; tests of the curves have them by name."""
    with pytest.MonkeyPatch.context() as patch:
        if "rld_lightning.tasks.fit" in sys.modules:
            patch.setattr("rld_lightning.reporting.curves.plot_curves", _blank)
        yield


def _blank(run, title, summary=None):
    (run / "curves.png").write_bytes(b"\x89PNG")


@pytest.fixture(autouse=True)
def _own_command():
    """A script that runs in the test's process leaves its command for those it starts, and none is the next test's."""
    yield
    os.environ.pop("RLD_LIGHTNING_COMMAND", None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of the cases of a ``thinned(n)`` test one in n, drawn once and for all, is for every day; the others are slow."""
    cases = defaultdict(list)
    for item in items:
        if thinned := item.get_closest_marker("thinned"):
            cases[item.function.__module__, item.function.__qualname__, *thinned.args].append(item)
    for (*_, n), group in cases.items():
        group.sort(key=lambda item: crc32(item.nodeid.encode()))
        for item in group[ceil(len(group) / n) :]:
            item.add_marker(pytest.mark.slow)
    items.sort(key=_turn)


def _turn(item):
    """Rooms with long files come first and the many quick tests of losses last, so that no core waits for the other."""
    room = item.nodeid.removeprefix("tests/").split("/")[0]
    return {"end_to_end": 0, "tracking": 1, "tasks": 2, "losses": 4}.get(room, 3)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files of tests, one a core; those that look at the same run of W&B, of ten seconds, count as one."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "a run of W&B" if file in _OF_ONE_RUN else file

    return Scheduling(config, log)


def pytest_sessionstart(session):
    session.stash[_LEFT] = _left_by_runs()


def pytest_collection_finish():
    """Nor is it looked through in tests, which takes a tenth of their time."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish(session):
    gc.unfreeze()  # libraries report what is still there at the end
    if new := _left_by_runs() - session.stash.get(_LEFT, set()):
        print(f"\nA test has written {', '.join(sorted(new))} into the checkout: tests write below tmp_path only.")
        session.exitstatus = session.exitstatus or 1


def _left_by_runs():
    """The folders of the checkout that runs fill whose paths nobody has set."""
    return {
        name for name in ("data", "multirun", "outputs", "runs", "teachers", "wandb") if (_CHECKOUT / name).exists()
    }
