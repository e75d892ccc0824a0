"""A short run with its own W&B run, shared by the tests of tracking."""

import sys

import pytest
from helpers.configs import compose
from helpers.wandb_stub import read_run, serving

from rld_lightning.console import console
from rld_lightning.tasks.fit import fit

OPTIONS = (
    *("data=digits", "model=pair", "model.teacher.name=wrn16_1", "model.student.name=wrn16_1", "recipe=quick"),
    *("trainer=cpu", "+trainer.limit_train_batches=3", "loss=rld", "logger=wandb", "callbacks.wandb_examples.count=4"),
)
STORE = [
    "+store.storage_options={key:AKIAHIDDEN,secret:hunter2hunter2}",
    "+store.url='https://me:urlpass77@host/x'",
]


@pytest.fixture(scope="session")
def train():
    """Trains in a directory, by the task itself, and returns the output."""

    def run(folder, *overrides):
        import wandb

        cfg = compose("method=rld", *OPTIONS, *overrides, resolve=False)
        cfg.paths.run, cfg.paths.teachers, cfg.print_config = str(folder), str(folder.parent / "teachers"), False
        try:
            with console.capture() as printed:
                fit(cfg)
        finally:
            wandb.teardown()  # as at the end of a process: the file is complete only then
        return printed.get()

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory, train):
    """An offline run with its own teacher, offline because the server accepts connections and never answers."""
    folder = tmp_path_factory.mktemp("wandb") / "run"
    with pytest.MonkeyPatch.context() as patch, serving("late") as stub:
        patch.delenv("WANDB_MODE", raising=False)
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setenv("WANDB_BASE_URL", stub.address)
        patch.setenv("WANDB_API_KEY", "x" * 40)
        patch.setattr(sys, "argv", ["fit.py", *STORE])
        options = ["recipe.epochs=2", "logger.wandb.answer_timeout=0.2", *STORE]
        printed = train(folder, "model.teacher.weights=fit", *options)
    return folder, printed, read_run(folder)
