"""No loss waits for a GPU, nor creates tensors on another device."""

import pytest
import torch
from helpers.pretended_gpu import move_to_pretended_gpu, pretended_gpu

from rld_lightning.losses import ModelOutput, StepContext, list_losses, loss_class
from rld_lightning.losses.connect import connect
from rld_lightning.models import create_model, forward_with_taps

CLASSES, BATCH = 10, 4


class OnCpu(torch.Generator):
    """A generator for any device, as none of a GPU can be created without one."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


@pytest.mark.parametrize("name", list_losses())
def test_on_a_pretended_gpu_terms_and_statistics_stay_there_unread(name, monkeypatch):
    loss, teacher = loss_class(name)(), create_model("resnet8", CLASSES).eval().requires_grad_(False)
    student = connect(loss, create_model("resnet8", CLASSES), teacher, (3, 32, 32), torch.arange(100) % CLASSES)
    monkeypatch.setattr(torch, "Generator", OnCpu)
    with pretended_gpu():
        for module in (teacher, student, loss):
            move_to_pretended_gpu(module)
        label, index = torch.zeros(2, BATCH, dtype=torch.int64, device="cuda")

        def outputs():
            images = torch.zeros(BATCH, 3, 32, 32, device="cuda")
            taps = (student, loss.student_taps), (teacher, loss.teacher_taps)
            return [ModelOutput(*forward_with_taps(network, images, paths)) for network, paths in taps]

        strong = outputs() if loss.needs_strong_view else (None, None)
        step = StepContext(*outputs(), label, index, 30, *strong)
        values = loss(step) | loss.statistics(step)
    assert {value.device.type for value in values.values()} == {"cuda"}


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: 1 if x.any() else 0,
        lambda x: x + torch.ones(3),
        lambda x: x.index_select(0, torch.zeros(2, dtype=torch.int64)),
    ],
    ids=["item", "mask", "if", "cpu", "cpu index"],
)
def test_a_pretended_gpu_refuses_to_be_waited_for(wait):
    with pretended_gpu(), pytest.raises(Exception, match=r"aten|devices|same device"):
        wait(torch.zeros(3, device="cuda"))
