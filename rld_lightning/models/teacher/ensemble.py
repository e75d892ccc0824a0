"""An ensemble of trained networks as one teacher."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rld_lightning.models.normalisation import Renormalise

MEANS = ("logits", "probabilities")


class Ensemble(nn.Module):
    """Averages the outputs of its members.

    Averages ``"logits"``, or ``"probabilities"`` (at temperature 1), whose logarithms are then the logits; a loss
    applies its own temperature after the average. Unlike probabilities, logits differ in scale between members: one
    with larger logits weighs more.

    Args:
        members: each maps images ``(B, 3, H, W)`` to logits ``(B, C)`` of the same classes.
        mean_of: ``"logits"`` or ``"probabilities"``.
        renormalises: converts the images to each member's normalisation; None if the member has the data's.

    Raises:
        ValueError: there are no members, or ``mean_of`` is unknown.
    """

    no_stages = (
        "several teachers (model.teacher.weights) only have logits in common, and the loss needs the teacher's "
        "features; give one teacher, or choose a loss of logits."
    )

    def __init__(
        self,
        members: Sequence[nn.Module],
        mean_of: str = "logits",
        renormalises: Sequence[Renormalise | None] | None = None,
    ) -> None:
        super().__init__()
        if not members:
            raise ValueError("an ensemble has at least one member.")
        if mean_of not in MEANS:
            raise ValueError(f"mean_of={mean_of!r} is unknown; choose {' or '.join(MEANS)}.")
        self.members = nn.ModuleList(members)
        self.renormalises = nn.ModuleList(
            nn.Identity() if step is None else step for step in renormalises or [None] * len(members)
        )
        self.mean_of = mean_of

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``(B, 3, H, W)`` to ``(B, C)``, in float32 or better."""
        seen = (step(images).to(images.dtype) for step in self.renormalises)
        logits = torch.stack([member(view) for member, view in zip(self.members, seen, strict=True)])
        with torch.autocast(images.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if self.mean_of == "logits":
                return logits.mean(0)
            return F.log_softmax(logits, dim=-1).logsumexp(0) - torch.tensor(len(logits), dtype=logits.dtype).log()
