"""Folders of finished runs for figures, without training."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from rld_lightning.models import create_model
from rld_lightning.models.weights.save import save_weights
from rld_lightning.reporting import style
from rld_lightning.runs.finished import Run, read_run
from rld_lightning.runs.summary import Summary

SUMMARY = Summary(
    model="resnet8", loss="RLD", dataset="digits", split="test", images=360,
    val_fraction=0.0, data_seed=0, epochs=3,
    seed=0, top1=50.0, top1_best=51.0, top5=80.0, ce=2.0, teacher="resnet14", teacher_top1=60.0, agreement=55.0,
    parameters=10, macs=20, images_per_s=None, run="x", split_images=360, steps=69, scheduled_steps=69,
)  # fmt: skip
TARGETS = {"ce": "CELoss", "kd": "KDLoss", "dkd": "DKDLoss"}


@pytest.fixture(autouse=True)
def _coarse_pictures(monkeypatch):
    """Lowers the resolution: full-resolution pictures take seconds."""
    monkeypatch.setattr(style, "DPI", 30)


@pytest.fixture
def make_run(tmp_path):
    """Writes the directory of a finished run: ``make_run("rld", seed=1, top1=60.0, loss={"alpha": 2.0})``."""

    def make(
        method, *, seed=0, top1=50.0, teacher="resnet14", teacher_train=(90.0, 92.0), epochs=3, loss=(), **summary
    ):
        folder = tmp_path / "runs" / f"{teacher}-{method}-{'-'.join(map(str, dict(loss).values()))}-{seed}-{epochs}"
        (folder / ".hydra").mkdir(parents=True)
        alone = method == "ce"
        config = {
            "model": {
                "label": f"{teacher}_to_resnet8",
                "teacher": {"name": teacher, "weights": str(tmp_path / f"{teacher}.safetensors")},
                "student": {"name": "resnet8"},
            },
            "loss": {"_target_": f"rld_lightning.losses.{TARGETS.get(method, 'RLDLoss')}", **dict(loss)},
            "data": {"_target_": "rld_lightning.data.DigitsDataModule", "image_size": 8, "seed": seed},
            "recipe": {"epochs": epochs},
            "seed": seed,
        }
        OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
        choices = {"hydra": {"runtime": {"choices": {"loss": method}}}}
        OmegaConf.save(OmegaConf.create(choices), folder / ".hydra" / "hydra.yaml")
        own = {
            "teacher": None if alone else teacher,
            "seed": seed,
            "top1": top1,
            "top1_best": top1 + 1,
            "epochs": epochs,
        }
        replace(SUMMARY, **own, **summary).write(folder)
        metrics = {"epoch": range(len(teacher_train)), "step": range(len(teacher_train))}
        pd.DataFrame(metrics | ({} if alone else {"train/teacher_top1": teacher_train})).to_csv(folder / "metrics.csv")
        return read_run(folder)

    return make


@pytest.fixture
def save_networks(tmp_path):
    """Writes random weights as a run's student and teacher."""

    def save(run: Run, seed: int = 0) -> None:
        torch.manual_seed(seed)
        for name, path in (
            ("resnet8", run.folder / "student.safetensors"),
            ("resnet14", tmp_path / "resnet14.safetensors"),
        ):
            if not Path(path).exists():
                save_weights(create_model(name, 10), path, {"name": name, "num_classes": 10})

    return save
