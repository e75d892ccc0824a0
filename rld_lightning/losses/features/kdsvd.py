"""Self-supervised distillation by singular value decomposition (KDSVD): Lee, Kim and Song, ECCV 2018."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses.features.base import FeatureLoss, check_pairs, pool_to_smaller
from rld_lightning.losses.numerics import total
from rld_lightning.losses.ranges import Count, Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.models.stages import Stages
from rld_lightning.mps import where_it_runs

# Each teacher vector is matched with one of the student's first ``num_vectors + SPARE_VECTORS`` vectors.
SPARE_VECTORS = 3
# If squared singular values differ by less than this fraction of the largest, rounding determines their directions.
SMALLEST_GAP = 1e-4


@checked
def kdsvd_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, weight: Weight = 1.0, num_vectors: Count = 1
) -> dict[str, Tensor]:
    """Computes the squared difference of the relations of neighbouring stages' singular vectors, over the batch size.

    A map is treated as a matrix ``(channels * H, W)``. Its first right singular vectors, each times its singular value
    (the singular values normalised to a vector of length 1), are related to those of the next stage elementwise by
    ``exp(-(a - b)^2 / 8)``; the student's relations are compared with the teacher's. Before that, each of the teacher's
    vectors is matched with the most parallel of the student's first ``num_vectors + 3``, up to sign, which is
    multiplied by the teacher's singular value.

    The matrices are mdistiller's; RepDistiller's are ``(H * W, channels)``, which needs equally many channels in both
    networks. Two ambiguities of the decomposition are resolved here: the largest element of a teacher's vector is
    positive, and the gradient, infinite if singular values coincide, tends to 0 there instead.

    Args:
        student: at least two maps ``(B, channels, H, W)``, shallow to deep.
        teacher: as many maps; if sizes differ, the larger map is average-pooled to the smaller.
        weight: factor on the term.
        num_vectors: number of singular vectors of each map that are compared; at most those of the smallest map.

    Returns:
        ``{"kdsvd": weight * KDSVD}``. It has no second derivative.

    Raises:
        ValueError: invalid maps or hyper-parameters.
    """
    check_pairs(student, teacher)
    _check_sizes([feature.shape for feature in (*student, *teacher)], len(student), num_vectors)
    stages = [
        _aligned_vectors(*pool_to_smaller(ours, theirs.detach()), num_vectors)
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    distances = []
    for shallow, deep in pairwise(stages):
        ours, theirs = (_relations(a, b) for a, b in zip(shallow, deep, strict=True))
        distances.append((ours - theirs).square().sum() / len(ours))
    return {"kdsvd": weight * total(distances)}


def _check_sizes(shapes: Sequence[torch.Size], num_stages: int, num_vectors: int) -> None:
    if num_stages < 2:
        raise ValueError("KDSVD relates neighbouring stages and needs at least two of them, got one.")
    for shape in shapes:
        if len(shape) != 4:
            raise ValueError(f"KDSVD compares maps (B, channels, H, W), got {tuple(shape)}.")
    fewest = min(min(channels * height, width) for _, channels, height, width in shapes)
    if num_vectors > fewest:
        raise ValueError(f"num_vectors={num_vectors!r} is not allowed; the smallest map has {fewest} singular vectors.")


def _relations(shallow: Tensor, deep: Tensor) -> Tensor:
    """Relates all elements of two stages' vectors: ``(B, W, n)`` and ``(B, V, n)`` to ``(B, V, W, n)``."""
    return (-(deep.unsqueeze(2) - shallow.unsqueeze(1)).square() / 8).exp()


def _aligned_vectors(student: Tensor, teacher: Tensor, num_vectors: int) -> tuple[Tensor, Tensor]:
    """Returns both networks' right singular vectors times the teacher's singular values, ``(B, W, n)``."""
    # Right singular vectors are the eigenvectors of a small Gram matrix (W, W); one batched call for both networks.
    gram, teacher_gram = (_columns_gram(feature) for feature in (student, teacher))
    squares, vectors = torch.linalg.eigh(where_it_runs("_linalg_eigh", torch.cat([gram.detach(), teacher_gram])))
    squares, vectors = squares.to(gram.device), vectors.to(gram.device)
    (squares, teacher_squares), (vectors, teacher_vectors) = squares.chunk(2), vectors.chunk(2)

    # Eigenvalues come in ascending order.
    theirs = teacher_vectors[..., -num_vectors:].flip(-1)
    peak = theirs.gather(1, theirs.abs().argmax(1, keepdim=True))
    theirs = torch.where(peak < 0, -theirs, theirs)
    strength = F.normalize(teacher_squares[:, -num_vectors:].flip(-1).clamp(min=0).sqrt(), dim=1).unsqueeze(1)

    rank = min(student.shape[1] * student.shape[2], student.shape[3])
    candidates = slice(-min(num_vectors + SPARE_VECTORS, rank), None)
    cosine = vectors[..., candidates].mT @ theirs
    chosen = cosine.abs().argmax(1, keepdim=True)
    ours = vectors[..., candidates].gather(2, chosen.expand_as(theirs))
    ours = torch.where(cosine.gather(1, chosen) < 0, -ours, ours)
    square = squares[:, candidates].gather(1, chosen.squeeze(1))
    return _with_gradient(ours, square, gram, squares, vectors) * strength, theirs * strength


def _columns_gram(feature: Tensor) -> Tensor:
    matrix = feature.flatten(1, 2)
    return matrix.mT @ matrix


def _with_gradient(chosen: Tensor, square: Tensor, gram: Tensor, squares: Tensor, vectors: Tensor) -> Tensor:
    """Attaches the gradient of ``gram`` to eigenvectors.

    To first order an eigenvector ``v`` of eigenvalue ``x`` changes by the sum over the other eigenvectors of
    ``v_i (v_i . dG v) / (x - x_i)``. The derivative of ``eigh`` is the same, but infinite if two eigenvalues coincide,
    which happens in every map with a dead (all-zero) part.

    Args:
        chosen: ``(B, W, n)``, the eigenvectors.
        square: ``(B, n)``, their eigenvalues.
        gram: ``(B, W, W)``, carries the gradient.
        squares: ``(B, W)``, all eigenvalues, ascending.
        vectors: ``(B, W, W)``, all eigenvectors.
    """
    largest = squares[:, -1, None, None].clamp(min=torch.finfo(squares.dtype).tiny)
    gap = (square.unsqueeze(1) - squares.unsqueeze(2)) / largest
    inverse = gap / (gap.square() + SMALLEST_GAP**2) / largest
    movement = (gram - gram.detach()) @ chosen  # a zero that carries the gradient
    return chosen + vectors @ (inverse * (vectors.mT @ movement))


@register_loss("kdsvd")
class KDSVDLoss(FeatureLoss):
    """``ce_weight * CE + weight * KDSVD`` on all stages but the stem; see :func:`kdsvd_loss`.

    If one network has more stages than the other, the deepest are compared; the published code pairs them from the
    shallow end, where their sizes do not match.

    The decompositions synchronise with a GPU, because they report errors to the host.
    """

    method = "Singular vectors of neighbouring stages"
    papers = ("ECCV 2018",)
    function = staticmethod(kdsvd_loss)

    weight: Weight = 1.0
    num_vectors: Count = 1

    def paths(self, stages: Stages) -> tuple[str, ...]:
        """Returns the stages without the stem."""
        return stages.features[1:]

    def build(self, student_shapes: Sequence[torch.Size], teacher_shapes: Sequence[torch.Size]) -> None:
        """Builds nothing; raises ``ValueError`` early for invalid maps."""
        _check_sizes([*student_shapes, *teacher_shapes], len(student_shapes), self.num_vectors)
