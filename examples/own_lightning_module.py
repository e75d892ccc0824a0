"""A LightningModule of your own, with a loss and data of this package. `python examples/own_lightning_module.py`."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from rld_lightning import FrozenTeacher, RLDLoss, create_model
from rld_lightning.data import Batch, DigitsDataModule


class MyModule(LightningModule):
    """Distils ``teacher`` into ``student``, both images ``(B, 3, H, W)`` to logits ``(B, C)``."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.teacher = FrozenTeacher(teacher)  # stays in evaluation mode, takes no gradients; gives logits and features
        self.criterion = RLDLoss()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """A batch of anybody's is ``x, y``; one of this package's data modules has more behind them."""
        x, y = batch[:2]
        terms = self.criterion(self.student(x), self.teacher(x)[0], y)
        self.log_dict({f"train/{name}": term for name, term in terms.items()})
        return torch.stack(list(terms.values())).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimises the student alone."""
        return torch.optim.AdamW(self.student.parameters(), lr=1e-3)


if __name__ == "__main__":
    module = MyModule(create_model("resnet8", 10), create_model("wrn16_1", 10))
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(module, datamodule=DigitsDataModule())
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
