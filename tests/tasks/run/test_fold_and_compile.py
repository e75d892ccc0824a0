"""Folding and compiling depend on the job only, and change results by rounding only."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from helpers.plans import make_plan
from torch import nn

from rld_lightning import CELoss, DistillationModule, FrozenTeacher, KDLoss, RLDLoss, create_model
from rld_lightning.data import Batch
from rld_lightning.losses import CTKDLoss, WTTMLoss
from rld_lightning.losses.features import ATLoss
from rld_lightning.models.compiled import CompiledCall, compile_error, compile_for
from rld_lightning.tasks.run import fold_and_compile as speed
from rld_lightning.tasks.run.fold_and_compile import compile_steps, fold_teacher, images_to_train

CPU = torch.device("cpu")
DATA = SimpleNamespace(image_shape=(3, 32, 32), train_size=50_000, batch_size=64, num_classes=9)


def trainer_of(epochs=240, device="cpu", **options):
    usual = {"max_epochs": epochs, "max_steps": -1, "limit_train_batches": 1.0, "accumulate_grad_batches": 1}
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(strategy=strategy, world_size=1, **usual | options)


def module_of(loss=None, teacher=True, **options):
    frozen = FrozenTeacher(create_model("resnet8"), **options) if teacher else None
    return DistillationModule(create_model("resnet8"), loss or KDLoss(), torch.optim.SGD, teacher=frozen, num_classes=9)


@pytest.mark.parametrize(
    ("trainer", "images"),
    [
        (trainer_of(2), 100_000),
        (trainer_of(2, limit_train_batches=0.1), 10_000),
        (trainer_of(2, limit_train_batches=3), 384),
        (trainer_of(2, max_steps=10, accumulate_grad_batches=4), 2560),
        (trainer_of(-1), float("inf")),
    ],
)
def test_images_are_counted_over_the_whole_run(trainer, images):
    assert images_to_train(DATA, trainer) == images


@pytest.mark.parametrize(
    ("trainer", "compiled"),
    [
        (trainer_of(240), True),
        (trainer_of(10), False),
        (trainer_of(240, "cuda"), True),
        (trainer_of(100, "cuda"), False),
        (trainer_of(240, "mps"), False),
    ],
)
def test_auto_compiles_student_and_loss_in_long_runs(trainer, compiled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "compile_error", lambda device: "")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    module = module_of()
    compile_steps(module, make_plan(tmp_path, compile="auto"), DATA, trainer)
    assert (module.compiled is not None) == compiled
    assert (module.compiled_scores is not None) == compiled
    assert module.teacher.model._compiled_call_impl is None
    assert ("student, loss in training steps" in capsys.readouterr().out) == compiled


@pytest.mark.parametrize(
    ("loss", "device", "classes", "compiled"),
    [
        (KDLoss(), "cpu", 100, True),
        (KDLoss(), "cpu", 21_841, False),
        (KDLoss(), "cuda", 21_841, True),
        (WTTMLoss(), "cuda", 100, True),
        (CTKDLoss(), "cuda", 100, False),
    ],
    ids=["kd", "many classes", "many classes on a GPU", "wttm", "ctkd"],
)
def test_only_losses_of_few_logits_and_no_parameters_are_compiled(
    loss, device, classes, compiled, tmp_path, monkeypatch
):
    monkeypatch.setattr(speed, "compile_error", lambda device: "")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    module, data = module_of(loss), SimpleNamespace(**vars(DATA) | {"num_classes": classes})
    compile_steps(module, make_plan(tmp_path, compile=True), data, trainer_of(1, device))
    assert (module.compiled_scores is not None) == compiled


def test_without_a_compiler_auto_continues_with_one_line_and_true_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "compile_error", lambda device: "no C++ compiler")
    module = module_of()
    compile_steps(module, make_plan(tmp_path, compile="auto"), DATA, trainer_of())
    assert module.compiled is None
    assert "off: nothing can be compiled here (no C++ compiler)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"model\.compile=true: .* \(no C\+\+ compiler\); set model\.compile=false"):
        compile_steps(module, make_plan(tmp_path, compile=True), DATA, trainer_of())


def test_networks_with_tapped_features_are_neither_compiled_nor_folded(tmp_path, capsys):
    module = module_of(ATLoss(student_taps=["layer1"], teacher_taps=["layer1"]))
    fold_teacher(module.teacher, module.loss, DATA)
    compile_steps(module, make_plan(tmp_path, compile=True), DATA, trainer_of())
    assert module.compiled is None
    assert not module.teacher.fused
    assert not capsys.readouterr().out


def test_teacher_without_taps_is_folded(capsys):
    module = module_of()
    model, images = module.teacher.model, torch.randn(2, 3, 32, 32)
    expected, _ = module.teacher(images)
    fold_teacher(module.teacher, module.loss, DATA)
    assert module.teacher.fused
    assert module.teacher.model is not model
    torch.testing.assert_close(module.teacher(images)[0], expected, rtol=1e-4, atol=1e-5)
    assert "9 batch norms folded" in capsys.readouterr().out


class TwoWays(nn.Module):
    """Tracing follows the way for what is no tensor."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        x = self.fc(self.norm(self.conv(x)).mean((2, 3)))
        return x if isinstance(x, torch.Tensor) else -x


def test_teacher_whose_output_would_change_is_not_folded(capsys):
    teacher = FrozenTeacher(TwoWays())
    fold_teacher(teacher, CELoss(), DATA)
    assert not teacher.fused
    assert isinstance(teacher.model, TwoWays)
    assert not capsys.readouterr().out


@pytest.fixture
def backend(monkeypatch):
    """Compiles without a compiler, and counts the graphs."""
    torch.compiler.reset()
    graphs, original = [], torch.compile

    def eager(graph, inputs):
        graphs.append(inputs)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda *args, **options: original(*args, backend=eager, **options))
    return graphs


def test_batches_of_another_size_compile_nothing(backend):
    student = create_model("resnet8").train()
    forward, images = CompiledCall(student, 4, "Student", CPU), torch.randn(4, 3, 32, 32)
    for size in (4, 3, 4, 2):
        assert forward(images[:size]).shape == (size, 100)
    assert len(backend) == 1
    assert student._compiled_call_impl is None
    assert list(student.state_dict()) == list(create_model("resnet8").state_dict())


@pytest.mark.parametrize("loss", [RLDLoss(warmup_epochs=2), CELoss()], ids=["rld", "ce"])
def test_scores_are_compiled_for_whole_batches_after_the_warmup(loss, backend):
    module, generator = module_of(loss, teacher=loss.needs_teacher), torch.Generator().manual_seed(0)
    module.compiled_scores = CompiledCall(module.scores_of_logits, 4, "RLDLoss", CPU, of_logits=True)
    compiled = []
    for epoch, size in [(1, 4), (2, 4), (2, 3), (3, 4)]:
        images = torch.randn(size, 3, 32, 32, generator=generator)
        batch = Batch(images, torch.arange(size), torch.arange(size))
        values, again = module._step_values(batch, epoch), uncompiled(module)._step_values(batch, epoch)
        assert values.keys() == again.keys()
        for name, value in again.items():
            torch.testing.assert_close(values[name], value, rtol=1e-4, atol=1e-6, msg=name)
        compiled.append(len(backend))
    first = 1 if loss.needs_teacher else 0  # cross-entropy has no warm-up
    assert [bool(count) for count in compiled] == [not first, True, True, True]


def uncompiled(module):
    twin = deepcopy(module)
    twin.compiled_scores = None
    return twin


def test_compile_error_falls_back_to_eager(monkeypatch, capsys):
    torch.compiler.reset()
    original = torch.compile

    def fail(graph, inputs):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(torch, "compile", lambda *args, **options: original(*args, backend=fail, **options))
    student = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    forward, images = CompiledCall(student, 4, "Student", CPU), torch.randn(4, 3, 2, 2)
    for _ in range(2):
        torch.testing.assert_close(forward(images), student(images))
    assert capsys.readouterr().out.count("Student cannot be compiled") == 1


@pytest.mark.parametrize(
    ("device", "of_logits", "merged", "recomputed"),
    [("cpu", True, False, False), ("cuda", False, True, False), ("cuda", True, True, True)],
)
def test_on_a_gpu_kernels_are_merged_and_a_loss_is_recomputed(monkeypatch, device, of_logits, merged, recomputed):
    options = {}

    def compile_(function, **chosen):
        options.update(chosen)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    partitioning = torch._functorch.config
    function = compile_for(torch.device(device), lambda: partitioning.aggressive_recomputation, of_logits=of_logits)
    assert [function(), function()] == [recomputed] * 2
    assert not partitioning.aggressive_recomputation
    assert options == {"dynamic": False} | ({"options": {"combo_kernels": True}} if merged else {})


@pytest.mark.slow
def test_two_views_of_a_step_have_their_gradients(monkeypatch):
    torch.compiler.reset()
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: original(*args, backend="aot_eager", **options))
    student = create_model("resnet8").double().train()
    twin, views = deepcopy(student), torch.randn(2, 4, 3, 32, 32).double()
    for forward, network in ((CompiledCall(student, 4, "Student", CPU), student), (twin, twin)):
        (forward(views[0]).square().mean() + forward(views[1]).abs().mean()).backward()
        assert network.conv1.weight.grad is not None
    for ours, theirs in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(student.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_cached_programs_of_other_users_are_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("os.getuid", lambda: -1)
    assert f"{tmp_path}, belongs to another user" in compile_error(CPU)
