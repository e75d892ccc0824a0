"""scripts/fit.py on the digits, as a user runs it, then scripts/eval.py on its results."""

import json
import re
import runpy
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.scripts import SCRIPTS, run_script
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from rld_lightning import create_model
from rld_lightning.data import DigitsDataModule
from rld_lightning.reporting.curves import plot_curves
from rld_lightning.runs.finished import find_runs

PAIR = ("data=digits", "model=pair", "model.teacher.name=resnet14", "model.student.name=resnet8", "recipe=quick")


def run(script, *arguments, folder):
    paths = (f"paths.runs={folder / 'runs'}", f"paths.teachers={folder / 'teachers'}", "trainer=cpu")
    return run_script(script, *arguments, *paths, folder=folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and output of a run that first trained its teacher; only slow tests start processes."""
    folder = tmp_path_factory.mktemp("fit")
    options = (*PAIR, "model.teacher.weights=fit", "recipe.epochs=2", f"hydra.run.dir={folder / 'run'}")
    paths = (f"paths.runs={folder / 'runs'}", f"paths.teachers={folder / 'teachers'}", "trainer=cpu")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(SCRIPTS / "fit.py"), *options, *paths])
        patch.setattr("rld_lightning.reporting.curves.plot_curves", plot_curves)  # conftest replaces it
        runpy.run_path(str(SCRIPTS / "fit.py"), run_name="__main__")
    return folder, printed.getvalue()


def test_the_output_has_the_config_a_line_per_part_and_the_results(finished):
    _, output = finished
    for expected in (
        "config  data=digits model=pair loss=rld recipe=quick ",
        " recipe.epochs=2",
        "data  digits: 10 classes, 3x8x8, 1,437 train and 360 test images, validated on the test split",
        "training it first, with cross-entropy",
        "teacher  resnet14, 0.18 M parameters, 1.7 M MACs",
        "student  resnet8, 0.08 M parameters, 0.8 M MACs",
        "loss  RLDLoss(warmup_epochs=1)",
        "SGD, learning rate 0.05, batch 64 = 1 x 64 on cpu",
        "images/s",
        "top-1, last epoch",
        "top-1, best epoch",
        "agreement with teacher",
    ):
        assert expected in output
    assert "Traceback" not in output


def test_the_run_directory_is_complete(finished):
    folder, _ = finished
    files = {path.name for path in (folder / "run").iterdir()}
    expected = (
        "config.yaml environment.json metrics.csv summary.json student.safetensors curves.png last.ckpt best.ckpt"
    )
    assert set(expected.split()) <= files
    assert (folder / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder / "teachers" / "digits" / "resnet14.safetensors") in (folder / "run" / "config.yaml").read_text()


def test_summary_metrics_and_weights_agree(finished):
    folder, _ = finished
    summary = json.loads((folder / "run" / "summary.json").read_text())
    metrics = pd.read_csv(folder / "run" / "metrics.csv")
    assert metrics["val/top1"].dropna().tolist()[-1] == pytest.approx(summary["top1"])
    assert metrics["val/top1"].max() == pytest.approx(summary["top1_best"])
    assert metrics["train/images_per_s"].median() == pytest.approx(summary["images_per_s"])
    assert (summary["split"], summary["images"], summary["val_fraction"]) == ("test", 360, 0.0)
    with safe_open(folder / "run" / "student.safetensors", "pt") as file:
        facts = file.metadata()
    assert (facts["name"], facts["num_classes"], facts["dataset"]) == ("resnet8", "10", "digits")
    assert (facts["data_seed"], facts["val_fraction"]) == ("0", "0.0")
    assert float(facts["top1"]) == pytest.approx(summary["top1"])


def test_a_checkpoint_contains_only_the_student_and_loads_safely(finished):
    folder, _ = finished
    checkpoint = torch.load(folder / "run" / "last.ckpt", weights_only=True)
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"student"}
    facts = {"num_classes": 10, "student": "resnet8", "dataset": "digits", "data_seed": 0, "val_fraction": 0.0}
    facts |= {"mean": list(DigitsDataModule.mean), "std": list(DigitsDataModule.std)}
    assert checkpoint["hyper_parameters"] == facts


@pytest.mark.slow
def test_eval_of_export_and_checkpoint_equals_a_plain_loop(finished):
    folder, _ = finished
    data = DigitsDataModule()
    data.setup()
    model = create_model("resnet8", 10).eval()
    model.load_state_dict(load_file(folder / "run" / "student.safetensors"))
    with torch.no_grad():
        batches = [(model(batch.images), batch.label) for batch in data.test_dataloader()]
    logits, label = (torch.cat(parts) for parts in zip(*batches, strict=True))
    nll = torch.nn.functional.cross_entropy(logits, label).item()
    confidence, predicted = logits.softmax(1).max(1)
    right = (predicted == label).float()
    bins = (confidence * 15).ceil().clamp(1, 15)
    ece = sum(
        (right[bins == b].mean() - confidence[bins == b].mean()).abs().item() * (bins == b).float().mean().item()
        for b in bins.unique()
    )
    for weights in ("student.safetensors", "last.ckpt"):
        target = folder / f"eval_{weights}"
        options = ("data=digits", f"weights={folder / 'run' / weights}", f"hydra.run.dir={target}")
        output = run("eval.py", *options, folder=folder).stdout
        found = json.loads((target / "evaluation.json").read_text())
        assert found["images"] == 360
        assert found["top1"] == pytest.approx(100 * right.mean().item(), abs=1e-4)
        assert found["nll"] == pytest.approx(nll, rel=1e-4)
        assert found["ece"] == pytest.approx(100 * ece, abs=1e-2)
        per_class = pd.read_csv(target / "per_class.csv")
        assert per_class["images"].tolist() == [int((label == c).sum()) for c in per_class["class"]]
        assert "top-1 %" in output
        assert "Classes" in output


@pytest.mark.slow
def test_the_same_command_gives_the_same_student_bit_for_bit(finished):
    folder, _ = finished
    target = folder / "again"
    options = (*PAIR, "model.teacher.weights=auto", "recipe.epochs=2", f"hydra.run.dir={target}")
    output = run("fit.py", *options, folder=folder).stdout
    assert "training it first" not in output
    assert "fit)" in output  # the stored teacher's origin
    first, again = (load_file(folder / name / "student.safetensors") for name in ("run", "again"))
    assert all(torch.equal(first[key], again[key]) for key in first)


def mistake(monkeypatch, capsys, *overrides):
    """The output of a command that ends in an error message before training."""
    from rld_lightning.hydra.script import run_task
    from rld_lightning.tasks.fit import fit

    monkeypatch.setattr(sys, "argv", ["fit.py", *PAIR, *overrides, "print_config=false", "trainer=cpu"])
    with pytest.raises(SystemExit) as stop:
        run_task(lambda cfg: fit(cfg).top1, "fit")
    output = capsys.readouterr().out
    assert stop.value.code == 2
    assert "Traceback" not in output
    return output


def test_a_finished_run_is_not_overwritten(finished, monkeypatch, capsys):
    folder, _ = finished
    before = (folder / "run" / "summary.json").read_text()
    places = f"hydra.run.dir={folder / 'run'}", f"paths.teachers={folder / 'teachers'}"
    assert "holds a run already" in mistake(monkeypatch, capsys, *places)
    assert (folder / "run" / "summary.json").read_text() == before


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("model.teacher.weights=/dev/null/nowhere.pth",),
            "there is no teacher's weights file at /dev/null/nowhere.pth",
        ),
        (("model.teacher.weights=auto", "model.teacher.name=wrn28_2"), "model.teacher.weights=fit"),
        (("model.label=resnet8", "model.teacher=null"), "the loss needs a teacher and model=resnet8 has none"),
        (("loss.temperature=0",), "temperature=0 is not allowed"),
        (("model.student.name=resnet81",), "resnet8"),
        (("data.batch_size=0",), "batch_size=0"),
        (("model.student.name=null",), "model.student.name has no value"),
        (
            ("resume=/dev/null/nowhere/last.ckpt",),
            "there is no checkpoint to resume from at /dev/null/nowhere/last.ckpt",
        ),
        (("model.teacher.weights='/tmp/[old]/t.pth'",), "/tmp/[old]/t.pth"),
        (("model.teacher.weights=pretrained",), "pretrained is for torchvision/, timm/ and transformers/ names"),
        (("model.student.weights=pretrained",), "is for torchvision/, timm/ and transformers/ names, not for resnet8"),
        (("model.student.name=torchvision/alexnet",), "torchvision/alexnet cannot take images of 3x8x8"),
        (("model.teacher.name=torchvision/alexnet",), "choose another size with data.image_size="),
        (("model.teacher.weights=null",), "model.teacher.weights=null is not allowed"),
        (("+trainer.limit_val_batches=0", "loss=ce"), "trainer.limit_val_batches=0 leaves no accuracy to report"),
        (
            ("trainer.limit_train_batches=0.01", "loss=ce"),
            "0.01 is none of the 23 train batches",
        ),
        (("trainer.val_check_interval=100", "loss=ce"), "val_check_interval=100 is more than the 23 train batches of"),
        (("trainer.overfit_batches=0.1", "loss=ce"), "overfit_batches=0.1 is none of the 2 val batches"),
        (("trainer=ddp_cpu", "trainer.devices=3"), "cannot be shared by 3 processes: choose a positive multiple of 3"),
        (("data=imagefolder",), "data.root has no value"),
        (("data.val_fraction=2",), "val_fraction=2"),
    ],
)
def test_a_mistake_ends_in_one_sentence(tmp_path, monkeypatch, capsys, overrides, sentence):
    places = f"hydra.run.dir={tmp_path / 'run'}", f"paths.teachers={tmp_path}"
    assert sentence in mistake(monkeypatch, capsys, *overrides, *places)
    assert not (tmp_path / "run").exists()  # nothing was done, so no folder is left


def test_a_student_s_weights_are_refused_before_a_teacher_is_trained(tmp_path, monkeypatch, capsys):
    torch.save({"model": create_model("resnet8", 7).state_dict()}, tmp_path / "seven.pth")
    options = ("model.teacher.weights=fit", f"paths.teachers={tmp_path / 't'}", f"hydra.run.dir={tmp_path / 'run'}")
    output = mistake(monkeypatch, capsys, *options, f"model.student.weights={tmp_path / 'seven.pth'}")
    assert "the file has 7 classes, the model 10" in output
    assert "training it first" not in output
    assert not (tmp_path / "run").exists()


def in_process(tmp_path, *overrides):
    """Runs a short CE training on the digits in this process."""
    from helpers.configs import compose

    from rld_lightning.tasks.fit import fit

    cfg = compose("data=digits", "model=resnet8", "loss=ce", "recipe=quick", "trainer=cpu", *overrides, resolve=False)
    cfg.paths.run, cfg.print_config = str(tmp_path), False
    return fit(cfg)


def test_a_diverged_run_is_an_error_and_leaves_no_student(tmp_path):
    from rld_lightning.errors import UserError

    with pytest.raises(UserError, match=r"training diverged in epoch 1.*recipe\.optimizer\.lr"):
        in_process(tmp_path, "recipe.epochs=2", "recipe.optimizer.lr=1e30")
    assert not list(tmp_path.glob("*.safetensors")) + list(tmp_path.glob("*.ckpt"))
    assert (tmp_path / "diverged.npz").exists()


def test_training_that_ends_within_an_epoch_reports_the_weights_it_exports(tmp_path, capsys):
    from rld_lightning.tasks.evaluate import EvaluationModule

    summary = in_process(tmp_path, "recipe.epochs=3", "trainer.max_steps=30", "trainer.precision=32-true")
    assert re.search(r"steps of the optimizer +│ +30 of 69", capsys.readouterr().out)
    model = create_model("resnet8", 10)
    model.load_state_dict(load_file(tmp_path / "student.safetensors"))
    data = DigitsDataModule()
    data.setup()
    job = EvaluationModule(model.eval(), 10)
    with torch.no_grad():
        for i, batch in enumerate(data.test_dataloader()):
            job.test_step(batch, i)
    assert summary.top1 == pytest.approx(100 * job.metrics["top1"].compute().item(), abs=1e-4)
    metrics = pd.read_csv(tmp_path / "metrics.csv")
    assert summary.top1_best == pytest.approx(metrics["val/top1"].max())
    assert metrics["val/top1_best"].iloc[-1] == pytest.approx(summary.top1_best)
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    last = metrics["val/top1"].iloc[-1] == metrics["val/top1"].max()
    assert all(torch.equal(best[f"student.{key}"], value) for key, value in model.state_dict().items()) == last


def test_a_student_may_start_from_pretrained_weights(tmp_path, monkeypatch):
    name = "torchvision/shufflenet_v2_x0_5"
    published = create_model(name, 1000).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: published)
    # In bfloat16 on CPUs, torch 2.15 returns garbage gradients of depthwise convolutions with stride 2 on 1x1 images.
    student = (f"model.student.name={name}", "model.student.weights=pretrained", "trainer.precision=32-true")
    in_process(tmp_path, "recipe.epochs=1", "recipe.optimizer.lr=0", "+trainer.limit_train_batches=1", *student)
    left = load_file(tmp_path / "student.safetensors")
    assert torch.equal(left["conv5.0.weight"], published["conv5.0.weight"])
    assert left["fc.weight"].shape == (10, 1024)


def test_switched_off_callbacks_stay_off(tmp_path, capsys):
    off = [f"callbacks.{name}=null" for name in ("progress", "checkpoint_last", "checkpoint_best")]
    in_process(tmp_path, "recipe.epochs=1", *off)
    assert not list(tmp_path.rglob("*.ckpt"))
    assert "it/s" not in capsys.readouterr().out


def test_a_resumed_run_has_the_metrics_of_all_epochs(tmp_path):
    in_process(tmp_path / "first", "recipe.epochs=1", "recipe.scheduler=null")
    last = f"resume={tmp_path / 'first' / 'last.ckpt'}"
    summary = in_process(tmp_path / "second", "recipe.epochs=2", "recipe.scheduler=null", last)
    metrics = pd.read_csv(tmp_path / "second" / "metrics.csv")
    assert metrics.dropna(subset=["val/top1"])["epoch"].tolist() == [0, 1]
    assert summary.top1_best == pytest.approx(metrics["val/top1"].max())
    best = torch.load(tmp_path / "second" / "best.ckpt", weights_only=True)["epoch"]
    assert best == metrics.dropna(subset=["val/top1"]).set_index("epoch")["val/top1"].idxmax()
    callbacks = torch.load(tmp_path / "first" / "last.ckpt", weights_only=True)["callbacks"]
    (known,) = (state for key, state in callbacks.items() if "'val/top1'" in key)
    assert float(known["best_model_score"]) == pytest.approx(metrics["val/top1"].dropna().iloc[0], abs=1e-4)


@pytest.mark.slow
def test_a_teacher_trained_on_some_images_stays_in_its_run(tmp_path):
    pair = (*PAIR[1:], "loss=kd", "model.teacher.weights=fit", f"paths.teachers={tmp_path / 'teachers'}")
    options = (*pair, "recipe.scheduler=null", "data.val_fraction=0.5")
    in_process(tmp_path / "1", *options, "recipe.epochs=1")
    assert not list((tmp_path / "teachers").rglob("*.safetensors"))
    weights = tmp_path / "1" / "teacher" / "student.safetensors"
    assert weights.exists()
    for epochs in (2, 3):  # resumed with it, any number of times
        resume = f"resume={tmp_path / str(epochs - 1) / 'last.ckpt'}"
        in_process(tmp_path / str(epochs), *options, f"recipe.epochs={epochs}", resume)
        assert OmegaConf.load(tmp_path / str(epochs) / "config.yaml").model.teacher.weights == str(weights)


STOP = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/top1, mode: max, stopping_threshold: 0}"


SLOW_CUTS = [
    "+trainer.limit_train_batches=1", "+trainer.limit_val_batches=1", "+trainer.overfit_batches=1",
    "+trainer.max_time=00:00:00:00", "data.val_fraction=0.1", f"+callbacks.stop={STOP}",
]  # fmt: skip


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "cut", ["trainer.max_steps=1", "data.subset=0.1", *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW_CUTS)]
)
def test_only_a_completely_trained_teacher_is_stored(tmp_path, cut, capsys):
    networks = ("model=pair", "model.teacher.name=resnet8", "model.student.name=resnet8", "loss=kd")
    stored = f"paths.teachers={tmp_path / 'teachers'}"
    options = (*networks, "model.teacher.weights=fit", stored, "recipe.epochs=2", "data.eval_batch_size=64")
    in_process(tmp_path / "run", *options, cut, "callbacks.progress=null")
    assert not list((tmp_path / "teachers").rglob("*.safetensors"))
    weights = tmp_path / "run" / "teacher" / "student.safetensors"
    assert weights.exists()
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").model.teacher.weights == str(weights)
    assert "top-1, training images" in capsys.readouterr().out or cut != "trainer.max_steps=1"


def test_a_fast_dev_run_writes_no_results(tmp_path):
    networks = ("model=pair", "model.teacher.name=resnet8", "model.student.name=resnet8", "loss=kd")
    options = (*networks, "model.teacher.weights=fit", f"paths.teachers={tmp_path / 'teachers'}")
    summary = in_process(tmp_path / "run", *options, "data.batch_size=2000", "debug=fast")
    assert (summary.steps, summary.complete) == (1, False)
    assert (tmp_path / "run" / "student.safetensors").exists()
    assert not list((tmp_path / "teachers").rglob("*.safetensors"))
    assert find_runs([tmp_path]) == []


@pytest.mark.slow
def test_a_run_on_a_folder_of_images_resumes_in_another_folder(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    for image in (f"{split}/{name}/{i}.png" for split in ("train", "val") for name in "ab" for i in range(4)):
        (tmp_path / "images" / image).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / image)
    data = ("data=imagefolder", f"data.root={tmp_path / 'images'}", "data.image_size=32", "data.batch_size=4")
    options = (*data, "recipe.epochs=1", "recipe.scheduler=null", "data.num_workers=0")
    in_process(tmp_path / "first", *options)
    resume = (f"resume={tmp_path / 'first' / 'last.ckpt'}", "recipe.epochs=2", "data.eval_batch_size=2")
    assert in_process(tmp_path / "second", *options, *resume).epochs == 2


@pytest.mark.slow
def test_each_fit_has_its_own_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # The second ends within its epoch, so that it validates, and logs, after training.
    for name, limit in (("a", "+trainer.limit_train_batches=2"), ("b", "trainer.max_steps=2")):
        in_process(tmp_path / name, "recipe.epochs=1", "logger=wandb", limit)
        assert len(list((tmp_path / name / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.slow
def test_an_interrupted_run_prints_how_to_resume_and_resumes(finished):
    folder, _ = finished
    teacher = f"model.teacher.weights={folder / 'teachers' / 'digits' / 'resnet14.safetensors'}"
    paths = (f"paths.runs={folder / 'runs'}", "trainer=cpu", f"hydra.run.dir={folder / 'stopped'}")
    pair = (*PAIR, "recipe.scheduler=null")  # a one-cycle schedule cannot be extended
    command = [sys.executable, SCRIPTS / "fit.py", *pair, teacher, "recipe.epochs=200", *paths]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
    while not (folder / "stopped" / "last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    last = folder / "stopped" / "last.ckpt"
    assert f"resume={last}" in output
    epoch = torch.load(last, weights_only=True)["epoch"]
    options = (*pair, teacher, f"recipe.epochs={epoch + 2}", f"resume={last}", f"hydra.run.dir={folder / 'continued'}")
    run("fit.py", *options, folder=folder)
    assert json.loads((folder / "continued" / "summary.json").read_text())["epochs"] == epoch + 2
    run("fit.py", *options[:-1], f"hydra.run.dir={folder / 'stopped'}", folder=folder)  # resumes in the same folder
    metrics = pd.read_csv(folder / "stopped" / "metrics.csv")
    assert metrics.dropna(subset=["val/top1"])["epoch"].tolist() == list(range(epoch + 2))
    weights = [load_file(folder / name / "student.safetensors") for name in ("continued", "stopped")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.slow
def test_two_processes_evaluate_every_image_once_and_write_one_folder(finished):
    folder, _ = finished
    teacher = f"model.teacher.weights={folder / 'teachers' / 'digits' / 'resnet14.safetensors'}"
    target = folder / "ddp"
    options = (f"hydra.run.dir={target}", f"paths.teachers={folder / 'teachers'}", "trainer.precision=32-true")
    result = run_script("fit.py", *PAIR, teacher, "recipe.epochs=2", "trainer=ddp_cpu", *options)
    assert "batch 64 = 2 x 32 on cpu" in result.stdout
    assert result.stdout.count("top-1, last epoch") == 1  # only rank 0 reports
    summary = json.loads((target / "summary.json").read_text())
    run("eval.py", "data=digits", f"weights={target / 'student.safetensors'}", f"hydra.run.dir={target}", folder=folder)
    alone = json.loads((target / "evaluation.json").read_text())
    assert summary["top1"] == pytest.approx(alone["top1"], abs=1e-4)
    assert summary["ce"] == pytest.approx(alone["nll"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_train_the_teacher_first(tmp_path):
    options = ("recipe.epochs=1", "trainer=ddp_cpu", f"hydra.run.dir={tmp_path / 'run'}", f"paths.teachers={tmp_path}")
    run_script("fit.py", *PAIR, "model.teacher.weights=fit", *options)
    assert (tmp_path / "digits" / "resnet14.safetensors").exists()
