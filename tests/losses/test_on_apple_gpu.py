"""Every loss trains on an Apple GPU as on a CPU: without float64, and with operators that exist there."""

from copy import deepcopy

import pytest
import torch
from helpers.pretended_apple_gpu import AppleTensor, operators_without_kernel, pretended_apple_gpu
from torch.testing import assert_close

from rld_lightning.losses import ModelOutput, StepContext, kd_loss, list_losses, loss_class, rld_loss
from rld_lightning.losses.connect import connect
from rld_lightning.losses.features.base import average_pool
from rld_lightning.models import create_model, forward_with_taps

CLASSES, BATCH = 10, 6


def train(student, teacher, loss, device):
    """Returns terms and statistics in two epochs, and the gradients, on the CPU."""
    torch.manual_seed(1)
    images = torch.randn(BATCH, 3, 32, 32)

    def outputs(images):
        with torch.no_grad():
            theirs = ModelOutput(*forward_with_taps(teacher, images, loss.teacher_taps))
        return ModelOutput(*forward_with_taps(student, images, loss.student_taps)), theirs

    views = outputs(images.to(device))
    strong = outputs(images.flip(0).to(device)) if loss.needs_strong_view else (None, None)
    label, index = (torch.arange(BATCH).to(device) + shift for shift in (0, 3))
    values = {}
    for epoch in (1, 30):
        step = StepContext(*views, label, index, epoch, *strong)
        terms = loss(step)
        with torch.no_grad():
            values |= {f"{name} {epoch}": value for name, value in (terms | loss.statistics(step)).items()}
    torch.stack(list(terms.values())).sum().backward()
    named = [*student.named_parameters(), *loss.named_parameters()]
    values |= {name: parameter.grad for name, parameter in named if parameter.grad is not None}
    assert all(value.device.type == device for value in values.values())
    return {name: value.detach().cpu() for name, value in values.items()}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", list_losses())
def test_a_step_is_that_of_a_cpu(name):
    torch.manual_seed(0)
    loss, teacher = loss_class(name)(), create_model("resnet8", CLASSES).eval().requires_grad_(False)
    student = connect(loss, create_model("resnet8", CLASSES), teacher, (3, 32, 32), torch.arange(100) % CLASSES)
    expected = train(*deepcopy((student, teacher, loss)), "cpu")
    with pretended_apple_gpu():
        for module in (student, teacher, loss):
            module.to("mps")
        assert_close(train(student, teacher, loss, "mps"), expected, rtol=1e-3, atol=1e-4)


def test_a_high_temperature_needs_no_float64():
    student, teacher = torch.randn(2, BATCH, CLASSES)
    with pretended_apple_gpu():
        loss = kd_loss(student.to("mps"), teacher.to("mps"), temperature=1000.0)["kd"]
        assert loss.dtype == torch.float32
        found = float(loss)
    assert found == pytest.approx(float(kd_loss(student, teacher, temperature=1000.0)["kd"]), rel=0.05)


def test_a_label_out_of_range_is_an_error():
    logits, label = torch.randn(BATCH, CLASSES), torch.full((BATCH,), CLASSES)
    with pretended_apple_gpu(), pytest.raises(ValueError, match=r"label 10 is outside \[0, 10\)"):
        rld_loss(logits.to("mps"), logits.to("mps"), label.to("mps"))


@pytest.mark.parametrize("size", [(7, 7), (4, 4), (2, 5), (1, 1)])
def test_pooling_to_a_size_that_does_not_divide_the_maps(size):
    maps = torch.randn(2, 3, 7, 7)
    with pretended_apple_gpu():
        pooled = average_pool(maps.to("mps"), size)
    assert isinstance(pooled, AppleTensor)
    assert_close(pooled.cpu(), torch.nn.functional.adaptive_avg_pool2d(maps, size))


def test_the_pretended_gpu_lacks_what_apples_lacks():
    assert {"special_ndtri", "_pdist_forward"} <= operators_without_kernel()
    assert not {"add.Tensor", "convolution", "nll_loss_forward", "relu_"} & operators_without_kernel()
    values = torch.randn(2, 3, 7, 7)
    with pretended_apple_gpu():
        for error, forbidden in (
            (TypeError, lambda: values.to("mps").double()),
            (TypeError, lambda: torch.zeros(2, dtype=torch.float64, device="mps")),
            (NotImplementedError, lambda: torch.special.ndtri(values.to("mps"))),
            (RuntimeError, lambda: torch.nn.functional.adaptive_avg_pool2d(values.to("mps"), 4)),
        ):
            with pytest.raises(error):
                forbidden()
