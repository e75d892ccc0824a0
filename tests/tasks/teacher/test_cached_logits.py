"""A run with cached teacher logits equals one that computes them, up to their rounding."""

import shutil
from copy import deepcopy
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
from rld_lightning.errors import UserError
from rld_lightning.losses import MLKDLoss
from rld_lightning.losses.features import ATLoss
from rld_lightning.models.normalisation import Normalisation, Renormalise
from rld_lightning.models.teacher.ensemble import Ensemble
from rld_lightning.models.teacher.logits_table import LogitsTable, round_beside_label, table_key
from rld_lightning.models.teacher.resident_table import ResidentTable
from rld_lightning.models.teacher.teacher_store import TeacherStore
from rld_lightning.runs.checkpoint import write_checkpoint
from rld_lightning.tasks.cache import cache
from rld_lightning.tasks.fit import fit
from rld_lightning.tasks.teacher import cached_logits
from rld_lightning.tasks.teacher.cached_logits import cache_logits, cache_validation_logits


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A store with a teacher of the digits."""
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    TeacherStore(folder).save(create_model("resnet8", 10), "digits", "resnet8", {"num_classes": 10})
    return folder


def configuration(folder, teachers, *overrides):
    cfg = compose(
        "data=digits", "data.subset=0.2", "model=pair", "model.teacher.name=resnet8", "model.student.name=resnet8",
        "loss=rld", "recipe=quick", "recipe.epochs=1", "trainer=cpu", "trainer.precision=32-true",
        "callbacks.progress=null", "callbacks.teacher=null", f"paths.teachers={teachers}", *overrides, resolve=False,
    )  # fmt: skip
    cfg.paths.run, cfg.print_config = str(folder), False
    return cfg


def run(folder, teachers, *overrides):
    """Trains on some digits, and counts the teacher's forward passes."""
    fit(configuration(folder, teachers, *overrides))
    return load_file(folder / "student.safetensors")


@pytest.fixture
def computed(monkeypatch):
    """Records the batch sizes that teachers compute."""
    sizes, original = [], FrozenTeacher._compute

    def compute(self, images, paths):
        sizes.append(len(images))
        return original(self, images, paths)

    monkeypatch.setattr(FrozenTeacher, "_compute", compute)
    monkeypatch.setattr("rld_lightning.tasks.fit.measure_teacher", lambda *_: None)
    return sizes


def test_second_run_computes_no_logits_and_reaches_the_same_weights(tmp_path, teachers, computed, capsys):
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
    altered = torch.load(tmp_path / "second/last.ckpt", weights_only=True)
    del altered["optimizer_states"][0]["state"][3]
    write_checkpoint(altered, tmp_path / "altered.ckpt", keep=False)
    with pytest.raises(UserError, match=r"and had .* when they were written"):
        run(tmp_path / "third", teachers, *options[:1], "model.teacher.cache=fill", f"resume={tmp_path}/altered.ckpt")
    assert not computed, "before anything is computed ahead"
    resume = f"resume={tmp_path}/second/last.ckpt"
    assert_close(run(tmp_path / "again", teachers, *options[:1], "model.teacher.cache=fill", resume), second)
    assert not computed, "nor if nothing is left to train"
    output = capsys.readouterr().out
    assert "nothing is left to train: all 1 epochs are trained" in output
    assert "the teacher's logits of 12,933 views are looked up, in float32, 0.5 MB when full, about 0 % of" in output


@pytest.mark.slow
def test_other_hyper_parameters_use_the_same_views_and_another_seed_others(tmp_path, teachers, computed):
    run(tmp_path / "first", teachers, "model.teacher.cache=true")
    del computed[:]
    run(tmp_path / "second", teachers, "model.teacher.cache=true", "loss.beta=2")
    assert not computed
    run(tmp_path / "third", teachers, "model.teacher.cache=true", "seed=1")
    assert computed


@pytest.mark.slow
@pytest.mark.parametrize("ahead", ["command", "fill"])
def test_run_with_a_full_table_never_runs_the_teacher(tmp_path, teachers, computed, ahead, capsys):
    options = ("trainer.precision=bf16-mixed", "data.subset=0.1")
    store = shutil.copytree(teachers, tmp_path / "store", ignore=shutil.ignore_patterns("logits"))
    filling = configuration(tmp_path / "first", store, "model.teacher.cache=fill", *options)
    (cache if ahead == "command" else fit)(filling)
    assert sum(computed) == 142 * 9
    del computed[:]
    run(tmp_path / "run", store, *options, "recipe.epochs=3", "seed=5", "data.seed=0", "model.teacher.cache=true")
    assert not computed
    assert "about 100 % of this run's known" in capsys.readouterr().out


def test_cache_that_does_not_fit_is_refused_in_a_sentence(tmp_path, teachers):
    alone = configuration(tmp_path, teachers)
    alone.model.teacher = None
    with pytest.raises(UserError, match=r"the model has no teacher whose logits could be kept; choose a pair"):
        cache(alone)
    with pytest.raises(
        UserError, match=r"the teacher resnet14 is not in .*resnet14.*name its file with model\.teacher"
    ):
        cache(configuration(tmp_path, teachers, "model.teacher.name=resnet14", "model.teacher.weights=fit"))
    with pytest.raises(UserError, match=r"cannot be kept: these data have unlimited augmented views"):
        cache(configuration(tmp_path, teachers, "data.mixup=0.2"))


@pytest.mark.slow
def test_float16_cache_changes_a_run_by_its_rounding(tmp_path, teachers):
    live = run(tmp_path / "live", teachers, "model.teacher.cache=false", "trainer.max_steps=3")
    cached = run(tmp_path / "cached", teachers, "model.teacher.cache=true", "trainer.max_steps=3")
    moved = run(tmp_path / "moved", teachers, "model.teacher.cache=false", "trainer.max_steps=3", "loss.beta=8.01")
    for key, value in live.items():
        if value.is_floating_point():
            assert (cached[key] - value).norm() <= 0.05 * (moved[key] - value).norm() + 1e-6


@pytest.mark.slow
def test_whole_run_equals_one_with_a_rounded_teacher(tmp_path, teachers, computed, monkeypatch):
    """So the rounding explains every difference to a run without a table."""
    options = ("recipe.epochs=3", "data.val_fraction=0.2")
    cold = run(tmp_path / "cold", teachers, "model.teacher.cache=true", *options)
    del computed[:]
    warm = run(tmp_path / "warm", teachers, "model.teacher.cache=true", *options)
    assert not computed
    original = FrozenTeacher.forward

    def rounding(self, images, paths=(), *, view=None, label=None):
        logits, features = original(self, images, paths)
        return (logits if label is None else round_beside_label(logits, label).float()), features

    monkeypatch.setattr(FrozenTeacher, "forward", rounding)
    rounded = run(tmp_path / "rounded", teachers, "model.teacher.cache=false", *options)
    assert_close(warm, cold, rtol=0, atol=0)
    assert_close(cold, rounded, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_processes_of_a_run_fill_the_same_table(tmp_path, teachers):
    tables = []
    for name, options in {"one": (), "two": ("trainer=ddp_cpu", "trainer.devices=2")}.items():
        shutil.copytree(teachers, tmp_path / name, ignore=shutil.ignore_patterns("logits"))
        overrides = ("model.teacher.cache=true", "model.teacher.cache_dtype=float32", "recipe.epochs=2", *options)
        run(tmp_path / f"run of {name}", tmp_path / name, *overrides)
        (path,) = (tmp_path / name).rglob("resnet8-*.logits")
        tables.append(LogitsTable(path, 12_933, 10, "float32"))
    (one, known), (two, known_too) = (table.read(torch.arange(12_933)) for table in tables)
    assert torch.equal(known, known_too)
    assert torch.equal(known, tables[0].table.any(1)), "and no row is torn"
    assert_close(two[known], one[known], rtol=1e-5, atol=1e-5)


def planned(tmp_path, teachers, cache=True, **options):
    plan = make_plan(tmp_path, store=TeacherStore(teachers))
    return replace(plan, teacher=replace(plan.teacher, name="resnet8", cache=cache, **options))


def module_with(loss, teacher=None):
    teacher = teacher or FrozenTeacher(create_model("resnet8", 10))
    student = create_model("resnet8", 10)
    loss.connect(student, teacher.model, (3, 8, 8), torch.arange(10))
    return DistillationModule(student, loss, torch.optim.SGD, teacher=teacher, num_classes=10)


TRAINER = SimpleNamespace(precision="32-true", strategy=SimpleNamespace(root_device=torch.device("cpu")))


@pytest.mark.parametrize(
    ("module", "trainer", "reason"),
    [
        (lambda: module_with(ATLoss()), TRAINER, "ATLoss uses features of the teacher"),
        (lambda: module_with(MLKDLoss()), TRAINER, "MLKDLoss uses strongly augmented images"),
        (lambda: module_with(KDLoss()), SimpleNamespace(precision="64-true"), "logits in float64 would be rounded"),
        (
            lambda: module_with(KDLoss(), FrozenTeacher(create_model("resnet8", 10), dtype="float64")),
            TRAINER,
            "logits in float64 would be rounded",
        ),
    ],
)
def test_reason_is_printed_if_logits_cannot_be_cached(tmp_path, module, trainer, reason, capsys):
    module, data = module(), ready(DigitsDataModule(), 0, 1)
    cache_logits(module, planned(tmp_path, tmp_path), data, trainer)
    assert module.teacher.table is None
    assert f"off: {reason}" in capsys.readouterr().out


def test_unlimited_views_switch_the_cache_off(tmp_path, capsys):
    class Endless(DigitsDataModule):
        train_views = None

    module = module_with(KDLoss())
    cache_logits(module, planned(tmp_path, tmp_path), ready(Endless(), 0, 1), TRAINER)
    assert module.teacher.table is None
    assert "these data have unlimited augmented views" in capsys.readouterr().out


def test_auto_switches_the_cache_off_without_room_or_benefit(tmp_path, capsys, monkeypatch):
    data = ready(DigitsDataModule(), 0, 1)
    module = module_with(KDLoss())
    cache_logits(module, planned(tmp_path, tmp_path, "auto"), data, TRAINER)
    assert module.teacher.table is not None
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=400_000))
    module = module_with(KDLoss())
    cache_logits(module, planned(tmp_path, tmp_path, "auto"), data, TRAINER)
    assert module.teacher.table is None
    assert "off: it may grow by 0.3 MB, and 0.4 MB are free" in capsys.readouterr().out
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=200_000))
    with pytest.raises(ValueError, match=r"no room: it may grow .*; make room, or set model\.teacher\.cache=false"):
        cache_logits(module, planned(tmp_path, tmp_path, cache=True), data, TRAINER)
    monkeypatch.setattr(
        "rld_lightning.tasks.teacher.cached_logits.count_macs", lambda net, _: 1 if net is not module.student else 9
    )
    cache_logits(module, planned(tmp_path, tmp_path, "auto"), data, TRAINER)
    assert module.teacher.table is None
    assert "off: the teacher takes little of a step; model.teacher.cache=true turns it on" in capsys.readouterr().out
    cache_logits(module, planned(tmp_path, tmp_path, cache=False), data, TRAINER)
    module = DistillationModule(create_model("resnet8", 10), CELoss(), torch.optim.SGD, num_classes=10)
    cache_logits(module, planned(tmp_path, tmp_path), data, TRAINER)
    assert not capsys.readouterr().out


def test_on_a_gpu_the_table_must_be_complete(tmp_path, capsys, monkeypatch):
    callbacks, keys = [], []
    monkeypatch.setattr(cached_logits, "table_key", lambda *args: keys.append(args) or table_key(*args))
    data = ready(DigitsDataModule(val_fraction=0.1), 0, 1)
    gpu = SimpleNamespace(root_device=torch.device("cuda"))

    def table(epochs, cache="auto"):
        trainer = SimpleNamespace(
            precision="32-true",
            strategy=gpu,
            max_epochs=epochs,
            max_steps=-1,
            limit_train_batches=1.0,
            callbacks=callbacks,
        )
        torch.manual_seed(0)
        module = module_with(KDLoss())
        cache_logits(module, planned(tmp_path, tmp_path, cache), data, trainer)
        return module.teacher.table

    assert table(3) is None
    assert "off: on a GPU it pays only if all logits are known or the run is long" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.logits"))
    assert table(3, cache=True) is not None
    assert not callbacks
    del keys[:]
    assert table(data.train_views) is not None  # as long as computing all of them
    assert [type(callback).__name__ for callback in callbacks] == ["FillAhead"]
    assert len(keys) == 1  # a hash of all weights
    known = table(3, cache=True)
    for view in known.rows_to_read().split(1000):  # of the images that are trained on; the held-out ones' stay unknown
        known.write(view, torch.randn(len(view), 10), torch.zeros_like(view))
    assert table(3) is not None
    assert ResidentTable(known, torch.device("cpu")).complete
    known.rows_to_read = None
    assert not ResidentTable(known, torch.device("cpu")).complete


def test_teachers_views_and_precisions_have_separate_tables(tmp_path):
    def path(teacher_weight=0.0, data=None, precision="32-true", **options):
        torch.manual_seed(0)
        network = create_model("resnet8", 10)
        network.state_dict()["fc.bias"][3] += teacher_weight
        module = module_with(KDLoss(), FrozenTeacher(network))
        data = ready(data or DigitsDataModule(), 0, 1)
        cache_logits(module, planned(tmp_path, tmp_path, **options), data, SimpleNamespace(precision=precision))
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


def test_unwritable_store_lets_auto_continue_without_a_cache(tmp_path, capsys):
    (tmp_path / "digits").touch()
    data, module = ready(DigitsDataModule(), 0, 1), module_with(KDLoss())
    cache_validation_logits(module.teacher, planned(tmp_path, tmp_path, "auto"), data)
    cache_logits(module, planned(tmp_path, tmp_path, "auto"), data, TRAINER)
    assert module.teacher.table is module.teacher.validation_table is None
    assert "cannot be written" in capsys.readouterr().out
    with pytest.raises(OSError, match="digits"):
        cache_logits(module, planned(tmp_path, tmp_path), data, TRAINER)


def test_validation_images_are_evaluated_once_for_all_runs(tmp_path, computed):
    torch.manual_seed(0)
    network = create_model("resnet8", 10)

    def asked(data, dtype=None):
        teacher = FrozenTeacher(deepcopy(network), dtype=dtype)
        cache_validation_logits(teacher, planned(tmp_path, tmp_path, "auto"), data)
        del computed[:]
        said = [teacher.validate(batch.images, batch.index, batch.label) for batch in data.val_dataloader()]
        seen = sum(computed)
        assert_close(torch.cat(said), torch.cat([teacher(b.images)[0] for b in data.val_dataloader()]))
        return seen

    held_out = {"val_fraction": 0.2, "seed": 3}
    assert asked(ready(DigitsDataModule())) == 360
    assert asked(ready(DigitsDataModule(eval_batch_size=50))) == 0
    assert asked(ready(DigitsDataModule(**held_out))) == 288
    assert asked(ready(DigitsDataModule(**held_out, padding=2, subset=0.5))) == 0
    assert asked(ready(DigitsDataModule(**held_out | {"seed": 4}))) == 288, "others"
    assert asked(ready(DigitsDataModule()), "bfloat16") == 360
    network.state_dict()["fc.bias"][3] += 1e-6
    assert asked(ready(DigitsDataModule())) == 360


def test_teacher_computes_only_missing_rows(tmp_path, computed):
    teacher = FrozenTeacher(create_model("resnet8", 10))
    images, view, label = torch.randn(8, 3, 32, 32), torch.arange(8), torch.arange(8) % 10
    live, _ = teacher(images)
    teacher.use_table(LogitsTable(tmp_path / "table", 16, 10, "float32"))
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


def test_table_covers_all_members_with_their_preprocessing(tmp_path):
    data = ready(DigitsDataModule(batch_size=100))
    plan = make_plan(tmp_path)
    plan = replace(plan, teacher=replace(plan.teacher, name="resnet8+resnet14", cache=True))
    members, given = [create_model(name, 10) for name in ("resnet8", "resnet14")], Normalisation((0.5,) * 3, (0.5,) * 3)

    def table(*stds):
        renormalises = [Renormalise(given, Normalisation((0.5,) * 3, (std,) * 3)) for std in stds]
        teacher = FrozenTeacher(Ensemble([deepcopy(member) for member in members], renormalises=renormalises))
        cache_validation_logits(teacher, plan, data)
        return teacher.validation_table.path

    first = table(0.25, 0.2)
    assert table(0.25, 0.2) == first
    assert len({first, table(0.25, 0.3), table(0.2, 0.25)}) == 3
    with torch.no_grad():
        members[1].fc.bias += 1
    assert table(0.25, 0.2) != first
