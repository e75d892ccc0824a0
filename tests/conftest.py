"""Pieces that tests of several rooms share."""

import gc
import os
from collections import defaultdict
from math import ceil
from pathlib import Path
from zlib import crc32

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "disabled")
# Two threads fighting a busy machine for two cores are several times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

_CHECKOUT = Path(__file__).parents[1]
_LEFT = pytest.StashKey()


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def _same_arithmetic():
    """Every test starts from the same seed and leaves no default type behind."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


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


def pytest_sessionstart(session):
    session.stash[_LEFT] = _left_by_runs()


def pytest_collection_finish():
    """Imported libraries are no garbage: looking through them again and again takes a tenth of the time."""
    gc.collect()
    gc.freeze()


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
