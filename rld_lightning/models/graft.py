"""A student that uses its teacher's classifier (SimKD): Chen et al., CVPR 2022, arXiv 2203.14001."""

from copy import deepcopy

from torch import Tensor, nn

from rld_lightning.models.layers import conv
from rld_lightning.models.stages import Stages, classifier_of, stages_of
from rld_lightning.models.taps import forward_with_taps, unwrap


class GraftedStudent(nn.Module):
    """A backbone whose deepest map is projected to the teacher's width, averaged and classified by the teacher's layer.

    ``logits = classifier(mean over positions of projector(map))``. The projector is a 1x1, a 3x3 and a 1x1
    convolution without biases, each followed by batch norm and ReLU, with half of the classifier's width in between.
    The classifier is frozen, but saved with the rest, since it is needed at test time.

    The map is the last one. If a 1x1 convolution only widens it for the network's own classifier (ShuffleV2,
    MobileNetV2), that convolution is removed, as in the published code; networks of the libraries keep theirs.

    The published code pools a map larger than the teacher's to the teacher's size before the projector; here the
    projector runs at the network's own resolution, so that the network can be built and used without its teacher.

    Args:
        backbone: a network whose stages name a last map; modified: loses its own classifier.
        classifier: the layer to use; modified: frozen.

    Raises:
        ValueError: the backbone's classifier is not one linear layer whose input is the average of a map, or the
            backbone is already grafted.
    """

    def __init__(self, backbone: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        backbone = unwrap(backbone)
        if isinstance(backbone, GraftedStudent):
            raise ValueError("the student already ends in another network's classifier; graft a plain network.")
        own = stages_of(backbone)
        if not own.last_map:
            raise ValueError(
                f"{type(backbone).__name__} does not classify the average of a map, so no other classifier can be put "
                "behind its last map; choose another student."
            )
        channels, width = _channels_before(own, backbone), classifier.in_features
        for path in (*own.widening, own.pooled.removesuffix(":in")):
            backbone.set_submodule(path, nn.Identity())
        self._last_map = own.last_map
        self.stages = Stages(
            features=_inside(own.features),
            preactivations=_inside(own.preactivations),
            pooled="classifier:in",
            last_map="projector",
            norms=_inside(own.norms),
        )
        self.backbone = backbone
        self.projector = nn.Sequential(
            *_conv_norm_relu(channels, width // 2, 1),
            *_conv_norm_relu(width // 2, width // 2, 3),
            *_conv_norm_relu(width // 2, width, 1),
        )
        self.classifier = classifier.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``(B, 3, H, W)`` to logits ``(B, C)``."""
        _, features = forward_with_taps(self.backbone, images, [self._last_map])
        return self.classifier(self.projector(features[self._last_map]).mean((2, 3)))


def graft(student: nn.Module, teacher: nn.Module) -> GraftedStudent:
    """Returns the student with a fresh projector and a frozen copy of the teacher's classifier.

    Args:
        student: modified, not copied; loses its own classifier.
        teacher: not changed.

    Raises:
        ValueError: see :class:`GraftedStudent`; also for the teacher's classifier.
    """
    like = next(student.parameters())
    classifier = deepcopy(classifier_of(teacher)).train()
    classifier.__class__ = nn.Linear  # not the FrozenTeacher's, which ignores autocast
    return GraftedStudent(student, classifier).to(like)


def _channels_before(stages: Stages, network: nn.Module) -> int:
    """Returns the width of the grafted map: the input width of the first widening layer, else of the classifier."""
    if not stages.widening:
        return classifier_of(network).in_features
    first = network.get_submodule(stages.widening[0])
    return next(layer.in_channels for layer in first.modules() if isinstance(layer, nn.Conv2d))


def _conv_norm_relu(in_channels: int, out_channels: int, kernel: int) -> tuple[nn.Module, ...]:
    return conv(in_channels, out_channels, kernel), nn.BatchNorm2d(out_channels), nn.ReLU()


def _inside(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"backbone.{path}" for path in paths)
