"""RLD in the training script of timm (1.0.31 or newer), as a task of it. `python examples/timm_task.py`.

timm's train.py makes a task, `LogitDistillationTask(model, teacher_model=..., ...)`, which computes the loss: put
`RLDTask(model, teacher_model=..., ...)` in its place. All else of the script stays: DDP, EMA, mixed precision.
"""

from typing import Any

import timm
import torch
from timm.task import LogitDistillationTask
from torch import Tensor, nn

from rld_lightning import RLDLoss


class RLDTask(LogitDistillationTask):
    """timm's distillation with RLD in the place of its KL divergence; teachers see images normalised as they want them.

    Args:
        student_model: of timm, which is trained.
        teacher_model: a name, or a network of timm's.
        loss: RLD, or any other loss of logits; it has a cross-entropy of its own.
        options: timm's for where the weights of the teacher are, device and type.
    """

    def __init__(
        self, student_model: nn.Module, teacher_model: Any, loss: RLDLoss | None = None, **options: Any
    ) -> None:
        super().__init__(student_model, teacher_model, criterion=nn.CrossEntropyLoss(), **options)
        self.rld = loss or RLDLoss()

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What timm's loop takes: the loss and the student's logits; and each term, to be logged."""
        logits = self.trainable_module(input)
        with torch.no_grad():
            theirs = self.teacher(self.teacher.normalize_input(input, self.student_mean, self.student_std))
        terms = self.rld(logits, theirs, target)
        return {"loss": torch.stack(list(terms.values())).sum(), "output": logits, **terms}


if __name__ == "__main__":
    torch.manual_seed(0)
    small = {"num_classes": 10, "img_size": 32, "patch_size": 8, "depth": 1, "num_heads": 2}
    teacher, student = (timm.create_model("vit_tiny_patch16_224", embed_dim=width, **small) for width in (64, 32))
    task = RLDTask(student, teacher, verbose=False).train()
    optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), lr=1e-3)
    images, label = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    for step in range(10):
        result = task(images, label)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        if step in (0, 9):
            print({name: round(result[name].item(), 3) for name in ("loss", "ce", "scd", "mcd")})
