"""This package's training step on anybody's DataLoader of (x, y). `python examples/own_loader.py`."""

from functools import partial

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from rld_lightning import DistillationModule, FrozenTeacher, RLDLoss, create_model

images, label = torch.randn(128, 3, 8, 8), torch.arange(128) % 10
train = DataLoader(TensorDataset(images, label), batch_size=32, shuffle=True)
val = DataLoader(TensorDataset(images, label), batch_size=64)

module = DistillationModule(
    create_model("resnet8", 10),
    RLDLoss(),
    partial(torch.optim.AdamW, lr=1e-3),
    teacher=FrozenTeacher(create_model("wrn16_1", 10)),
    num_classes=10,
)
trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False)
trainer.fit(module, train, val)
