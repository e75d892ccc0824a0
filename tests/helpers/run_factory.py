"""Writes folders of finished, unfinished and failed runs, without training."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import yaml

from rld_lightning.runs.summary import Summary

# Class and typical hyper-parameters of each loss.
LOSSES = {
    "ce": {"_target_": "rld_lightning.losses.CELoss"},
    "kd": {"_target_": "rld_lightning.losses.KDLoss", "temperature": 4.0, "weight": 0.9, "ce_weight": 0.1},
    "dkd": {"_target_": "rld_lightning.losses.DKDLoss", "alpha": 1.0, "beta": 8.0, "temperature": 4.0},
    "rld": {"_target_": "rld_lightning.losses.RLDLoss", "alpha": 1.0, "beta": 8.0, "temperature": 4.0},
}
PARAMETERS = {"resnet20": 278_324, "resnet8": 83_892, "wrn40_2": 2_255_156, "wrn16_2": 703_284}
MACS = {"resnet20": 40_820_000, "resnet8": 12_700_000, "wrn40_2": 327_000_000, "wrn16_2": 101_000_000}


def write_run(
    folder: Path,
    method: str = "rld",
    *,
    teacher: str | None = "resnet20",
    student: str = "resnet8",
    seed: int = 0,
    top1: float = 60.0,
    best: float | None = None,
    epochs: int = 30,
    dataset: str = "cifar100",
    held_out: float = 0.0,
    teacher_top1: float | None = 68.0,
    weights: str = "teachers/teacher.safetensors",
    settings: dict[str, object] | None = None,
    model: str | None = None,
    callbacks: dict[str, dict[str, object]] | None = None,
    summary: dict[str, object] | None = None,
    tuned: dict[str, dict[str, object]] | None = None,
    finished: bool = True,
    error: str | None = None,
) -> Path:
    """Writes a run directory.

    Args:
        folder: created if missing.
        method: option of the loss group; if not in :data:`LOSSES`, a loss without hyper-parameters.
        teacher: its network, or None for a single model.
        student: the trained network.
        seed: of the run.
        top1: last epoch's accuracy in percent, the end of the learning curve.
        best: best epoch's; by default 0.1 more.
        epochs: number of epochs.
        dataset: its name.
        held_out: ``data.val_fraction``; if above 0, accuracy is on held-out training images.
        teacher_top1: the teacher's accuracy as measured by the run.
        weights: the teacher's file.
        settings: values by full key, such as ``{"loss.alpha": 2.0}``.
        model: option of the model group; by default the pair's.
        callbacks: as in the config.
        summary: fields of the summary to replace, such as ``{"steps": 60}``.
        tuned: settings of losses in the pair's file.
        finished: False writes no summary.
        error: text of ``error.txt``, for a failed run.
    """
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    best = top1 + 0.1 if best is None else best
    target = f"rld_lightning.losses.{method.upper()}Loss"
    config = {
        "seed": seed,
        "data": {"_target_": "rld_lightning.data.CIFAR100DataModule", "batch_size": 64, "val_fraction": held_out}
        | {"subset": 1.0, "seed": seed, "root": "data"},
        "model": {
            "label": f"{teacher}_to_{student}" if teacher else student,
            "teacher": {"name": teacher, "weights": weights} if teacher else None,
            "student": {"name": student, "weights": None},
            "tuned": tuned,
        },
        "loss": dict(LOSSES.get(method, {"_target_": target})),
        "recipe": {"epochs": epochs, "batch_size": 64, "warmup_epochs": 1}
        | {"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.05}},
        "trainer": {"max_epochs": epochs, "precision": "32-true", "default_root_dir": str(folder)},
        "paths": {"run": str(folder)},
        "callbacks": callbacks or {},
    }
    overrides = [f"model={config['model']['label']}", f"loss={method}", f"seed={seed}", f"recipe.epochs={epochs}"]
    for key, value in (settings or {}).items():
        *parents, name = key.split(".")
        inner = config
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
        overrides.append(f"{key}={value}")
    choices = {"loss": method, "recipe": "cifar240" if epochs == 240 else "quick"}
    choices["model"] = model or config["model"]["label"]
    hydra = {"hydra": {"runtime": {"choices": choices}}}
    environment = {"python": "3.11.7", "torch": "2.15.0", "platform": "Linux-x86_64", "threads": 1, "gpus": []}
    environment["commit"] = None
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(hydra))
    (folder / "environment.json").write_text(json.dumps(environment))
    _write_metrics(folder, top1, best, epochs if finished else max(1, epochs // 3), seed)
    if error is not None:
        (folder / "error.txt").write_text(error)
    if finished and error is None:
        with_teacher = teacher is not None and method != "ce"
        whole = Summary(
            model=student, loss=method.upper(), dataset=dataset, split="val" if held_out else "test",
            images=5_000 if held_out else 10_000, val_fraction=0.1 if held_out else 0.0, data_seed=seed, epochs=epochs,
            seed=seed, top1=top1, top1_best=best, top5=min(99.0, top1 + 25), ce=2.0,
            teacher=teacher if with_teacher else None,
            teacher_top1=teacher_top1 if with_teacher else None, agreement=70.0 if with_teacher else None,
            parameters=PARAMETERS.get(student, 100_000), macs=MACS.get(student, 10_000_000), images_per_s=900.0,
            run=str(folder), split_images=5_000 if held_out else 10_000, steps=782 * epochs,
            scheduled_steps=782 * epochs,
        )  # fmt: skip
        replace(whole, **(summary or {})).write(folder)
    return folder


def write_comparison(
    root: Path, means: dict[str, float], seeds: int = 3, *, spread: float = 0.3, with_teacher: bool = True, **options
) -> None:
    """Writes ``<root>/<method>/seed<k>`` for each method, around its mean accuracy, and ``<root>/teacher``."""
    if with_teacher:
        options.setdefault("weights", str(root.resolve() / "teacher" / "student.safetensors"))
    for method, mean in means.items():
        for seed in range(seeds):
            noise = random.Random(f"{method} {seed}").gauss(0, spread) + 0.4 * math.sin(seed)
            write_run(root / method / f"seed{seed}", method, seed=seed, top1=round(mean + noise, 2), **options)
    if with_teacher:
        teacher = options.get("teacher", "resnet20")
        alone = {k: v for k, v in options.items() if k not in ("teacher", "student")}
        write_run(root / "teacher", "ce", teacher=None, student=teacher, top1=68.2, **alone)


def write_sweep(root: Path, *, alphas, betas, temperatures, seeds=(0,), method="rld") -> None:
    """Writes a sweep with one folder per trial, all on held-out images; the best is alpha 2, beta 8, T 4."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "multirun.yaml").write_text("hydra: {}\n")
    for alpha in alphas:
        for beta in betas:
            for temperature in temperatures:
                for seed in seeds:
                    distance = abs(math.log2(alpha / 2)) + 0.7 * abs(math.log2(beta / 8)) + 0.5 * abs(temperature - 4)
                    values = {"loss.alpha": alpha, "loss.beta": beta, "loss.temperature": temperature}
                    name = ",".join(f"{key}={value}" for key, value in values.items()) + f",seed={seed}"
                    write_run(
                        root / name, method, seed=seed, top1=round(58 - distance + 0.1 * seed, 2), held_out=0.1,
                        settings=values, epochs=10,
                    )  # fmt: skip


def _write_metrics(folder: Path, top1: float, best: float, epochs: int, seed: int) -> None:
    noise = random.Random(seed)
    lines = ["epoch,step,train/loss,train/top1,val/ce,val/top1,val/top5"]
    for epoch in range(epochs):
        share = 1 - math.exp(-4 * (epoch + 1) / epochs)
        value = top1 * share / (1 - math.exp(-4)) + noise.gauss(0, 0.4) * (1 - share)
        value = top1 if epoch == epochs - 1 else best if epoch == epochs - 2 else min(value, best)
        lines.append(f"{epoch},{epoch * 10},{4 - 2 * share},{value - 3},{4 - 2 * share},{value},{min(99, value + 25)}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
