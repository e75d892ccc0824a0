"""A run that looks its teacher's logits up is the run that computes them, up to their rounding."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.configs import compose
from helpers.data import ready
from helpers.plans import make_plan
from safetensors.torch import load_file
from torch.testing import assert_close

from rld_lightning import CELoss, DistillationModule, FrozenTeacher, KDLoss, create_model
from rld_lightning.data import DigitsDataModule
from rld_lightning.losses import MLKDLoss
from rld_lightning.losses.features import ATLoss
from rld_lightning.models.store import TeacherStore
from rld_lightning.tasks.fit import fit
from rld_lightning.tasks.remember import remember_logits


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A store with a teacher of the digits."""
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    TeacherStore(folder).save(create_model("resnet8", 10), "digits", "resnet8", {"num_classes": 10})
    return folder


def run(folder, teachers, *overrides):
    """Trains on some digits; the teacher's forward passes are counted."""
    cfg = compose(
        "data=digits", "data.subset=0.2", "model=pair", "model.teacher.name=resnet8", "model.student.name=resnet8",
        "loss=rld", "recipe=quick", "recipe.epochs=1", "trainer=cpu", "trainer.precision=32-true",
        "callbacks.progress=null", "callbacks.teacher=null", f"paths.teachers={teachers}", *overrides, resolve=False,
    )  # fmt: skip
    cfg.paths.run, cfg.print_config = str(folder), False
    fit(cfg)
    return load_file(folder / "student.safetensors")


@pytest.fixture
def computed(monkeypatch):
    """Sizes of the batches that teachers compute."""
    sizes, original = [], FrozenTeacher._compute

    def compute(self, images, paths):
        sizes.append(len(images))
        return original(self, images, paths)

    monkeypatch.setattr(FrozenTeacher, "_compute", compute)
    monkeypatch.setattr("rld_lightning.tasks.fit.measure_teacher", lambda *_: None)
    return sizes


def test_the_second_run_computes_no_logits_and_ends_with_the_same_weights(tmp_path, teachers, computed, capsys):
    options = ("model.teacher.cache_dtype=float32", "model.teacher.cache=true")
    live = run(tmp_path / "live", teachers, "model.teacher.cache=false")
    met = len(computed)
    first = run(tmp_path / "first", teachers, *options)
    assert sum(computed[met:]) <= 290  # every view is computed once
    del computed[:]
    second = run(tmp_path / "second", teachers, *options)
    assert not computed
    assert_close(first, live, rtol=0, atol=0)
    assert_close(second, first, rtol=0, atol=0)
    output = capsys.readouterr().out
    assert "teacher's logits of 12,933 views in float32, 1 MB when full, about 0 % known" in output


@pytest.mark.slow
def test_other_hyper_parameters_meet_the_same_views_and_another_seed_others(tmp_path, teachers, computed):
    run(tmp_path / "first", teachers, "model.teacher.cache=true")
    del computed[:]
    run(tmp_path / "second", teachers, "model.teacher.cache=true", "loss.beta=2")
    assert not computed
    run(tmp_path / "third", teachers, "model.teacher.cache=true", "seed=1")
    assert computed


@pytest.mark.slow
def test_in_float16_a_run_differs_by_the_rounding(tmp_path, teachers):
    live = run(tmp_path / "live", teachers, "model.teacher.cache=false", "trainer.max_steps=3")
    cached = run(tmp_path / "cached", teachers, "model.teacher.cache=true", "trainer.max_steps=3")
    moved = run(tmp_path / "moved", teachers, "model.teacher.cache=false", "trainer.max_steps=3", "loss.beta=8.01")
    for key, value in live.items():
        if value.is_floating_point():
            assert (cached[key] - value).norm() <= 0.05 * (moved[key] - value).norm() + 1e-6


def planned(tmp_path, teachers, cache=True, **options):
    plan = make_plan(tmp_path, store=TeacherStore(teachers))
    return replace(plan, teacher=replace(plan.teacher, name="resnet8", cache=cache, **options))


def module_with(loss, teacher=None):
    teacher = teacher or FrozenTeacher(create_model("resnet8", 10))
    student = create_model("resnet8", 10)
    loss.connect(student, teacher.model, (3, 8, 8), torch.arange(10))
    return DistillationModule(student, loss, torch.optim.SGD, teacher=teacher, num_classes=10)


TRAINER = SimpleNamespace(precision="32-true")


@pytest.mark.parametrize(
    ("module", "trainer", "reason"),
    [
        (lambda: module_with(ATLoss()), TRAINER, "ATLoss looks inside the teacher"),
        (lambda: module_with(MLKDLoss()), TRAINER, "MLKDLoss looks at strongly augmented images"),
        (lambda: module_with(KDLoss()), SimpleNamespace(precision="64-true"), "logits in float64 would be rounded"),
        (
            lambda: module_with(KDLoss(), FrozenTeacher(create_model("resnet8", 10), dtype="float64")),
            TRAINER,
            "logits in float64 would be rounded",
        ),
    ],
)
def test_where_logits_cannot_be_looked_up_it_says_why(tmp_path, module, trainer, reason, capsys):
    module, data = module(), ready(DigitsDataModule(), 0, 1)
    remember_logits(module, planned(tmp_path, tmp_path), data, trainer)
    assert module.teacher.table is None
    assert f"off: {reason}" in capsys.readouterr().out


def test_data_without_end_switch_it_off(tmp_path, capsys):
    class Endless(DigitsDataModule):
        train_views = None

    module = module_with(KDLoss())
    remember_logits(module, planned(tmp_path, tmp_path), ready(Endless(), 0, 1), TRAINER)
    assert module.teacher.table is None
    assert "there is no end of augmented images" in capsys.readouterr().out


def test_auto_switches_it_off_where_there_is_no_room_or_no_use(tmp_path, capsys, monkeypatch):
    data = ready(DigitsDataModule(), 0, 1)
    module = module_with(KDLoss())
    remember_logits(module, planned(tmp_path, tmp_path, "auto"), data, TRAINER)
    assert module.teacher.table is not None
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=400_000))
    module = module_with(KDLoss())
    remember_logits(module, planned(tmp_path, tmp_path, "auto"), data, TRAINER)
    assert module.teacher.table is None
    assert "off: it may grow to 0.0 GB, and 0.0 GB are free" in capsys.readouterr().out
    monkeypatch.setattr("rld_lightning.tasks.remember.count_macs", lambda net, _: 1 if net is not module.student else 9)
    remember_logits(module, planned(tmp_path, tmp_path, "auto"), data, TRAINER)
    assert module.teacher.table is None
    assert "off: the teacher takes little of a step; model.teacher.cache=true switches it on" in capsys.readouterr().out
    remember_logits(module, planned(tmp_path, tmp_path, cache=False), data, TRAINER)
    module = DistillationModule(create_model("resnet8", 10), CELoss(), torch.optim.SGD, num_classes=10)
    remember_logits(module, planned(tmp_path, tmp_path), data, TRAINER)
    assert not capsys.readouterr().out


def test_each_teacher_view_and_precision_has_a_table_of_its_own(tmp_path):
    def path(teacher_weight=0.0, data=None, precision="32-true", **options):
        torch.manual_seed(0)
        network = create_model("resnet8", 10)
        network.state_dict()["fc.bias"][3] += teacher_weight
        module = module_with(KDLoss(), FrozenTeacher(network))
        data = ready(data or DigitsDataModule(), 0, 1)
        remember_logits(module, planned(tmp_path, tmp_path, **options), data, SimpleNamespace(precision=precision))
        return module.teacher.table.path

    usual = path()
    assert path(data=DigitsDataModule(seed=3, val_fraction=0.2, batch_size=8)) == usual
    others = [
        path(teacher_weight=1e-6),
        path(data=DigitsDataModule(padding=2)),
        path(data=DigitsDataModule(flip=True)),
        path(precision="bf16-mixed"),
        path(cache_dtype="float32"),
    ]
    assert len({usual, *others}) == 6


def test_a_teacher_computes_what_it_does_not_know_and_nothing_else(tmp_path, computed):
    from rld_lightning.models.logits_table import LogitsTable

    teacher = FrozenTeacher(create_model("resnet8", 10))
    images, view, label = torch.randn(8, 3, 32, 32), torch.arange(8), torch.arange(8) % 10
    live, _ = teacher(images)
    teacher.remember(LogitsTable(tmp_path / "table", 16, 10, "float32"))
    teacher(images[:3], view=view[:3], label=label[:3])
    logits, features = teacher(images, view=view, label=label)
    assert computed == [8, 3, 5]
    assert not features
    assert_close(logits, live, rtol=1e-5, atol=1e-5)
    assert torch.equal(teacher(torch.zeros_like(images), view=view, label=label)[0], logits)
    # Without a number, or with features to be tapped, it looks.
    teacher(images)
    teacher(images, ["fc"], view=view, label=label)
    assert computed == [8, 3, 5, 8, 8]
