"""RLD in the Trainer of Hugging Face, here of a language model. `python examples/hf_trainer.py`."""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from rld_lightning import RLDLoss


class RLDTrainer(Trainer):
    """A Trainer that distils a causal language model.

    Of an image classifier the logits ``(B, C)`` and labels ``(B,)`` go into the loss as they are.

    Args:
        options: those of the Trainer.
        teacher: with the student's vocabulary; it is not trained.
        loss: RLD, or any other loss of logits.
    """

    def __init__(self, *, teacher: nn.Module, loss: RLDLoss | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.teacher = teacher.to(self.args.device).eval()
        self.loss = loss or RLDLoss(beta=2.0)
        self.model_accepts_loss_kwargs = False  # a mean over the batch, which the Trainer divides where it accumulates

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """The mean over the tokens that are to be foretold; labels of -100 are not."""
        outputs = model(input_ids=inputs["input_ids"])
        with torch.no_grad():
            theirs = self.teacher(input_ids=inputs["input_ids"]).logits
        # The logits of a place are about the next one.
        rows = (outputs.logits[:, :-1].flatten(0, 1), theirs[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        terms = self.loss(*rows)
        total = torch.stack(list(terms.values())).sum()
        return (total, outputs) if return_outputs else total


def language_model(width: int) -> GPT2LMHeadModel:
    """A network of one layer for 64 tokens."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=width, n_layer=1, n_head=2, eos_token_id=0, bos_token_id=0)
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    tokens = torch.randint(64, (32, 16))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=4, per_device_train_batch_size=8, report_to="none", use_cpu=True, disable_tqdm=True
        )
        trainer = RLDTrainer(teacher=language_model(32), model=language_model(16), args=arguments, train_dataset=data)
        print(f"loss {trainer.train().training_loss:.3f}, a mean over the steps")
