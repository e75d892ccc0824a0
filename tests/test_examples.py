"""The examples run, train, and compute what they claim."""

import runpy
from pathlib import Path

import pytest
import torch

from rld_lightning import CELoss, FrozenTeacher, RLDLoss, create_model, rld_loss

FOLDER = Path(__file__).parents[1] / "examples"
NEEDS = {"timm_task.py": "timm", "hf_trainer.py": "transformers"}
TIMM = "1.0.31"  # the example uses its task classes
SLOW = {"hf_trainer.py", "lightning_script.py", "own_lightning_module.py"}


def load(name, run_name="example"):
    pytest.importorskip(NEEDS.get(name, "torch"), minversion=TIMM if name == "timm_task.py" else None)
    return runpy.run_path(str(FOLDER / name), run_name=run_name)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.name, marks=pytest.mark.slow if path.name in SLOW else ())
        for path in sorted(FOLDER.glob("*.py"))
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_every_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope = load(name, "__main__")
    if "top1" in scope:  # for ten classes
        assert scope["top1"] > 80


def test_tokens_are_rows_and_padding_counts_for_nothing():
    """Compares with a loop over the tokens that are not padding."""
    example = load("tokens_and_maps.py")
    torch.manual_seed(0)
    student, teacher, label = torch.randn(2, 5, 7), torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    label[1, 2:] = example["PADDING"]
    terms = example["token_loss"](student, teacher, label)
    places = [(b, token) for b in range(2) for token in range(5) if label[b, token] >= 0]
    assert len(places) == 7
    for name in ("scd", "mcd"):
        each = [rld_loss(student[p][None], teacher[p][None], label[p][None])[name] for p in places]
        assert terms[name].item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)
    by_axis = RLDLoss()(student.transpose(1, 2), teacher.transpose(1, 2), label)
    assert {name: term.item() for name, term in by_axis.items()} == pytest.approx(
        {name: term.item() for name, term in terms.items()}
    )


def test_pixels_are_rows_too():
    example = load("tokens_and_maps.py")
    torch.manual_seed(0)
    student, teacher, label = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.randint(4, (2, 3, 3))
    label[0, 0] = example["PADDING"]
    terms, by_pixel = (example[name](student, teacher, label) for name in ("map_loss", "loss_by_pixel"))
    assert by_pixel.shape == (2, 3, 3)
    assert not by_pixel[0, 0].any()
    assert (terms["scd"] + terms["mcd"]).item() == pytest.approx((by_pixel.sum() / 15).item(), rel=1e-5)


def test_timms_task_returns_the_losses_terms_and_trains_only_the_student():
    timm = pytest.importorskip("timm", minversion=TIMM)
    example = load("timm_task.py")
    torch.manual_seed(0)
    small = {"num_classes": 10, "img_size": 16, "patch_size": 8, "depth": 1, "num_heads": 2, "embed_dim": 16}
    teacher, student = (timm.create_model("vit_tiny_patch16_224", **small) for _ in range(2))
    task = example["RLDTask"](student, teacher, verbose=False).train()
    images, label = torch.randn(4, 3, 16, 16), torch.arange(4)
    result = task(images, label)
    expected = RLDLoss()(student(images), teacher(images), label)
    assert result["loss"].item() == pytest.approx(sum(expected.values()).item(), rel=1e-5)
    result["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.slow
def test_hugging_faces_trainer_uses_the_losses_terms():
    example = load("hf_trainer.py")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    teacher, student = example["language_model"](8), example["language_model"](8)
    arguments = transformers.TrainingArguments("unused", report_to="none", use_cpu=True)
    trainer = example["RLDTrainer"](teacher=teacher, model=student, args=arguments)
    tokens = torch.randint(64, (2, 6))
    loss, outputs = trainer.compute_loss(student.eval(), {"input_ids": tokens, "labels": tokens}, return_outputs=True)
    theirs = teacher.eval()(input_ids=tokens).logits
    rows = [logits[:, :-1].reshape(-1, 64) for logits in (outputs.logits, theirs)]
    assert loss.item() == pytest.approx(sum(RLDLoss(beta=2.0)(*rows, tokens[:, 1:].reshape(-1)).values()).item())


def test_a_frozen_teacher_in_a_custom_module_is_not_trained():
    module = load("own_lightning_module.py")["MyModule"](create_model("resnet8", 10), create_model("wrn16_1", 10))
    assert isinstance(module.train().teacher, FrozenTeacher)
    assert not module.teacher.training
    assert not isinstance(module.criterion, CELoss)
    optimizer = module.configure_optimizers()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.student.parameters()))
