"""Contrastive representation distillation (CRD): Tian et al., ICLR 2020, arXiv 1910.10699."""

import math
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.losses.base import StepContext
from rld_lightning.losses.features.base import FeatureLoss
from rld_lightning.losses.numerics import total
from rld_lightning.losses.ranges import Count, Positive, Weight, checked, must_be
from rld_lightning.losses.registry import register_loss
from rld_lightning.models.stages import Stages

# Independent of the run's seed, because all processes must start from the same memories.
_SEED = 1910_10699

Momentum = Annotated[float, must_be("in [0, 1), for 1 never remembers", lambda value: 0 <= value < 1)]


@checked
def crd_loss(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor,
    teacher_memory: Tensor,
    contrast: Tensor,
    log_normaliser: Tensor,
    *,
    weight: Weight = 0.8,
    temperature: Positive = 0.07,
) -> dict[str, Tensor]:
    """Contrasts an image's embedding with the *other* network's memories of it and of K negatives, in both directions.

    With unit embeddings e of one network and memories m of the other, N images and a constant Z::

        P_k = exp(e . m_k / temperature) / Z,  D_k = P_k / (P_k + K / N)
        -log D_0 - sum over k = 1 ... K of log(1 - D_k)

    This is the paper's critic and noise-contrastive objective, with the Z of its published code; averaged over the
    batch, summed over the two directions. The code also adds 1e-7 to each denominator to avoid a division by zero; here
    D is computed as the sigmoid of ``log P_k - log(K / N)``, which does not need it.

    Args:
        student: ``(B, D)`` unit vectors.
        teacher: ``(B, D)`` unit vectors; also carries a gradient, because the teacher's embedding is learned.
        student_memory: ``(N, D)``, without gradient.
        teacher_memory: ``(N, D)``, without gradient.
        contrast: ``(B, 1 + K)`` row indices in the memories: the image itself, then its negatives.
        log_normaliser: ``(2,)``, log Z of the student's and of the teacher's scores.
        weight: factor on the term.
        temperature: > 0.

    Returns:
        ``{"crd": weight * CRD}`` in nats.

    Raises:
        ValueError: hyper-parameters outside their range.
    """
    log_noise = math.log((contrast.shape[1] - 1) / len(student_memory))
    directions = []
    for embedding, memory, log_z in (
        (student, teacher_memory, log_normaliser[0]),
        (teacher, student_memory, log_normaliser[1]),
    ):
        odds = similarities(embedding, memory, contrast) / temperature - log_z - log_noise
        directions.append(-(F.logsigmoid(odds[:, 0]) + F.logsigmoid(-odds[:, 1:]).sum(1)).mean())
    return {"crd": weight * total(directions)}


def similarities(embedding: Tensor, memory: Tensor, contrast: Tensor) -> Tensor:
    """Returns the inner products of each embedding with its rows of a memory.

    If it needs less memory, the products with all rows are computed and the rows selected afterwards, instead of
    gathering ``(B, 1 + K, D)`` rows: for CIFAR-100 this takes a fifth of the memory and, on a CPU, a twentieth of the
    time.

    Args:
        embedding: ``(B, D)``.
        memory: ``(N, D)``; may be overwritten before the backward pass.
        contrast: ``(B, 1 + K)`` indices of rows.

    Returns:
        ``(B, 1 + K)``.
    """
    memory = memory.detach()
    if len(memory) <= contrast.shape[1] * memory.shape[1]:
        return (embedding @ memory.to(embedding.dtype, copy=True).T).gather(1, contrast)
    return torch.einsum("bd,bkd->bk", embedding, memory[contrast].to(embedding.dtype))


def remember(memory: Tensor, embedding: Tensor, index: Tensor, momentum: float = 0.5) -> None:
    """Updates rows of a memory in place, to the unit vector along ``m old + (1 - m) new``.

    If an image occurs several times, the last occurrence counts, on every device: the result is deterministic.

    Args:
        memory: ``(N, D)``.
        embedding: ``(B, D)`` unit vectors, the new values.
        index: ``(B,)`` row indices.
        momentum: m.
    """
    same = index.unsqueeze(1) == index
    last = torch.where(same, torch.arange(len(index), device=index.device), -1).amax(1)
    updated = F.normalize(torch.lerp(embedding, memory[index].to(embedding.dtype), momentum))
    memory[index] = updated[last].to(memory.dtype)


@register_loss("crd")
class CRDLoss(FeatureLoss):
    """``ce_weight * CE + weight * CRD`` on the pooled features; see :func:`crd_loss`.

    Learned linear layers map both networks' features to embeddings of unit length. A memory per network holds a running
    mean of the embedding of every training image, updated after each step's loss is computed. The constants Z are fixed
    in the first step: the mean exponentiated score times N.

    Negatives are images of *other* classes, drawn on the device with replacement (the published dataset draws without
    replacement if there are enough images). The draw depends on the number of steps so far and on the process; a
    resumed run continues it. Under DDP all processes hold the same memories as one process with the whole batch would:
    embeddings are gathered, and Z is that of the whole first batch. The first batch must be equally large on all
    processes, later ones must not be larger; an epoch's last batch may be smaller on some processes.

    Args:
        negatives: K per image; reduced to the number of images outside the largest class if that is smaller.
        dim: dimension of the embeddings.
        momentum: share of the old value in a memory's update, in [0, 1).
        others: see :class:`~rld_lightning.losses.features.base.FeatureLoss`.
    """

    method = "Contrastive representation distillation"
    papers = ("1910.10699",)
    function = staticmethod(crd_loss)

    single = True
    takes_mixtures = False  # the memories hold unmixed images

    own_buffers = (
        "student_memory",
        "teacher_memory",
        "log_normaliser",
        "by_class",
        "class_start",
        "class_size",
    )

    weight: Weight = 0.8
    negatives: Count = 16384
    dim: Count = 128
    temperature: Positive = 0.07
    momentum: Momentum = 0.5

    student_memory: Tensor = field(init=False)
    teacher_memory: Tensor = field(init=False)
    log_normaliser: Tensor = field(init=False)
    by_class: Tensor = field(init=False)
    class_start: Tensor = field(init=False)
    class_size: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._steps = 0
        self._largest_batch = 0

    def paths(self, stages: Stages) -> tuple[str, ...]:
        """Returns the pooled features."""
        return (stages.pooled,)

    def build(self, student_shapes: Sequence[torch.Size], teacher_shapes: Sequence[torch.Size]) -> None:
        """Builds the two linear embeddings."""
        self.student_embedding = nn.Linear(student_shapes[0][1:].numel(), self.dim)
        self.teacher_embedding = nn.Linear(teacher_shapes[0][1:].numel(), self.dim)

    def connect(
        self, student: nn.Module, teacher: nn.Module | None, image_shape: Sequence[int], train_label: Tensor
    ) -> None:
        """Connects as in the base class, then creates the memories of the training images."""
        super().connect(student, teacher, image_shape, train_label)
        self.make_memories(train_label)

    def make_memories(self, train_label: Tensor) -> None:
        """Creates the memories, filled with random vectors, and the index of the images by class.

        Args:
            train_label: ``(N,)`` class of each training image.

        Raises:
            ValueError: all images are of one class.
        """
        label = train_label.detach().cpu().long()
        counts = label.bincount()
        self.negatives = min(self.negatives, len(label) - int(counts.max()))
        if self.negatives < 1:
            raise ValueError("CRD contrasts images of different classes, but all training images are of one class.")
        generator = torch.Generator().manual_seed(_SEED)
        bound = math.sqrt(3 / self.dim)  # a mean squared length of 1
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.empty(len(label), self.dim).uniform_(-bound, bound, generator=generator))
        self.register_buffer("log_normaliser", torch.zeros(2))
        # Start and size of each image's class in ``by_class``. Not in checkpoints: computed from the labels.
        self.register_buffer("by_class", label.argsort(stable=True), persistent=False)
        self.register_buffer("class_start", (counts.cumsum(0) - counts)[label], persistent=False)
        self.register_buffer("class_size", counts[label], persistent=False)

    def feature_terms(self, student: list[Tensor], teacher: list[Tensor], step: StepContext) -> dict[str, Tensor]:
        """Returns ``crd``, and updates the memories."""
        if step.index is None:
            raise ValueError("CRDLoss needs the position of each image in the training split (StepContext.index).")
        ours = _embed(self.student_embedding, student[0])
        theirs = _embed(self.teacher_embedding, teacher[0])
        contrast = self.draw(step.index)
        if self._steps == 0:
            self._fix_normaliser(ours.detach(), theirs.detach(), contrast)
        memories = self.student_memory, self.teacher_memory
        terms = self.call_function(ours, theirs, *memories, contrast, self.log_normaliser)
        self._remember(ours.detach(), theirs.detach(), step.index)
        self._steps += 1
        return terms

    def draw(self, index: Tensor) -> Tensor:
        """Returns each image's index and K uniformly drawn images of other classes: ``(B,)`` to ``(B, 1 + K)``."""
        rank, processes = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
        generator = torch.Generator(index.device).manual_seed(_SEED + self._steps * processes + rank)
        start, size = self.class_start[index].unsqueeze(1), self.class_size[index].unsqueeze(1)
        number = torch.randint(2**31, (len(index), self.negatives), generator=generator, device=index.device)
        place = number % (len(self.by_class) - size)
        place = torch.where(place < start, place, place + size)  # skips the image's class
        return torch.cat([index.unsqueeze(1), self.by_class[place]], 1)

    @torch.no_grad()
    def _fix_normaliser(self, student: Tensor, teacher: Tensor, contrast: Tensor) -> None:
        pairs = (student, self.teacher_memory), (teacher, self.student_memory)
        scores = torch.stack([similarities(*pair, contrast).flatten() / self.temperature for pair in pairs])
        log_mean = scores.logsumexp(1) - math.log(contrast.numel())
        if _distributed():
            log_mean = _gather(log_mean.unsqueeze(0)).logsumexp(0) - math.log(dist.get_world_size())
        self.log_normaliser.copy_(log_mean + math.log(len(self.by_class)))

    @torch.no_grad()
    def _remember(self, student: Tensor, teacher: Tensor, index: Tensor) -> None:
        if _distributed():
            # Collectives need equal sizes; exchanging the sizes would synchronise. Smaller batches repeat their last
            # row, which does not change the result.
            self._largest_batch = max(self._largest_batch, len(index))
            rows = torch.arange(self._largest_batch, device=index.device).clamp(max=len(index) - 1)
            student, teacher, index = (_gather(tensor[rows]) for tensor in (student, teacher, index))
        remember(self.student_memory, student, index, self.momentum)
        remember(self.teacher_memory, teacher, index, self.momentum)

    def get_extra_state(self) -> Tensor:
        """Returns the state besides the memories that a resumed run needs, as a tensor."""
        return torch.tensor([self._steps, self._largest_batch])

    def set_extra_state(self, state: Tensor) -> None:
        """Restores the state of :meth:`get_extra_state`."""
        self._steps, self._largest_batch = state.tolist()


def _embed(linear: nn.Linear, feature: Tensor) -> Tensor:
    embedding = linear(feature.flatten(1).to(linear.weight.dtype))
    return F.normalize(embedding.to(feature.dtype))


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gather(tensor: Tensor) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
