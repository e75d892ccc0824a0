"""Teachers that others have trained and published: where they are, and what their papers say that they score."""

from collections.abc import Mapping

from rld_lightning.models.registry import canonical_name

PUBLISHED_URL = "https://github.com/megvii-research/mdistiller/releases/download/checkpoints/cifar_teachers.tar"
PUBLISHED_DATASET = "cifar100"
PUBLISHED_CLASSES = 100

PUBLISHED: Mapping[str, float] = {
    "resnet56": 72.34,
    "resnet110": 74.31,
    "resnet32x4": 79.42,
    "ResNet50": 79.34,
    "wrn_40_2": 75.61,
    "vgg13": 74.64,
}
"""The teachers in the archive by their names there, with the top-1 in percent that the papers that use them print."""

PUBLISHED_SHA256: Mapping[str, str] = {
    "resnet32x4": "22aa12e2b632b19ddde155ccf2388671842ddd304824b3095e0a7fff364beb4f",
}
"""Checksums of members of the archive, as far as others have published them with the accuracy that they measured.

Its authors name none. What is downloaded first is recorded, and compared with what comes later."""

LARGER: Mapping[str, float] = {"wrn_28_2": 75.45, "wrn_16_4": 77.51, "wrn_28_4": 78.60}
"""Teachers of CIFAR-100 that LSKD (Sun et al., CVPR 2024, arXiv 2403.01427) released beside its code, likewise."""


def published_top1(dataset: str, name: str) -> float | None:
    """What the published teacher of a name scores on the test split, in percent; None where there is none.

    The values are those that LSKD (arXiv 2403.01427) prints for its teachers.

    Args:
        name: the network, however it is spelled.
    """
    if dataset != PUBLISHED_DATASET:
        return None
    return {canonical_name(known): top1 for known, top1 in {**PUBLISHED, **LARGER}.items()}.get(canonical_name(name))
