"""Measures a teacher's accuracy before training."""

import time

import torch
from lightning.pytorch import Trainer

from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.distributed import rank_zero_only
from rld_lightning.metrics import sampling_error
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.models.weights.facts import WeightsFacts

SECONDS = 3.0
_BATCH_ON_CPU = 64  # on a GPU, launching a batch takes as long as for a large one
_FAR = 5.0  # points of top-1


@rank_zero_only
def measure_teacher(teacher: FrozenTeacher, facts: WeightsFacts, data: ImageDataModule, trainer: Trainer) -> None:
    """Measures a teacher on as many validation images as a few seconds allow, and prints its accuracy.

    In float32, as during training; cached logits take no time. Prints a warning if it is near chance, or far below the
    accuracy recorded in its file. Skips a sharded teacher, which is not on one device yet.

    Raises:
        ValueError: its logits are not finite.
    """
    if teacher.shard:
        return
    device = trainer.strategy.root_device
    data.trainer = trainer  # determines where images are decoded
    teacher.place(device)
    right = seen = 0
    end = time.monotonic() + SECONDS
    size = _BATCH_ON_CPU if device.type == "cpu" else data.largest_eval_batch // trainer.world_size
    for batch in data.val_sample(max(1, size)):
        logits = teacher.validate(batch.images.to(device), batch.index.to(device), batch.label.to(device))
        if logits.isnan().any():
            raise ValueError(
                f"the teacher's logits of {data.name} are not numbers (NaN): its weights are damaged, or need "
                "model.teacher.dtype=float32; choose another file with model.teacher.weights=."
            )
        right += int((logits.argmax(1) == batch.label.to(device)).sum())
        seen += len(batch.label)
        if time.monotonic() > end:
            break
    teacher.place(torch.device("cpu"))
    if not seen:
        return
    top1 = 100 * right / seen
    recorded = facts.top1 if facts.dataset in (None, data.name) else None
    images = f"{seen:,} of {data.val_size:,} validation images{_learnt(facts, data)}"
    print_line("teacher", f"top-1 {top1:.2f} % on {images}")
    chance = 100 / data.num_classes
    fallen = recorded is not None and top1 < recorded - sampling_error(recorded, seen) - _FAR
    guessing = top1 <= chance + sampling_error(chance, seen) + _FAR * (1 - chance / 100)
    if not (fallen or guessing):
        return
    like = f"far below the {recorded:.2f} % that its file says" if fallen else f"near that of guessing ({chance:.2f} %)"
    why = _causes(facts, teacher, data) if fallen or recorded is None else "so says its file"
    print_line("caution", f"the teacher's top-1 is {like}; {why}")


def _learnt(facts: WeightsFacts, data: ImageDataModule) -> str:
    """Returns a warning if images are held out of a training split that the teacher may have been trained on."""
    held_out = facts.dataset == data.name and all(getattr(facts, k) == v for k, v in data.split_facts.items())
    return "" if held_out or not data.val_fraction else ", which it may have been trained on"


def _causes(facts: WeightsFacts, teacher: FrozenTeacher, data: ImageDataModule) -> str:
    """Suggests possible causes, as far as they are not excluded."""
    causes = []
    if facts.mean is None and teacher.renormalise is None:
        causes.append("another normalisation (model.teacher.mean and std)")
    if facts.image_shape is None or facts.image_shape != data.image_shape:
        causes.append("images of another size")
    if facts.class_names is None:
        causes.append("another order of the classes")
    return (
        f"it may have been trained with {' or '.join(causes)}" if causes else "it may not have been trained to the end"
    )
