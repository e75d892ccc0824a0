from types import SimpleNamespace

import pytest
import torch

from rld_lightning import CELoss, DistillationModule, FrozenTeacher, KDLoss, create_model
from rld_lightning.data import DigitsDataModule
from rld_lightning.tasks.run.threads import choose_threads, threads_for


@pytest.mark.parametrize(
    ("work", "cores", "processes", "threads"),
    [
        (3e7, 16, 1, 1),  # digits
        (5e9, 16, 1, 5),  # resnet20 to resnet8 on CIFAR-100, 64 images
        (4e10, 16, 1, 16),
        (4e10, 16, 4, 4),
        (4e10, 2, 4, 1),  # more processes than cores
        (0, 2, 1, 1),
    ],
)
def test_threads_are_limited_by_work_and_cores(work, cores, processes, threads):
    assert threads_for(work, cores, processes) == threads


@pytest.fixture
def chosen(monkeypatch):
    """Records the numbers of threads that were set."""
    numbers = []
    monkeypatch.setattr("torch.set_num_threads", numbers.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    return numbers


def trainer_on(device, world_size=1):
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), world_size=world_size)


def test_work_counts_both_networks_for_this_process(chosen, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    student = create_model("resnet20", 10)
    data = DigitsDataModule(batch_size=1024)
    alone = DistillationModule(student, CELoss(), torch.optim.SGD, num_classes=10)
    pair = DistillationModule(
        student, KDLoss(), torch.optim.SGD, teacher=FrozenTeacher(create_model("resnet110", 10)), num_classes=10
    )
    for module, processes in ((alone, 1), (pair, 1), (pair, 2)):
        choose_threads(module, data, trainer_on("cpu", processes))
    assert chosen == [8, 16, 12]  # 8 G, 24 G and half of that
    assert "8 of 16 cores, for 7.8 G multiply-accumulates a step" in capsys.readouterr().out


def test_user_setting_is_kept_and_gpus_need_none(chosen, monkeypatch, capsys):
    module = DistillationModule(create_model("resnet20", 10), CELoss(), torch.optim.SGD, num_classes=10)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    choose_threads(module, DigitsDataModule(), trainer_on("cpu"))
    monkeypatch.delenv("OMP_NUM_THREADS")
    choose_threads(module, DigitsDataModule(), trainer_on("cuda"))
    assert not chosen
    assert not capsys.readouterr().out


def test_empty_variable_sets_nothing(chosen, monkeypatch):
    module = DistillationModule(create_model("resnet20", 10), CELoss(), torch.optim.SGD, num_classes=10)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    choose_threads(module, DigitsDataModule(), trainer_on("cpu"))
    assert chosen == [1]
