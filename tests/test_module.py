"""The module: training, checkpoints, logging and resuming."""

from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from helpers.training import quiet_trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rld_lightning import CELoss, DistillationModule, FrozenTeacher, KDLoss, RLDLoss, create_model
from rld_lightning.callbacks import Divergence, StepSeed, TeacherMonitor, Throughput
from rld_lightning.data import DigitsDataModule
from rld_lightning.losses import CombinedLoss
from rld_lightning.losses.features import CRDLoss, DHKDLoss, FitNetLoss, ReviewKDLoss
from rld_lightning.metrics import term_shares
from rld_lightning.optimizer_step import accumulation_factor

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def network(width=4, seed=0):
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    model = nn.Sequential(*layers)
    model(torch.zeros(2, 3, 8, 8))
    model[1].reset_running_stats()
    return model


def module(loss=None, **options):
    teacher = FrozenTeacher(network(8, seed=1))
    return DistillationModule(
        network(), RLDLoss() if loss is None else loss, SGD, teacher=teacher, num_classes=10, **options
    )


def trainer(tmp_path, *callbacks, **options):
    return quiet_trainer(*callbacks, **{"max_epochs": 2, "default_root_dir": tmp_path} | options)


def digits(**options):
    return DigitsDataModule(batch_size=128, **options)


class LearnableLoss(CELoss):
    """A loss with a learnable parameter."""

    needs_teacher = True

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def terms(self, step):
        return {"scaled": self.log_scale.exp() * (step.student.logits - step.teacher.logits).square().mean()}


def test_only_the_student_and_the_loss_are_saved_and_optimised(tmp_path):
    job = module(LearnableLoss(), info={"student": "tiny"})
    fitted = trainer(tmp_path)
    fitted.fit(job, digits())

    optimised = {id(p) for group in fitted.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in [*job.student.parameters(), job.loss.log_scale]}
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    students = {f"student.{key}" for key in job.student.state_dict()}
    assert set(checkpoint["state_dict"]) == students | {"loss.log_scale"}
    assert checkpoint["hyper_parameters"] == {"num_classes": 10, "student": "tiny"}
    assert job.loss.log_scale != 0


def test_teacher_is_bit_identical_after_training(tmp_path):
    job = module()
    before = {key: value.clone() for key, value in job.teacher.model.state_dict().items()}
    trainer(tmp_path).fit(job, digits())

    for key, value in job.teacher.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not job.teacher.training
    assert not any(p.requires_grad or p.grad is not None for p in job.teacher.parameters())
    assert not any(module is job.teacher.model for module in job.modules())


def test_a_loss_that_needs_no_teacher_does_not_run_it(tmp_path):
    job = module(CELoss())
    assert job.teacher is None
    trainer(tmp_path, max_epochs=1).fit(job, digits())


def test_a_loss_without_its_teacher_raises():
    with pytest.raises(ValueError, match=r"RLDLoss needs a teacher.*loss=ce"):
        DistillationModule(network(), RLDLoss(), SGD, num_classes=10)


def test_accuracy_is_measured_in_float32_whatever_training_uses(tmp_path):
    measured = []

    class Watch(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            measured.append((outputs["student_logits"], outputs["teacher_prediction"], batch.images))

    job = module()
    mixed = trainer(tmp_path, TeacherMonitor(), Watch(), precision="bf16-mixed")
    mixed.validate(job, digits(), verbose=False)
    job.eval()
    with torch.inference_mode():
        for logits, teacher, images in measured:
            assert torch.equal(logits, job.student(images))
            assert torch.equal(teacher, job.teacher(images)[0].argmax(1))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(measured[0][0], job.student(measured[0][2]).float())


def test_unknown_scheduler_interval():
    with pytest.raises(ValueError, match=r"'epochs' is unknown; choose 'epoch' or 'step'"):
        module(scheduler_interval="epochs")


class Watch(Callback):
    """Recomputes the values that the module logs."""

    def __init__(self):
        self.right = self.seen = self.wrong_teacher = 0
        self.history = []

    def on_validation_epoch_start(self, trainer, pl_module):
        self.right = self.seen = 0

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.right += (outputs["student_logits"].argmax(1) == batch.label).sum().item()
        self.seen += len(batch.label)

    def on_train_epoch_start(self, trainer, pl_module):
        self.wrong_teacher = self.masked = self.trained = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        teacher = outputs["teacher_logits"]
        self.wrong_teacher += (teacher.argmax(1) != batch.label).sum().item()
        self.masked += (
            (teacher >= teacher[torch.arange(len(teacher)), batch.label][:, None]).float().mean(1).sum().item()
        )
        self.trained += len(batch.label)

    def on_train_epoch_end(self, trainer, pl_module):
        self.history.append((float(trainer.callback_metrics["val/top1"]), self.right / self.seen, self.seen))


def test_logged_accuracies_and_statistics_are_exact_and_in_percent(tmp_path):
    watch = Watch()
    job = module()
    fitted = trainer(tmp_path, watch, max_epochs=3)
    fitted.fit(job, digits())

    assert [seen for *_, seen in watch.history] == [360] * 3
    for logged, top1, _ in watch.history:
        assert logged == pytest.approx(100 * top1)
    metrics = {name: float(value) for name, value in fitted.callback_metrics.items()}
    assert metrics["val/top1_best"] == pytest.approx(100 * max(top1 for _, top1, _ in watch.history))
    assert metrics["stats/teacher_wrong"] == pytest.approx(100 * watch.wrong_teacher / watch.trained, rel=1e-5)
    assert metrics["stats/masked_classes"] == pytest.approx(100 * watch.masked / watch.trained, rel=1e-5)
    assert metrics["train/loss"] == pytest.approx(
        sum(metrics[f"train/{term}"] for term in ("ce", "scd", "mcd")), rel=1e-5
    )
    for term in ("ce", "scd", "mcd"):
        assert metrics[f"stats/{term}_share"] == pytest.approx(100 * metrics[f"train/{term}"] / metrics["train/loss"])
    assert watch.trained == 1437


def test_only_losses_of_several_terms_have_shares():
    one, two = {"train/loss": torch.tensor(2.0), "train/a": torch.tensor(2.0)}, {"train/b/c": torch.tensor(-1.0)}
    assert term_shares({"val/ce": torch.tensor(1.0)}) == term_shares(one | {"stats/s": torch.tensor(1.0)}) == {}
    assert term_shares(one | two) == {"stats/a_share": 100.0, "stats/b/c_share": -50.0}
    assert term_shares(one | two | {"train/loss": torch.tensor(0.0)}) == {}


def test_warm_up_counts_epochs_from_one(tmp_path):
    seen = []

    class Epochs(KDLoss):
        def terms(self, step):
            seen.append(step.epoch)
            return super().terms(step)

    trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(module(Epochs()), digits())
    assert seen == [1, 2]


def test_one_cycle_gets_the_number_of_steps(tmp_path):
    schedule = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1)
    job = module(scheduler_interval="step")
    job.make_scheduler = schedule
    fitted = trainer(tmp_path)
    fitted.fit(job, digits())
    assert fitted.lr_scheduler_configs[0].scheduler.total_steps == fitted.global_step == 24


@pytest.mark.parametrize(
    ("options", "monitor", "looked_at"),
    [({}, None, "val/ce"), ({"mode": "max"}, None, "val/top1"), ({}, "train/loss", "train/loss")],
)
def test_reduce_on_plateau_monitors_validation_by_default(options, monitor, looked_at):
    job = module(scheduler_interval="step", scheduler_monitor=monitor)
    job.make_scheduler = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, **options)
    job._trainer = SimpleNamespace(check_val_every_n_epoch=3)
    schedule = job.configure_optimizers()["lr_scheduler"]
    every = 3 if looked_at.startswith("val/") else 1
    assert (schedule["monitor"], schedule["interval"], schedule["frequency"]) == (looked_at, "epoch", every)


def test_milestones_take_effect_after_their_epoch(tmp_path):
    rates = []

    class Rates(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    job = module()
    job.make_scheduler = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[2], gamma=0.1)
    trainer(tmp_path, Rates(), max_epochs=4, limit_train_batches=1).fit(job, digits())
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.005])


@pytest.mark.parametrize("rate", [0.05, torch.tensor(0.05)], ids=["number", "tensor"])  # schedules change it in place
def test_logged_rate_is_that_of_the_last_step(tmp_path, rate):
    job = module()
    job.make_optimizer = lambda parameters, **_: SGD(parameters, lr=rate)
    job.make_scheduler, job.scheduler_interval = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5), "step"
    run = trainer(tmp_path, max_epochs=2, limit_train_batches=3)
    run.fit(job, digits())
    assert float(run.callback_metrics["lr"]) == pytest.approx(0.05 * 0.5**5)


def test_training_repeats_bit_for_bit(tmp_path):
    states = []
    for _ in range(2):
        job = module()
        trainer(tmp_path).fit(job, digits(seed=3))
        states.append(job.student.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    def checkpoint():
        return ModelCheckpoint(dirpath=tmp_path, filename="last", enable_version_counter=False)

    whole = module()
    trainer(tmp_path, max_epochs=3).fit(whole, digits())

    trainer(tmp_path, checkpoint(), max_epochs=1).fit(module(), digits())
    assert (tmp_path / "last.ckpt").exists()
    torch.manual_seed(123)  # nothing may depend on the state of the global generators
    resumed = module()
    trainer(tmp_path, max_epochs=3).fit(resumed, digits(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)

    assert resumed.best_top1 == whole.best_top1
    for key, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[key]), key


def connected_module(loss):
    """A module with real networks and a loss on their features."""
    torch.manual_seed(5)
    teacher, student = create_model("wrn16_2", 10), create_model("wrn16_1", 10)
    loss.connect(student, teacher, (3, 8, 8), digits_label())
    return DistillationModule(student, loss, SGD, teacher=FrozenTeacher(teacher), num_classes=10)


@cache
def digits_label():
    data = digits()
    data.setup()
    return data.train_label


def learning_loss():
    """RLD combined with feature losses of each kind: connectors, fusion, memory."""
    parts = {"fitnet": FitNetLoss(weight=1.0), "reviewkd": ReviewKDLoss(), "crd": CRDLoss(negatives=64)}
    return CombinedLoss(rld=RLDLoss(), **parts)


@pytest.mark.parametrize("make_loss", [learning_loss, DHKDLoss])  # DHKD's second head has dropout
def test_learnable_parts_of_a_loss_are_optimised_saved_and_resumed(make_loss, tmp_path):
    options = {"limit_train_batches": 2, "limit_val_batches": 1}
    last = ModelCheckpoint(dirpath=tmp_path, filename="last", enable_version_counter=False)
    whole = connected_module(make_loss())
    before = {name: value.clone() for name, value in whole.loss.named_parameters()}
    trainer(tmp_path, StepSeed(0), **options).fit(whole, digits())
    assert before
    for name, value in whole.loss.named_parameters():
        assert not torch.equal(value, before[name]), name

    first = trainer(tmp_path, last, StepSeed(0), max_epochs=1, **options)
    first.fit(connected_module(make_loss()), digits())
    torch.manual_seed(123)
    resumed = connected_module(make_loss())
    trainer(tmp_path, StepSeed(0), **options).fit(
        resumed, digits(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert set(resumed.state_dict()) == set(whole.state_dict())
    for key, value in whole.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed.state_dict()[key]), key


def test_ddp_ignores_buffers_that_a_loss_synchronises():
    job = connected_module(learning_loss())
    ignored = set(job._ddp_params_and_buffers_to_ignore)
    assert ignored
    assert ignored <= {name for name, _ in job.named_buffers()}
    assert all(name.startswith("loss.losses.crd.") for name in ignored)


def test_the_strong_view_reaches_a_loss_that_needs_it(tmp_path):
    seen = []

    class Strong(KDLoss):
        needs_strong_view = True

        def terms(self, step):
            seen.append((step.student.logits, step.student_strong.logits, step.teacher_strong.logits))
            return super().terms(step)

    fitted = trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    fitted.fit(module(Strong()), digits(strong_view=True))
    ((weak, strong, teacher),) = seen
    assert strong.requires_grad
    assert not teacher.requires_grad
    assert not torch.equal(weak, strong)


def test_a_fused_teacher_is_refused_where_its_features_are_needed():
    teacher = FrozenTeacher(create_model("wrn16_2", 10), fuse=True)
    loss = FitNetLoss()
    with pytest.raises(ValueError, match=r"model\.teacher\.fuse=false"):
        loss.connect(create_model("wrn16_1", 10), teacher.model, (3, 8, 8), digits_label())
    loss.connect(create_model("wrn16_1", 10), create_model("wrn16_2", 10), (3, 8, 8), digits_label())
    with pytest.raises(ValueError, match=r"model\.teacher\.fuse=false"):
        DistillationModule(create_model("wrn16_1", 10), loss, SGD, teacher=teacher, num_classes=10)


def test_fewer_than_six_classes_have_no_top5():
    job = DistillationModule(network(), CELoss(), SGD, num_classes=5)
    assert job.top_k == (1,)


def test_a_mixture_has_the_weighted_losses_of_both_labels(tmp_path):
    """Cross-entropy uses the mixed label, KD counts once, and RLD is the mean over the labels."""
    data = digits(mixup=1.0)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    soft = batch.other.share * nn.functional.one_hot(batch.label, 10)
    soft = soft + (1 - batch.other.share) * nn.functional.one_hot(batch.other.label, 10)
    for loss in (CELoss(), KDLoss(), RLDLoss(warmup_epochs=1)):
        model = module(loss)
        model.trainer = trainer(tmp_path)
        model.trainer.strategy.optimizers = [SGD(model.student.parameters())]
        model.log = lambda *_, **__: None
        outputs = model.training_step(batch, 0)
        student, teacher = outputs["student_logits"], outputs.get("teacher_logits")
        if teacher is not None:  # it gets the same images as the student
            torch.testing.assert_close(student, model.student(batch.images))
            torch.testing.assert_close(teacher, model.teacher(batch.images)[0])
        terms = outputs["terms"]
        torch.testing.assert_close(terms["ce"], loss.ce_weight * nn.functional.cross_entropy(student, soft))
        first, second = (loss(student, teacher, label) for label in (batch.label, batch.other.label))
        for name in terms.keys() - {"ce"}:
            torch.testing.assert_close(
                terms[name], batch.other.share * first[name] + (1 - batch.other.share) * second[name]
            )
        if isinstance(loss, KDLoss):
            torch.testing.assert_close(terms["kd"], first["kd"])
        assert torch.equal(outputs["label"], batch.label if batch.other.share >= 0.5 else batch.other.label)
    assert not CRDLoss.takes_mixtures
    assert not CombinedLoss(kd=KDLoss(), crd=CRDLoss()).takes_mixtures
    assert CombinedLoss(kd=KDLoss(), rld=RLDLoss()).takes_mixtures


def test_other_loaders_train_like_a_data_module(tmp_path):
    data = DigitsDataModule(batch_size=256, augment=False, shuffle=False)
    data.setup()
    splits = [DataLoader(TensorDataset(*merged(data)), batch_size=256) for merged in (trained_on, for_tests)]

    def values(*given):
        watching = [TeacherMonitor(), Divergence(tmp_path), Throughput()]
        fitted = trainer(tmp_path, *watching, max_epochs=1)
        fitted.fit(module(), *given)
        return {name: value for name, value in fitted.callback_metrics.items() if "images" not in name}

    theirs, ours = values(*splits), values(data)
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, msg=name)


def trained_on(data):
    return [torch.cat(parts) for parts in zip(*(batch[:2] for batch in data.train_dataloader()), strict=True)]


def for_tests(data):
    return [torch.cat(parts) for parts in zip(*(batch[:2] for batch in data.val_dataloader()), strict=True)]


class Gradients(Callback):
    """Records the gradient of each optimizer step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen.append(torch.cat([p.grad.flatten().clone() for p in module.student.parameters()]))


def test_accumulated_gradients_equal_one_batchs_also_in_a_smaller_last_step(tmp_path):
    def gradients(batch_size, every):
        torch.manual_seed(0)
        linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
        job = DistillationModule(linear, CELoss(), partial(torch.optim.SGD, lr=0.0), num_classes=10)
        callback = Gradients()
        fitted = trainer(tmp_path, callback, max_epochs=1, accumulate_grad_batches=every)
        fitted.fit(job, DigitsDataModule(batch_size=batch_size, augment=False))
        return callback.seen, fitted.callback_metrics["train/loss"]

    (whole, loss), (parts, same) = gradients(64, 1), gradients(16, 4)  # the last step has 29 images: 16 and 13
    assert len(whole) == len(parts) == 23
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(same, loss)


@pytest.mark.parametrize(("batch", "expected"), [(0, 1.0), (3, 1.0), (4, 4 * 16 / 29), (5, 4 * 13 / 29)])
def test_the_accumulation_factor(batch, expected):
    steps = [slice(0, size) for size in (16, 16, 16, 16, 16, 13)]
    loader = SimpleNamespace(sampler=SimpleNamespace(steps=steps))
    trainer = SimpleNamespace(accumulate_grad_batches=4, num_training_batches=6, train_dataloader=loader)
    assert accumulation_factor(trainer, batch) == expected
