"""A teacher, then a student from it, with Lightning and without Hydra. `python examples/lightning_script.py`."""

from functools import partial

from lightning.pytorch import Trainer
from torch.optim import SGD

from rld_lightning import CELoss, DistillationModule, FrozenTeacher, RLDLoss, create_model
from rld_lightning.data import DigitsDataModule

data = DigitsDataModule(batch_size=64)  # or CIFAR100DataModule("data"), ImageFolderDataModule("/photos"), ...
sgd = partial(SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)

teacher = create_model("wrn16_2", num_classes=10)
alone = DistillationModule(teacher, CELoss(), sgd, num_classes=10)
Trainer(max_epochs=4, logger=False, enable_checkpointing=False).fit(alone, datamodule=data)

student = DistillationModule(
    create_model("resnet8", 10), RLDLoss(warmup_epochs=1), sgd, teacher=FrozenTeacher(teacher), num_classes=10
)
trainer = Trainer(max_epochs=4, logger=False, enable_checkpointing=False)
trainer.fit(student, datamodule=data)
top1 = float(trainer.callback_metrics["val/top1"])
