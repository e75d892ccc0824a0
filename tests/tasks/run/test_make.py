"""Data made from the configuration, with the batch size chosen for the device and the number of images."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from rld_lightning.runs.settings import changes, settings
from rld_lightning.tasks.run.make import make_data, suitable_batch


@pytest.mark.parametrize(
    ("images", "processes", "found"),
    [(20, 1, 8), (336, 1, 16), (511, 1, 16), (512, 1, 32), (50_000, 1, 32), (500, 3, 24)],
)
def test_epoch_has_sixteen_steps_if_possible(images, processes, found):
    assert suitable_batch(images, torch.device("cpu"), processes) == found


@pytest.mark.parametrize(("memory", "most"), [(8e9, 64), (24e9, 128)])
def test_gpu_allows_larger_batches(monkeypatch, memory, most):
    properties = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert suitable_batch(50_000, torch.device("cuda"), 2) == 2 * most


def test_data_are_created_before_their_batch_size_is_known():
    node = {"_target_": "rld_lightning.data.DigitsDataModule", "batch_size": "auto"}
    assert make_data(OmegaConf.create(node)).batch_size == 1
    assert make_data(OmegaConf.create(node | {"batch_size": 7})).batch_size == 7


def test_resumed_run_keeps_its_batch_size():
    before = {"recipe": {"batch_size": 16}, "data": {"batch_size": 16}}
    now = {"recipe": {"batch_size": "auto"}, "data": {"batch_size": "auto"}}
    assert not changes(settings(before), OmegaConf.create(now))
    assert changes(settings(before), OmegaConf.create({"data": {"batch_size": 32}})) == {
        "data.batch_size": ("16", "32")
    }
