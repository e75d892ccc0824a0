"""The jobs of test_processes.py, imported there and in the ranks."""

import json
import os
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn

from rld_lightning import RLDLoss, create_model
from rld_lightning.data.in_memory import InMemoryDataModule
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.module import DistillationModule


class Noise(InMemoryDataModule):
    """Random images, with as many test images as CIFAR-100."""

    name, num_classes, image_shape = "noise", 10, (3, 8, 8)
    class_names, mean, std = [str(c) for c in range(10)], (0.5, 0.5, 0.5), (0.29, 0.29, 0.29)

    def read_split(self, train):
        size = 1200 if train else 10_000
        generator = torch.Generator().manual_seed(int(train))
        images = torch.randint(256, (size, 8, 8, 3), dtype=torch.uint8, generator=generator)
        return images, torch.arange(size) % 10


class Recorder(Callback):
    """Records the first and the last gradient, the tensors in DDP, and the validated images."""

    def __init__(self):
        self.gradients, self.wrapped, self.seen = [], {}, []

    def on_after_backward(self, trainer, module):
        self.gradients = [*self.gradients[:1], {name: p.grad.clone() for name, p in module.named_parameters()}]
        ddp = trainer.strategy.model
        if isinstance(ddp, nn.parallel.DistributedDataParallel):
            self.wrapped = {"parameters": list(ddp._module_parameters), "buffers": list(ddp.modules_buffers)}

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self.seen.append(batch.index)


def train_and_evaluate(cfg):
    """Trains 20 steps of RLD with a global batch of 60, validates 10,000 images, and writes each rank's records."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    # No BatchNorm in the student: its statistics differ between processes, and SyncBatchNorm does not run on a CPU.
    student = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)
    )
    teacher = FrozenTeacher(create_model("wrn16_1", 10))
    module = DistillationModule(
        student,
        RLDLoss(),
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4),
        teacher=teacher,
        num_classes=10,
    )
    before = {name: value.clone() for name, value in student.state_dict().items()}
    recorder = Recorder()
    trainer = Trainer(
        max_steps=20,
        limit_val_batches=0 if cfg.get("skip_validation") else None,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=10,
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[recorder],
    )
    data = Noise(batch_size=60, eval_batch_size=256)
    trainer.fit(module, data)
    teachers = {id(value) for value in (*teacher.parameters(), *teacher.buffers())}
    ours = {id(value) for value in module.parameters()}
    trainer.validate(module, data, verbose=False)
    torch.save(
        {
            "before": before,
            "weights": student.state_dict(),
            "gradients": recorder.gradients,
            "top1": trainer.callback_metrics["val/top1"],
            "ce": trainer.callback_metrics["val/ce"],
            "seen": torch.cat(recorder.seen),
            "teacher_in_ddp": any(id(value) in teachers for kind in recorder.wrapped.values() for value in kind),
            "only_what_trains": all(id(value) in ours for value in recorder.wrapped.get("parameters", [])),
            "buffers_in_ddp": len(recorder.wrapped.get("buffers", [])),
            "wrapped": len(recorder.wrapped.get("parameters", [])),
        },
        Path(cfg.paths.run) / f"rank_{rank}.pt",
    )


class Witness(Callback):
    """Writes each rank's learning rate and port, and raises an error in one trial's second rank."""

    def on_train_start(self, trainer, module):
        folder = Path(trainer.default_root_dir)
        seen = {"lr": trainer.optimizers[0].param_groups[0]["lr"], "group": os.environ["MASTER_PORT"]}
        (folder / f"rank_{trainer.global_rank}.json").write_text(json.dumps(seen))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        # After the first step, when both ranks have written.
        if batch_idx == 1 and Path(trainer.default_root_dir).name.endswith("=0.02") and trainer.global_rank == 1:
            raise RuntimeError("the second rank fails")
