"""Image classifiers of transformers, by Hugging Face Hub identifier or local folder."""

from typing import Any

from torch import nn

from rld_lightning.models.imported import check_trusted, with_logits

PREFIX = "transformers/"


def transformers_model(name: str, num_classes: int, pretrained: bool = False) -> nn.Module:
    """Creates a classifier; remote code shipped with the weights is not run.

    Args:
        name: ``transformers/google/vit-base-patch16-224``, or ``transformers//my/folder``.
        num_classes: C; if the pretrained weights have another number, the classifier is fresh.
        pretrained: whether to load the pretrained weights; otherwise weights are random.

    Raises:
        ImportError: transformers is not installed.
        OSError: there is no such model, or it cannot be downloaded.
    """
    identifier = _identifier(name)
    from transformers import AutoModelForImageClassification

    if pretrained:
        model = AutoModelForImageClassification.from_pretrained(
            identifier, num_labels=num_classes, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    else:
        config = _config(name)
        config.num_labels = num_classes
        model = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    return with_logits(model)


def transformers_input(name: str) -> tuple[tuple[float, ...], tuple[float, ...], int] | None:
    """Returns the input that a model expects: mean, standard deviation, and the height and width of images."""
    identifier = _identifier(name)
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        processor: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(identifier)[0]
    except OSError:  # no image processor is published
        return None
    size = processor.get("crop_size") if processor.get("do_center_crop") else processor.get("size")
    sides = list(size.values()) if isinstance(size, dict) else [size]
    if not sides or not isinstance(sides[0], int):
        return None
    if not processor.get("do_normalize", True):
        return (0.0,) * 3, (1.0,) * 3, sides[0]
    mean, std = processor.get("image_mean"), processor.get("image_std")
    return (tuple(mean), tuple(std), sides[0]) if mean and std else None


def transformers_classes(name: str) -> list[str]:
    """Returns the class names, in the order of the logits."""
    names = _config(name).id2label
    return [str(names[number]) for number in sorted(names)]


def _config(name: str) -> Any:
    identifier = _identifier(name)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(identifier, trust_remote_code=False)  # the default asks at the terminal


def _identifier(name: str) -> str:
    check_trusted(name)
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'transformers/ models need transformers: pip install "rld-lightning[transformers]"'
        ) from error
    return name.removeprefix(PREFIX)
