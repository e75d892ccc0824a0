"""Training and validation steps, teachers and augmentation neither wait for a GPU nor leave it."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.pretended_gpu import move_to_pretended_gpu, pretended_gpu

from rld_lightning import DistillationModule, FrozenTeacher, RLDLoss, create_model
from rld_lightning.callbacks import ClassAccuracy, Divergence, GradientNorm, TeacherMonitor
from rld_lightning.data.augment import Normalize
from rld_lightning.data.base import Batch
from rld_lightning.data.in_memory import InMemoryLoader, Split
from rld_lightning.data.mix import Mix
from rld_lightning.data.sampler import EpochSampler
from rld_lightning.metrics import EpochMeans
from rld_lightning.models.fingerprint import fingerprint
from rld_lightning.models.normalisation import Normalisation, Renormalise
from rld_lightning.models.teacher.ensemble import Ensemble
from rld_lightning.models.teacher.logits_table import LogitsTable
from rld_lightning.models.teacher.resident_table import ResidentTable
from rld_lightning.models.weights.claims import tensors_in
from rld_lightning.runs.checkpoint import snapshot

CLASSES, BATCH = 10, 4
OTHER = Renormalise(Normalisation((0.5,) * 3, (0.2,) * 3), Normalisation((0.4,) * 3, (0.3,) * 3), (40, 40))


def places(values):
    return {str(value.device) for value in values if value is not None}


def images():
    return torch.zeros(BATCH, 3, 32, 32, device="cuda")


def label():
    return torch.zeros(BATCH, dtype=torch.int64, device="cuda")


def networks():
    return create_model("resnet8", CLASSES), create_model("resnet14", CLASSES)


def teachers():
    yield "folded", FrozenTeacher(networks()[0], channels_last=True, fuse=True)
    yield "bfloat16", FrozenTeacher(networks()[0], dtype="bfloat16", renormalise=OTHER)
    yield "logits", FrozenTeacher(Ensemble(networks(), "logits", [None, OTHER]))
    yield "probabilities", FrozenTeacher(Ensemble(networks(), "probabilities"))


@pytest.mark.parametrize("name", [name for name, _ in teachers()])
def test_a_teacher(name):
    teacher = dict(teachers())[name]
    with pretended_gpu():
        move_to_pretended_gpu(teacher)
        assert places([teacher(images())[0]]) == {"cuda:0"}


def test_a_look_up_of_known_logits(tmp_path):
    file = LogitsTable(tmp_path / "t", 40, CLASSES)
    rows = torch.arange(40)
    file.write(rows, torch.randn(40, CLASSES), rows % CLASSES)
    table, teacher = ResidentTable(file, torch.device("cpu")), FrozenTeacher(networks()[0])
    teacher.use_table(table)
    assert table.complete
    with pretended_gpu():
        for name in ("table", "weights"):
            value = getattr(table, name)
            setattr(table, name, torch.empty(value.shape, dtype=value.dtype, device="cuda"))
        logits, _ = teacher(images(), view=label(), label=label())
        assert places([logits, table.known(label())]) == {"cuda:0"}


@pytest.mark.parametrize("mix", [Mix(0, 0, 0), Mix(0.2, 0, 0), Mix(0, 1.0, 0)], ids=["plain", "mixup", "cutmix"])
def test_batches(mix):
    with pretended_gpu():
        split = Split(torch.zeros(50, 40, 40, 3, dtype=torch.uint8, device="cuda"), label()[:1].expand(50))
        origin = torch.arange(50, device="cuda")
        normalize = Normalize((0.5,) * 3, (0.5,) * 3, 32, 32, "cuda")
        loader = InMemoryLoader(
            split, EpochSampler.for_training(50, 16), normalize, padding=4, flip=True, origin=origin
        )
        loader.mix = mix
        batches = list(loader)
    for batch in batches:
        assert places([*batch[:3], batch.view, batch.other and batch.other.label]) == {"cuda:0"}
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert len(batches) == 4


def test_steps_and_what_callbacks_measure(tmp_path):
    student, teacher = networks()
    teacher = FrozenTeacher(teacher)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    module = DistillationModule(student, RLDLoss(), optimizer, teacher=teacher, num_classes=CLASSES)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda", 0)))
    monitor, accuracy = TeacherMonitor(), ClassAccuracy(tmp_path)
    with pretended_gpu():
        move_to_pretended_gpu(student)
        move_to_pretended_gpu(teacher)
        batch = Batch(images(), label(), label())
        values = module._step_values(batch, 3)
        module.means["train"].add(["a"], values["counted"])
        for parameter in student.parameters():
            parameter.grad = torch.empty_like(parameter)
        outputs = module._callback_outputs(values)
        watchers = (Divergence(tmp_path), GradientNorm(), monitor)
        measured = [watcher.measure_step(module, outputs, batch) for watcher in watchers]
        validated = module._evaluation_step("val", batch)
        monitor.on_validation_epoch_start(trainer, module)
        accuracy.on_validation_epoch_start(trainer, module)
        for callback in (monitor, accuracy):
            callback.on_validation_batch_end(trainer, module, validated, batch, 0)
        totals = [means._totals for means in (*module.means.values(), monitor.means["val"])]
    assert places([*values.values(), *measured, *validated.values(), *totals]) == {"cuda:0"}
    assert places([accuracy.counts]) == {"cuda:0"}


def test_what_an_epochs_end_reads():
    student, means = networks()[0], EpochMeans()
    with pretended_gpu():
        move_to_pretended_gpu(student)
        assert places([fingerprint(student)]) == {"cuda:0"}
        means.update({"loss": torch.zeros((), device="cuda")}, BATCH)
        saved = {"state_dict": student.state_dict(), "sums": means.state_dict(), "metrics": [{"epoch": 0}]}
        assert places(tensors_in(saved)) == {"cuda:0", "cpu"}
        assert places(tensors_in(saved["sums"])) == places(tensors_in(snapshot(saved))) == {"cpu"}
