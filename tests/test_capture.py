"""Captured steps give the same weights, logs and checkpoints as uncaptured ones."""

import warnings
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.training import quiet_trainer
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rld_lightning import CELoss, DistillationModule, DKDLoss, FrozenTeacher, KDLoss, RLDLoss, create_model
from rld_lightning.callbacks import Divergence, ExactResume, GradientNorm, StepSeed, TeacherMonitor, Throughput
from rld_lightning.capture import CapturedStep, _Recording, detect_synchronizations, why_not_captured
from rld_lightning.data import DigitsDataModule
from rld_lightning.data.base import Batch
from rld_lightning.losses import CombinedLoss
from rld_lightning.losses.features import FitNetLoss
from rld_lightning.losses.graph import why_no_graph
from rld_lightning.models.compiled import CompiledCall
from rld_lightning.optimizer_step import fused

CPU = torch.device("cpu")
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
STEP_LR = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1)


def network(width=4, seed=0):
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(width * 36, 10))


def module(loss=None, capture=True, **options):
    options = {"scheduler": STEP_LR, "scheduler_interval": "step"} | options
    loss = RLDLoss(warmup_epochs=3) if loss is None else loss
    teacher = FrozenTeacher(network(8, seed=1), channels_last=True)
    return DistillationModule(network(), loss, SGD, teacher=teacher, num_classes=10, capture=capture, **options)


class Losses(Callback):
    """Records each step's loss, terms and sum of logits."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        values = [outputs["loss"], *outputs["terms"].values(), outputs["student_logits"].double().sum()]
        self.seen.append([float(value) for value in values])


def fit(job, folder, *, accelerator="cpu", resume=None, callbacks=(), **options):
    watch = Losses()
    watchers = [StepSeed(0), GradientNorm(), TeacherMonitor(), watch, *callbacks]
    usual = {"max_epochs": 5, "accelerator": accelerator, "limit_val_batches": 1, "default_root_dir": folder}
    trainer = quiet_trainer(*watchers, **usual | options)
    # Twelve batches, the last one smaller.
    trainer.fit(job, DigitsDataModule(batch_size=128), ckpt_path=resume)
    return trainer, watch.seen


def assert_same(one, other, job, twin):
    (trainer, seen), (with_graph, seen_too) = one, other
    assert seen == seen_too
    for (name, value), again in zip(job.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, again), name
    logged, again = trainer.callback_metrics, with_graph.callback_metrics
    assert {name: float(value) for name, value in logged.items()} == {k: float(v) for k, v in again.items()}


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (partial(RLDLoss, warmup_epochs=2), {"gradient_clip_val": 0.5, "max_epochs": 4}),
        (CELoss, {"max_epochs": 1}),
        (partial(DKDLoss, warmup_epochs=2), {"precision": "bf16-mixed", "max_epochs": 1}),
        (lambda: CombinedLoss(rld=RLDLoss(warmup_epochs=2), kd=KDLoss()), {"max_epochs": 1}),
    ],
    ids=["rld clipped", "ce", "dkd bfloat16", "rld and kd"],
)
def test_a_captured_run_equals_an_uncaptured_one(tmp_path, loss, options):
    job, twin = module(loss(), capture=False), module(loss())
    plain, captured = fit(job, tmp_path, **options), fit(twin, tmp_path, **options)
    assert_same(plain, captured, job, twin)


@pytest.mark.slow
def test_a_compiled_step_is_captured(tmp_path):
    jobs = [module(RLDLoss(warmup_epochs=2), capture=capture) for capture in (False, True)]
    for job in jobs:
        job.compiled = CompiledCall(job.student, 128, "student", CPU)
        job.compiled_scores = CompiledCall(job.scores_of_logits, 128, "loss", CPU, of_logits=True)
    plain, captured = (fit(job, tmp_path, max_epochs=3) for job in jobs)
    assert all(job.compiled.compiled is not None and job.compiled_scores.compiled is not None for job in jobs)
    assert_same(plain, captured, *jobs)


@pytest.mark.slow
def test_a_compiled_loss_differs_by_rounding(tmp_path):
    job, twin = (module(RLDLoss(warmup_epochs=2)) for _ in range(2))
    twin.compiled_scores = CompiledCall(twin.scores_of_logits, 128, "loss", CPU, of_logits=True)
    (_, plain), (_, compiled) = (fit(each, tmp_path, max_epochs=3) for each in (job, twin))
    assert plain[:12] == compiled[:12]  # the first epoch's steps
    assert plain != compiled
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(plain), rtol=1e-3, atol=1e-2)


def test_the_step_is_captured_again_if_its_epoch_or_shapes_change(monkeypatch, tmp_path):
    recorded = []
    monkeypatch.setattr(CapturedStep, "_record", spy(CapturedStep._record, recorded))
    fit(module(RLDLoss(warmup_epochs=2)), tmp_path, max_epochs=5)
    # In each epoch with other weights; and for the last batch's shape, after three equal ones.
    assert [(epoch, len(images)) for _, epoch, (images, *_) in recorded] == [(1, 128), (2, 128), (2, 29)]


def test_callbacks_measurements_are_captured_with_the_step(monkeypatch, tmp_path):
    measured = []
    monkeypatch.setattr(TeacherMonitor, "measure_step", spy(TeacherMonitor.measure_step, measured))
    job = module(RLDLoss(warmup_epochs=1))
    fit(job, tmp_path, max_epochs=2, callbacks=[Divergence(tmp_path)])
    assert job.watchers == []
    assert job.measurements == {}
    # Called within the captured function, and not again by the hooks of the 24 steps.
    uncaptured = module(RLDLoss(warmup_epochs=1), capture=False)
    calls = len(measured)
    monkeypatch.setattr(
        DistillationModule, "_captured_values", spy(DistillationModule._captured_values, captured := [])
    )
    fit(uncaptured, tmp_path, max_epochs=2, callbacks=[Divergence(tmp_path)])
    assert (calls, len(measured) - calls, captured) == (24, 24, [])


def spy(method, calls):
    def called(self, *arguments):
        calls.append(arguments)
        return method(self, *arguments)

    return called


def test_a_captured_run_resumes_from_any_step(tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 18:
                trainer.save_checkpoint(tmp_path / "between.ckpt")

    options = {"max_epochs": 3, "limit_val_batches": 0}
    whole, rest = (module(scheduler=None) for _ in range(2))
    _, everything = fit(whole, tmp_path, callbacks=[ExactResume(), Save()], **options)
    # The resumed run does its uncaptured steps within the epoch.
    _, after = fit(rest, tmp_path, resume=tmp_path / "between.ckpt", callbacks=[ExactResume()], **options)
    assert after == everything[18:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))


def test_uncapturable_runs_print_the_reason_and_run_uncaptured(tmp_path, capsys):
    job, twin = module(capture=False), module()
    options = {"accumulate_grad_batches": 2, "max_epochs": 1}
    assert_same(fit(job, tmp_path, **options), fit(twin, tmp_path, **options), job, twin)
    assert "gradients are accumulated" in capsys.readouterr().out

    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert why_not_captured(trainer, module().student) == why_no_graph(RLDLoss()) == ""
    for loss in (FitNetLoss(), CombinedLoss(rld=RLDLoss(), fitnet=FitNetLoss())):
        assert "uses more than the logits" in why_no_graph(loss)


def test_an_optimizer_is_fused_on_a_gpu_if_possible():
    def on(device="cuda", clip=None, scaler=None):
        plugin = SimpleNamespace(scaler=scaler)
        return SimpleNamespace(precision_plugin=plugin, gradient_clip_val=clip), torch.device(device)

    assert fused(SGD, *on()) == fused(torch.optim.AdamW, *on(clip=0)) == {"fused": True}
    assert fused(SGD, *on("cpu")) == fused(SGD, *on(clip=1.0)) == fused(SGD, *on(scaler=object())) == {}
    assert fused(partial(SGD, foreach=True), *on()) == fused(torch.optim.Rprop, *on()) == {}


def test_a_step_that_cannot_be_captured_is_reported_once_and_at_once(tmp_path, monkeypatch, capsys):
    def record(self, recording, constant, inputs):
        self.failed = "loss.py:7 waits for the GPU"

    class Silence(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step in (3, 4):
                printed.append(capsys.readouterr().out)

    printed = []
    monkeypatch.setattr(CapturedStep, "_record", record)
    fit(module(RLDLoss(warmup_epochs=1)), tmp_path, max_epochs=2, callbacks=[Silence()])
    printed.append(capsys.readouterr().out)
    assert ["cannot be captured: loss.py:7 waits for the GPU" in lines for lines in printed] == [False, True, False]


def test_the_cause_of_a_failed_capture_is_kept(monkeypatch):
    @contextmanager
    def graph(*_, **__):
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def function(constant, x):
        if constant:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return {}

    for name, fake in {"graph": graph, "CUDAGraph": object, "stream": lambda _: nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr("rld_lightning.capture.discard_failed_capture", lambda device: None)
    step = CapturedStep(function, [], [])
    step._stream = SimpleNamespace(device=None)
    step._record(_Recording(), True, (torch.zeros(1),))
    assert step.failed == "operation not permitted when stream is capturing"


class Synchronizations(TorchDispatchMode):
    """Records the operations that synchronise with a GPU."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indexed = name in ("index", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in self.WAITS or indexed:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("capture", [False, True])
def test_no_step_synchronises_with_the_device(tmp_path, capture, monkeypatch):
    synchronizations = Synchronizations()

    class RecordStep(Callback):
        """Records from the start of one step to that of the next, with logs, watchers and the next batch."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 6:
                synchronizations.__enter__()
            elif batch_idx == 7:
                synchronizations.__exit__(None, None, None)

    job = module(capture=capture)
    watchers = [Divergence(tmp_path), Throughput(), RecordStep()]
    options = {"max_epochs": 1, "gradient_clip_val": 1.0, "limit_val_batches": 0}
    monkeypatch.setattr(Losses, "on_train_batch_end", lambda *_: None)
    for name in ("base", "rows"):
        monkeypatch.setattr(f"rld_lightning.losses.{name}.check_labels", lambda *_: None)  # synchronises on a CPU only
    monkeypatch.setattr("rld_lightning.losses.rows._none_if_all", lambda valid: valid)  # likewise
    fit(job, tmp_path, callbacks=watchers, **options)
    assert synchronizations.names == []


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_on_a_gpu_captured_steps_equal_uncaptured_ones(tmp_path, precision):
    options = {"accelerator": "gpu", "devices": 1, "precision": precision, "max_epochs": 3, "gradient_clip_val": 1.0}
    torch.backends.cudnn.deterministic = True
    try:
        runs = {}
        for capture in (False, True):
            job = module(RLDLoss(warmup_epochs=2), capture=capture)
            job.student = create_model("resnet8", 10).to(memory_format=torch.channels_last)
            job.student.load_state_dict(resnet8())
            runs[capture] = job, fit(job, tmp_path, **options)
            assert not (capture and job.captured)  # freed
    finally:
        torch.backends.cudnn.deterministic = False
    (plain, (_, seen)), (captured, (_, seen_too)) = runs[False], runs[True]
    torch.testing.assert_close(torch.tensor(seen_too), torch.tensor(seen), rtol=2e-2, atol=1e-3)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(captured.state_dict()[name], value, rtol=5e-2, atol=5e-3)


def resnet8():
    torch.manual_seed(2)
    return create_model("resnet8", 10).state_dict()


@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [
        pytest.param("cpu", torch.float32, 1e-4, marks=pytest.mark.slow),
        pytest.param("cuda", torch.bfloat16, 0.2, marks=pytest.mark.cuda),
    ],
)
def test_a_compiled_step_has_the_gradients_of_the_uncompiled_one(device, dtype, tolerance):
    torch.compiler.reset()
    device, generator = torch.device(device), torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 8, 8, generator=generator).to(device).contiguous(memory_format=torch.channels_last)
    label = torch.randint(10, (64,), generator=generator).to(device)
    results = []
    for compiled in (False, True):
        job = module(RLDLoss(warmup_epochs=1))
        job.student = create_model("resnet8", 10).to(device, memory_format=torch.channels_last)
        job.student.load_state_dict(resnet8())
        job.teacher.place(device, 1)
        if compiled:
            job.compiled = CompiledCall(job.student, 64, "student", device)
            job.compiled_scores = CompiledCall(job.scores_of_logits, 64, "loss", device, of_logits=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            values = job._step_values(Batch(images, label, label), epoch=1)
        values["train/loss"].backward()
        parts = {name: p.grad for name, p in job.student.named_parameters()} | dict(job.student.named_buffers())
        results.append({name: value.detach() for name, value in (values | parts).items()})
    assert job.compiled.compiled is not None
    assert job.compiled_scores.compiled is not None
    for name, expected in results[0].items():
        error = (results[1][name].double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)
        assert error < tolerance, name


@pytest.mark.cuda
def test_on_a_gpu_a_replay_equals_the_function():
    device = torch.device("cuda")
    layer = nn.Linear(8, 4, device=device)
    calls = []

    def function(factor, x):
        calls.append(factor)
        loss = factor * layer(x).square().sum()
        loss.backward()
        return {"loss": loss}

    step = CapturedStep(function, layer.parameters(), layer.parameters())
    for number in range(10):
        x = torch.randn(5, 8, device=device)
        loss = step(2.0, x)["loss"].clone()
        gradient = layer.weight.grad.clone()
        layer.weight.grad = None
        weight = layer.weight.detach().clone().requires_grad_()  # without an autograd node of another stream
        expected = 2 * nn.functional.linear(x, weight, layer.bias.detach()).square().sum()
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradient, *torch.autograd.grad(expected, weight))
        with torch.no_grad():
            layer.weight -= 0.01 * gradient
        assert len(calls) == min(number + 1, 4)  # three uncaptured steps and the capture
    assert not step.failed


@pytest.mark.cuda
@pytest.mark.parametrize("wait", [lambda loss: loss.item(), lambda loss: torch.cuda.synchronize()])
def test_on_a_gpu_an_uncapturable_function_runs_uncaptured(wait):
    layer = nn.Linear(8, 4, device="cuda")

    def function(factor, x):
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.dropout(layer(x), 0.0).float().sum()
        wait(loss)
        loss.backward()
        return {"loss": loss}

    step = CapturedStep(function, layer.parameters(), layer.parameters())
    for _ in range(6):
        x = torch.randn(5, 8, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            expected = layer(x).float().sum().detach()
        torch.testing.assert_close(step(1, x)["loss"], expected)
        torch.rand(4, device="cuda")  # fails if a capture still holds the generator
    assert step.failed


@pytest.mark.filterwarnings("default")
def test_synchronising_lines_are_named_and_other_warnings_are_shown(monkeypatch):
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        with detect_synchronizations() as places:
            warnings.warn("called a synchronizing CUDA operation (...)", UserWarning, stacklevel=1)
            warnings.warn("something else", UserWarning, stacklevel=1)
        return places

    with pytest.warns(UserWarning, match="something else") as told:
        places = step()
    assert [place.partition(":")[0] for place in places] == ["test_capture.py"]
    assert len(told) == 1
    assert modes == [0, "warn", 0]
