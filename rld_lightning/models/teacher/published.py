"""Published teachers: where to download them, and their accuracies in the literature."""

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
"""The teachers in the archive by their names there, with the top-1 in percent printed in the papers that use them."""

PUBLISHED_SHA256: Mapping[str, str] = {
    "resnet32x4": "22aa12e2b632b19ddde155ccf2388671842ddd304824b3095e0a7fff364beb4f",
}
"""Checksums of files in the archive, as far as third parties have published them with a measured accuracy.

The archive's authors publish none. The first download is recorded, and later ones are compared with it."""

LARGER: Mapping[str, float] = {"wrn_28_2": 75.45, "wrn_16_4": 77.51, "wrn_28_4": 78.60}
"""Likewise for the CIFAR-100 teachers that LSKD (Sun et al., CVPR 2024, arXiv 2403.01427) released with its code."""


def published_top1(dataset: str, name: str) -> float | None:
    """Returns the test accuracy of a published teacher in percent; None if there is none.

    The values are those that LSKD (arXiv 2403.01427) prints for its teachers.

    Args:
        name: the network, in any spelling.
    """
    if dataset != PUBLISHED_DATASET:
        return None
    return {canonical_name(known): top1 for known, top1 in {**PUBLISHED, **LARGER}.items()}.get(canonical_name(name))
