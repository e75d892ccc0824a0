"""Twenty SGD steps on CIFAR-100 with the module and the Trainer, compared with the reference implementation."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from rld_lightning import DistillationModule, FrozenTeacher, KDLoss, RLDLoss, create_model
from rld_lightning.data.augment import Normalize
from rld_lightning.data.base import Batch
from rld_lightning.models.compiled import CompiledCall

CPU = torch.device("cpu")
FOLDER = Path(__file__).parent / "golden" / "trajectory"
PRECISION = {torch.float32: "32-true", torch.float64: "64-true"}


def golden(method):
    return json.loads((FOLDER / f"{method}_resnet20_resnet8.json").read_text())


def make_loss(method, hyper):
    if method == "kd":
        return KDLoss(hyper["temperature"], hyper["kd_weight"], ce_weight=hyper["ce_weight"])
    return RLDLoss(
        hyper["alpha"], hyper["beta"], hyper["temperature"], hyper["confidence_temperature"], warmup_epochs=1
    )


def images_and_labels(split, facts):
    stored = np.load(FOLDER / "cifar100_first.npz")
    normalize = Normalize(facts["mean"], facts["std"], 32, 32)
    images = normalize(torch.from_numpy(stored[f"{split}_images"])).contiguous()
    return images, torch.from_numpy(stored[f"{split}_labels"]).long()


class Recorder(Callback):
    """Records each step's losses and gradient norm, before the update."""

    def __init__(self):
        self.steps = []

    def on_fit_start(self, trainer, pl_module):
        pl_module.loss.register_forward_hook(self.on_loss)

    def on_loss(self, loss, _arguments, terms):
        values = {name: value.item() for name, value in terms.items()}
        total, ce = sum(values.values()), values.pop("ce") / loss.ce_weight
        self.steps.append({"ce": ce, "distillation": sum(values.values()), "total": total})

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [p.grad for p in pl_module.student.parameters()]
        self.steps[-1]["grad_norm"] = torch.nn.utils.get_total_norm(gradients).item()


def train(method, dtype, tmp_path, steps=20, compiled=False):
    facts = golden(method)
    teacher, student = create_model("resnet20"), create_model("resnet8")
    teacher.load_state_dict(load_file(FOLDER / "teacher_resnet20.safetensors"))
    student.load_state_dict(load_file(FOLDER / "start_resnet8.safetensors"))
    hyper = facts["optimizer"]
    optimizer = partial(torch.optim.SGD, lr=hyper["lr"], momentum=hyper["momentum"], weight_decay=hyper["weight_decay"])
    images, labels = images_and_labels("train", facts["data"])
    batches = [
        Batch(images[start : start + 64], labels[start : start + 64], torch.arange(start, start + 64))
        for start in range(0, 64 * steps, 64)
    ]
    frozen = FrozenTeacher(teacher, dtype=dtype)
    assert frozen.fold((3, 32, 32)) == 21  # as in a run
    module = DistillationModule(student, make_loss(method, facts["hyper"]), optimizer, teacher=frozen, num_classes=100)
    if compiled:
        module.compiled = CompiledCall(student, 64, "student", CPU)
        module.compiled_scores = CompiledCall(module.scores_of_logits, 64, "loss", CPU, of_logits=True)
    recorder = Recorder()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision=PRECISION[dtype],
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return facts, module, recorder.steps


LOSSES = ("ce", "distillation", "total")


def deviation(found, expected, keys=LOSSES):
    return max(abs(found[key] - expected[key]) / abs(expected[key]) for key in keys)


def assert_the_references(steps, expected):
    keys = (*LOSSES, "grad_norm")
    assert max(deviation(step, other, keys) for step, other in zip(steps, expected, strict=True)) < 1e-6


@pytest.mark.thinned(2)
@pytest.mark.parametrize("method", ["rld", "kd"])
def test_the_first_float64_steps_equal_the_references(method, tmp_path):
    """Three steps: momentum first affects the result of the third."""
    facts, _, steps = train(method, torch.float64, tmp_path, steps=3)
    assert_the_references(steps, facts["steps_float64"][:3])


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("method", ["rld", "kd"])
def test_the_float64_trajectory_equals_the_references(method, compiled, tmp_path):
    facts, module, steps = train(method, torch.float64, tmp_path, compiled=compiled)

    assert len(facts["steps_float64"]) == 20
    assert_the_references(steps, facts["steps_float64"])
    for name, parameter in module.student.named_parameters():
        assert parameter.norm().item() == pytest.approx(facts["final_param_l2_float64"][name], rel=1e-6, abs=1e-9)
    buffers = dict(module.student.named_buffers())
    assert {n: buffers[n].item() for n in facts["final_num_batches_tracked"]} == facts["final_num_batches_tracked"]

    expected = load_file(FOLDER / f"{method}_resnet20_resnet8.safetensors")
    images, _ = images_and_labels("test", facts["data"])
    module.student.eval()
    with torch.no_grad():
        student = module.student(images.double())
    torch.testing.assert_close(student, expected["student_eval_logits_float64"].double(), rtol=1e-6, atol=1e-6)
    teacher, _ = module.teacher(images.double())
    torch.testing.assert_close(teacher, expected["teacher_eval_logits"].double(), rtol=1e-5, atol=1e-4)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("method", ["rld", "kd"])
def test_float32_trajectory_within_the_references_own_sensitivity(method, tmp_path):
    # RLD at full weight from the first step is chaotic: rounding errors grow to percents, so more steps test nothing.
    facts, _, steps = train(method, torch.float32, tmp_path, steps=4 if method == "rld" else 20)

    deviations = list(map(deviation, steps, facts["steps"]))
    assert max(deviations[:2]) < 1e-5
    assert max(deviations[:4]) < 1e-3
    if method == "kd":
        assert max(deviations) < 2e-3


def test_images_are_scaled_as_in_the_reference():
    facts = golden("rld")["data"]
    images, labels = images_and_labels("train", facts)

    assert labels[:64].tolist() == facts["batch0_targets"]
    torch.testing.assert_close(
        images[0, 0, 0].double(),
        torch.tensor(facts["batch0_image0_channel0_row0"], dtype=torch.float64),
        rtol=1e-7,
        atol=0,
    )
    assert images[:64].double().sum().item() == pytest.approx(facts["batch0_sum_float64"], rel=1e-9)
    assert images[1216:].double().sum().item() == pytest.approx(facts["batch19_sum_float64"], rel=1e-9)
