"""Arguments of trainer, data, callbacks and loggers: valid ones pass, others end in a message that names them."""

import re

import pytest
from omegaconf import OmegaConf

from rld_lightning.errors import UserError
from rld_lightning.hydra.checks.targets import check_parts

PARTS = {
    "trainer": {"_target_": "lightning.pytorch.Trainer", "max_epochs": 3, "limit_val_batches": None},
    "data": {"_target_": "rld_lightning.data.DigitsDataModule", "batch_size": "auto"},
    "callbacks": {"stop": {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/top1"}},
    "logger": {"wandb": {"_target_": "rld_lightning.tracking.WandbLogger", "save_dir": "runs", "group": "mine"}},
}


def checked(part, changes):
    cfg = OmegaConf.create(PARTS)
    for key, value in changes.items():
        OmegaConf.update(cfg, f"{part}.{key}", value)
    check_parts(cfg)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("trainer", {"max_epochs": 5}),
        ("logger.wandb", {"resume": "allow", "version": "abc"}),  # arguments of wandb.init and of Lightning's logger
        ("data", {"_target_": "builtins.dict", "anything": 1}),  # accepts any argument
    ],
)
def test_what_they_take_is_taken(part, changes):
    checked(part, changes)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("logger.wandb", {"grupp": 1}, "WandbLogger takes no grupp: remove it ('~logger.wandb.grupp')."),
        ("callbacks.stop", {"patiense": 3}, "EarlyStopping takes no patiense: remove it"),
        ("callbacks.stop", {"patiense": 3}, "Did you mean 'patience'?"),
        ("callbacks.stop", {"patience": "x"}, "callbacks.stop.patience=x is not allowed; it must be a whole number"),
        ("callbacks.stop", {"_target_": None}, "callbacks.stop._target_ is missing: name the class"),
        ("data", {"_target_": "rld_lightning.data.DigitDataModule"}, "Did you mean 'DigitsDataModule'"),
        ("data", {"_target_": "rld_lightning.dta.Digits"}, "does not exist: No module named 'rld_lightning.dta'"),
        ("data", {"_target_": ""}, "does not exist; give the import path of a class."),
        ("trainer", {"gpus": 1}, "lightning.pytorch.Trainer takes no gpus"),
    ],
)
def test_what_they_do_not_take_is_said(part, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        checked(part, changes)
