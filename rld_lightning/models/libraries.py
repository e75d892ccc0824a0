"""Networks of torchvision, timm and transformers; each library is imported only when it is needed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rld_lightning.errors import first_line
from rld_lightning.models.imported import check_trusted, with_logits
from rld_lightning.models.input_size import split_size

# Packages whose errors are network failures.
_CLIENTS = {"huggingface_hub", "httpx", "requests", "urllib3"}
# With auxiliary classifiers these two return a tuple in training mode. Their published weights were trained on images
# in [-1, 1]; `transform_input` converts to that range. It is always on, because weights files do not record it.
_INCEPTIONS = ("googlenet", "inception_v3")
_INCEPTION_OPTIONS = {"aux_logits": False, "transform_input": True, "init_weights": True}


def torchvision_names() -> list[str]:
    """Lists the names of torchvision's classifiers."""
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def timm_names() -> list[str]:
    """Lists the names of timm's networks.

    Raises:
        ImportError: timm is not installed.
    """
    return _import("timm").list_models()


def torchvision_model(name: str, num_classes: int, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Creates a torchvision network by its torchvision name; arguments as for ``create_model``."""
    import torchvision

    options = (_INCEPTION_OPTIONS if name in _INCEPTIONS else {}) | kwargs
    if not pretrained:
        return _without_inplace(torchvision.models.get_model(name, num_classes=num_classes, **options))
    weights = _published_weights(name)
    with _fetching(f"torchvision/{name}", Path(torch.hub.get_dir()) / "checkpoints"):
        model = torchvision.models.get_model(name, weights=weights, **kwargs)
    if num_classes != len(weights.meta["categories"]) or name in _INCEPTIONS:
        source, model = model.state_dict(), torchvision.models.get_model(name, num_classes=num_classes, **options)
        fitting = {key: source[key] for key, value in model.state_dict().items() if value.shape == source[key].shape}
        model.load_state_dict(fitting, strict=False)
    return _without_inplace(model)


def published_input(name: str) -> tuple[tuple[float, ...], tuple[float, ...], int] | None:
    """Returns the input that a network's pretrained weights expect, as published by its library.

    Args:
        name: ``"torchvision/<name>"``, ``"timm/<name>"`` or ``"transformers/<model>"``.

    Returns:
        the mean and standard deviation of each channel for the normalisation, and the height and width of the images;
        None for other networks, and if the library does not publish them.
    """
    name, _ = split_size(name)
    library, _, plain = name.partition("/")
    if library == "torchvision":
        weights = _published_weights(plain)
        transform = weights.transforms()
        return tuple(transform.mean), tuple(transform.std), transform.crop_size[0]
    if library == "timm" and (config := _import("timm").get_pretrained_cfg(plain)) is not None:
        return tuple(config.mean), tuple(config.std), config.input_size[-1]
    if library == "transformers":
        with _fetching(name, _hub_cache()):
            return _transformers_input(name)
    return None


def published_classes(name: str) -> list[str] | None:
    """Returns the class names of a network's pretrained weights; None for other networks.

    timm does not name them: for its classifiers with 1,000 classes, ImageNet's are returned, ordered by WordNet id.
    """
    name, _ = split_size(name)
    library, _, plain = name.partition("/")
    if library == "torchvision":
        return list(_published_weights(plain).meta["categories"])
    if library == "timm" and (config := _import("timm").get_pretrained_cfg(plain)) is not None:
        return list(_published_weights("resnet18").meta["categories"]) if config.num_classes == 1000 else None
    if library == "transformers":
        with _fetching(name, _hub_cache()):
            names = _transformers_config(name).id2label
        return [str(names[number]) for number in sorted(names)]
    return None


def _published_weights(name: str) -> Any:
    import torchvision

    published = torchvision.models.get_model_weights(name)
    return published.__members__.get("IMAGENET1K_V1", published.DEFAULT)


def _import(library: str) -> Any:
    try:
        return import_module(library)
    except ImportError as error:
        raise ImportError(f'{library}/ models need {library}: pip install "rld-lightning[{library}]"') from error


def timm_model(name: str, num_classes: int, **kwargs: Any) -> nn.Module:
    """Creates a timm network by its timm name; arguments as for ``create_model``.

    Raises:
        ValueError: ``pretrained`` is set and timm has no pretrained weights for the network.
    """
    timm = _import("timm")
    if kwargs.get("pretrained") and not timm.is_model_pretrained(name):  # timm would silently use random ones
        raise ValueError(f"timm has no pretrained weights of {name}; timm.list_pretrained() lists the models that do.")
    with _fetching(f"timm/{name}", _hub_cache()):
        return _without_inplace(timm.create_model(name, num_classes=num_classes, **kwargs))


def transformers_model(name: str, num_classes: int, pretrained: bool = False) -> nn.Module:
    """Creates an image classifier of transformers; remote code shipped with the weights is not run.

    Args:
        name: ``transformers/google/vit-base-patch16-224``, or ``transformers//my/folder``.
        num_classes: C; if the pretrained weights have another number, the classifier is fresh.
        pretrained: whether to load the pretrained weights; otherwise weights are random.

    Raises:
        ImportError: transformers is not installed.
        ConnectionError: there is no such model, or it cannot be downloaded.
    """
    identifier = _hub_identifier(name)
    with _fetching(name, _hub_cache()):
        from transformers import AutoModelForImageClassification

        if pretrained:
            model = AutoModelForImageClassification.from_pretrained(
                identifier, num_labels=num_classes, ignore_mismatched_sizes=True, trust_remote_code=False
            )
        else:
            config = _transformers_config(name)
            config.num_labels = num_classes
            model = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
        return with_logits(_without_inplace(model))


def _transformers_input(name: str) -> tuple[tuple[float, ...], tuple[float, ...], int] | None:
    identifier = _hub_identifier(name)
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


def _transformers_config(name: str) -> Any:
    identifier = _hub_identifier(name)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(identifier, trust_remote_code=False)  # the default asks at the terminal


def _hub_identifier(name: str) -> str:
    check_trusted(name)
    _import("transformers")
    return name.removeprefix("transformers/")


def _hub_cache() -> Path:
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"


@contextmanager
def _fetching(name: str, cache: Path) -> Iterator[None]:
    """Reports a failed download in one sentence; each library raises its own errors for that."""
    try:
        yield
    except Exception as error:
        # OSError is urllib's; a download that was cut short has a wrong checksum.
        of_network = isinstance(error, OSError) or type(error).__module__.split(".")[0] in _CLIENTS
        if not of_network and "invalid hash" not in str(error):
            raise
        raise ConnectionError(
            f"the pretrained weights of {name} are not in {cache} and cannot be fetched ({first_line(error)}): run it "
            "once on a machine with network access and copy that folder, or use other weights (a file, or null for "
            "random ones)."
        ) from error


def _without_inplace(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if getattr(module, "inplace", False):
            setattr(module, "inplace", False)  # noqa: B010 -- mypy knows no such attribute of a Module
    return model
