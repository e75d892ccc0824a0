"""Which values each key of ``conf/`` may have, and the check of a composed configuration by it.

It is a table of plain functions, which costs nothing at the start of a program: mistakes are told before PyTorch
Lightning is imported, and those of one command all at once. What classes take that a configuration names is for
:mod:`rld_lightning.hydra.targets`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rld_lightning.errors import UserError, first_line
from rld_lightning.hydra.kinds import (
    BELOW_ONE,
    COUNT,
    FINITE,
    FLAG,
    KEYS,
    NOT_NEGATIVE,
    NULL,
    POSITIVE,
    SHARE,
    TEXT,
    Kind,
    is_whole,
    list_of,
    number,
    shown,
    whole,
    words,
)
from rld_lightning.hydra.options import CONF

_SEED = whole(0, 2**32 - 1)
_CLASS = Kind(
    "the import path of a class", lambda value: isinstance(value, str) and bool(re.fullmatch(r"\w+(\.\w+)+", value))
)
_LIMIT = Kind(
    "a number of batches, or a share of them such as 0.1",
    lambda value: (is_whole(value) and value >= 0) or (isinstance(value, float) and 0 <= value <= 1),
)
_THREE = list_of(FINITE, "three numbers", 3)
_DEVICES = Kind(
    "auto, a number of devices, or a list of them such as [0,1]",
    lambda value: (
        (is_whole(value) and (value > 0 or value == -1))
        or (isinstance(value, str) and bool(re.fullmatch(r"auto|-1|\d+(,\d*)*", value)) and value != "0")
        or (isinstance(value, list) and bool(value) and all(is_whole(device) and device >= 0 for device in value))
    ),
)

_BATCH = COUNT | Kind("auto, for one that suits the device and the number of images", lambda value: value == "auto")

# By full key; a key that a configuration does not have is not asked for.
VALUES: Mapping[str, Kind] = {
    "seed": _SEED,
    "method": TEXT,
    "dataset": TEXT,
    "resume": TEXT.such_as("resume=runs/.../last.ckpt") | NULL,
    "print_config": words(True, False, "tree"),
    "after": list_of(words("alone", "networks", "export"), "alone, networks and export"),
    # recipe
    "recipe.epochs": COUNT.such_as("recipe.epochs=240"),
    "recipe.batch_size": _BATCH,
    "recipe.scale_lr_from": COUNT.such_as("the batch size that lr is meant for") | NULL,
    "recipe.warmup_epochs": Kind("a whole number >= 1 (1 is no warm-up)", COUNT.allows),
    "recipe.optimizer": KEYS.such_as("recipe.optimizer._target_=torch.optim.AdamW"),
    "recipe.optimizer._target_": _CLASS.such_as("torch.optim.SGD"),
    "recipe.optimizer._partial_": words(True),
    "recipe.optimizer.lr": POSITIVE,
    "recipe.optimizer.momentum": BELOW_ONE,
    "recipe.optimizer.weight_decay": NOT_NEGATIVE,
    "recipe.optimizer.dampening": NOT_NEGATIVE,
    "recipe.optimizer.nesterov": FLAG,
    "recipe.optimizer.betas": list_of(BELOW_ONE, "two numbers >= 0 and < 1", 2),
    "recipe.optimizer.eps": POSITIVE,
    "recipe.scheduler": KEYS.such_as("recipe.scheduler._target_=torch.optim.lr_scheduler.MultiStepLR") | NULL,
    "recipe.scheduler._target_": _CLASS.such_as("torch.optim.lr_scheduler.MultiStepLR"),
    "recipe.scheduler._partial_": words(True),
    "recipe.scheduler.milestones": list_of(COUNT, "whole numbers >= 1").such_as("[150,180,210]"),
    "recipe.scheduler.gamma": POSITIVE,
    "recipe.scheduler.max_lr": POSITIVE,
    "recipe.scheduler.step_size": COUNT,
    "recipe.scheduler.T_max": COUNT,
    "recipe.scheduler.T_0": COUNT,
    "recipe.scheduler.eta_min": NOT_NEGATIVE,
    "recipe.scheduler.factor": number("> 0 and < 1", lambda value: 0 < value < 1),
    "recipe.scheduler.patience": whole(0),
    "recipe.scheduler.pct_start": number(">= 0 and <= 1", lambda value: 0 <= value <= 1),
    "recipe.scheduler.total_steps": COUNT | NULL,
    "recipe.scheduler_interval": words("epoch", "step"),
    "recipe.scheduler_monitor": TEXT | NULL,
    # model
    "model.label": TEXT,
    "model.compile": words("auto", True, False),
    "model.capture": words("auto", True, False),
    "model.tuned": KEYS | NULL,
    "model.student": KEYS.such_as("model.student.name=resnet20"),
    "model.student.name": TEXT.such_as("resnet20") | NULL,
    "model.student.weights": TEXT.such_as("a file") | NULL,
    "model.student.channels_last": FLAG,
    "model.teacher": KEYS.such_as("model.teacher.name=resnet56") | NULL,
    "model.teacher.name": TEXT.such_as("resnet56") | NULL,
    "model.teacher.weights": TEXT.such_as("a file, auto, fit, published or pretrained")
    | list_of(TEXT, "files, whose teachers teach together"),
    "model.teacher.mean_of": words("logits", "probabilities"),
    "model.teacher.class_map": KEYS.such_as("{cat:tabby,dog:207}") | TEXT.such_as("a file of lines cat,tabby") | NULL,
    "model.teacher.image_size": COUNT | words("auto") | NULL,
    "model.teacher.start": TEXT.such_as("a file, or pretrained") | NULL,
    "model.teacher.sha256": TEXT | NULL,
    "model.teacher.published_url": TEXT,
    "model.teacher.mean": _THREE | NULL,
    "model.teacher.std": list_of(POSITIVE, "three numbers > 0", 3) | NULL,
    "model.teacher.cache": words("auto", True, False, "fill"),
    "model.teacher.cache_dtype": words("float16", "float32"),
    "model.teacher.dtype": words("float16", "bfloat16", "float32", "float64") | NULL,
    "model.teacher.channels_last": FLAG,
    "model.teacher.fuse": words("auto", True, False),
    "model.teacher.shard": FLAG,
    # data
    "data.root": TEXT.such_as("data.root=/photos"),
    "data.batch_size": _BATCH,
    "data.eval_batch_size": COUNT,
    "data.val_fraction": Kind(
        "a number >= 0 and < 1 (0 validates on the test split, 0.1 holds out a tenth of the training split)",
        BELOW_ONE.allows,
    ),
    "data.test_fraction": number("> 0 and < 1", lambda value: 0 < value < 1).such_as("0.2 for a fifth of the images"),
    "data.subset": Kind("a number > 0 and <= 1 (1 trains on all images, 0.01 on a hundredth of them)", SHARE.allows),
    "data.seed": _SEED,
    "data.augment": FLAG,
    "data.flip": FLAG,
    "data.shuffle": FLAG,
    "data.drop_last": FLAG,
    "data.image_size": COUNT | NULL,
    "data.resize": COUNT | NULL,
    "data.padding": whole(0),
    "data.mean": _THREE | NULL,
    "data.std": list_of(POSITIVE, "three numbers > 0", 3) | NULL,
    "data.num_workers": Kind("a whole number >= 0 (0 decodes in the training process itself)", whole(0).allows),
    "data.decode": words("auto", "pil", "cuda"),
    "data.bad_images": words("replace", "error"),
    "data.bad_images_file": TEXT | NULL,
    "data.split_file": TEXT | NULL,
    "data.mixed_shards": COUNT | NULL,
    "data.streams": COUNT,
    "data.cache": TEXT,
    "data.cache_gb": NOT_NEGATIVE,
    "data.storage_options": KEYS | NULL,
    # trainer
    "trainer.max_epochs": COUNT,
    "trainer.min_epochs": COUNT | NULL,
    "trainer.max_steps": COUNT | Kind("-1 for no limit", lambda value: is_whole(value) and value == -1),
    "trainer.min_steps": COUNT | NULL,
    "trainer.max_time": TEXT.such_as("00:12:00:00, which is 12 hours") | KEYS | NULL,
    "trainer.check_val_every_n_epoch": COUNT | NULL,
    "trainer.val_check_interval": _LIMIT | NULL | TEXT,
    "trainer.accelerator": words("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    "trainer.devices": _DEVICES,
    "trainer.num_nodes": COUNT,
    "trainer.strategy": TEXT | KEYS,
    "trainer.sync_batchnorm": FLAG,
    "trainer.precision": words(
        *("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"),
        *("transformer-engine", "transformer-engine-float16", "bf16", 16, 32, 64, "16", "32", "64"),
    )
    | NULL,
    "trainer.gradient_clip_val": NOT_NEGATIVE | NULL,
    "trainer.gradient_clip_algorithm": words("norm", "value") | NULL,
    "trainer.accumulate_grad_batches": COUNT,
    "trainer.deterministic": words(True, False, "warn") | NULL,
    "trainer.benchmark": FLAG | NULL,
    "trainer.inference_mode": FLAG,
    "trainer.detect_anomaly": FLAG,
    "trainer.use_distributed_sampler": FLAG,
    "trainer.reload_dataloaders_every_n_epochs": whole(0),
    "trainer.log_every_n_steps": whole(0) | NULL,
    "trainer.num_sanity_val_steps": whole(-1) | NULL,
    "trainer.enable_model_summary": FLAG | NULL,
    "trainer.enable_checkpointing": FLAG | NULL,
    "trainer.enable_progress_bar": FLAG | NULL,
    "trainer.fast_dev_run": FLAG | whole(0),
    "trainer.overfit_batches": _LIMIT,
    "trainer.limit_train_batches": _LIMIT | NULL,
    "trainer.limit_val_batches": _LIMIT | NULL,
    "trainer.limit_test_batches": _LIMIT | NULL,
    "trainer.limit_predict_batches": _LIMIT | NULL,
    "trainer.default_root_dir": TEXT | NULL,
    "trainer.profiler": TEXT | KEYS | NULL,
    # who watches
    "callbacks": Kind(
        "a group such as callbacks=default, of which single ones are switched off with callbacks.<name>=null",
        KEYS.allows,
    ),
    "logger": KEYS,
    "logger.csv": KEYS.such_as("logger=csv, which is always there: reports, curves and going on read its metrics.csv"),
    "logger.wandb.mode": words("online", "offline", "disabled", "shared") | NULL,
    # places
    "paths": KEYS,
    "paths.data": TEXT,
    "paths.runs": TEXT,
    "paths.teachers": TEXT,
    "paths.run": TEXT,
    # scripts that train nothing
    "run": TEXT.such_as("run=runs/..., the folder of a finished run"),
    "formats": list_of(words("safetensors", "onnx", "onnx_int8", "torch_export"), "formats in brackets").such_as(
        "[safetensors,onnx,onnx_int8,torch_export]"
    ),
    "pixels": FLAG,
    "val_images": whole(0) | NULL,
    "train_images": COUNT,
    "root": TEXT | NULL,
    "images": TEXT.such_as("images=/photos, or - for a list on standard input") | list_of(TEXT, "several in brackets"),
    "backends": list_of(words("eager", "compiled", "onnx", "onnx_int8"), "backends in brackets").such_as(
        "[eager,compiled,onnx,onnx_int8]"
    ),
    "batch_sizes": list_of(COUNT, "whole numbers >= 1 in brackets").such_as("[1,64]"),
    "seconds": POSITIVE,
    "threads": COUNT | NULL,
    "teacher": TEXT.such_as("a file") | NULL,
    "port": whole(0, 65535),
    "top": COUNT,
    "format": words("table", "csv", "jsonl"),
    "batch_size": COUNT,
    "num_workers": whole(0) | NULL,
    "device": words("auto", "cpu", "cuda", "mps"),
    "class_names": TEXT | list_of(TEXT, "names in brackets") | NULL,
    "image_size": COUNT | NULL,
    "resize": COUNT | NULL,
    "interpolation": words("bilinear", "bicubic") | NULL,
    "mean": _THREE | NULL,
    "std": list_of(POSITIVE, "three numbers > 0", 3) | NULL,
    "weights": TEXT.such_as("weights=runs/.../student.safetensors"),
    "name": TEXT | NULL,
    "split": words("test", "val"),
    "out": TEXT,
    "shard_mb": POSITIVE,
    "storage_options": KEYS | NULL,
    "index": KEYS,
    "index.train": TEXT | NULL,
    "index.test": TEXT | NULL,
    "index.val": TEXT | NULL,
    "index.class_names": TEXT | NULL,
    "index.name": TEXT | NULL,
}
# What a run cannot do without, whatever ~key takes away.
_OF_FIT = (
    *("seed", "method", "resume", "print_config", "model.label", "model.compile", "model.capture", "model.teacher"),
    *("model.student.name", "model.student.weights", "model.student.channels_last", "data.batch_size"),
    *("recipe.epochs", "recipe.optimizer", "recipe.optimizer._target_", "recipe.optimizer.lr"),
    *("recipe.scheduler_interval", "callbacks", "logger", "logger.csv"),
)
_OF_ALL = ("paths.run",)
_OF_DATA = ("data",)  # of those that look at images by themselves
_OF_NETWORKS = ("trainer",)  # and run a network on them
# Groups whose keys the package reads by name; what classes take is for their signatures.
_NAMED = ("", "recipe", "model", "model.student", "model.teacher", "paths")
_GROUPS = {key[:end] for key in VALUES for end in (*(dot.start() for dot in re.finditer(r"\.", key)), None)}
_GROUPS |= {"hydra", "loss"}
_OURS = "${fast_precision:"  # always right, and asks PyTorch
_ABSENT, _MISSING = "<absent>", "???"


def check_values(cfg: DictConfig) -> None:
    """Looks whether the values of a composed configuration can be what they are meant to be.

    Args:
        cfg: of any script; interpolations that only a running Hydra can answer are left out without one.

    Raises:
        UserError: a sentence for each mistake.
    """
    values = cast(dict[str, Any], OmegaConf.to_container(cfg))
    wrong, empty = _wrong_values(cfg, values)
    if faults := [*wrong, *_missing(values), *_unknown(values)] or empty:
        raise UserError("\n".join(dict.fromkeys(faults)))


def _wrong_values(cfg: DictConfig, values: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Sentences for values that are not allowed; and for those that there are not, which others may have caused."""
    wrong, empty, told = [], [], []
    for key, kind in VALUES.items():
        raw = _find(values, key)
        if isinstance(raw, str) and raw.startswith(_OURS):
            continue
        try:
            value = _resolved(cfg, key) if _refers(raw) else raw
        except OmegaConfBaseException as error:
            if "HydraConfig was not set" not in str(error):
                empty.append(f"{key} has no value: {first_line(error)}.")
            continue
        if value == _MISSING:
            empty.append(f"{key} has no value; add {key}=... to the command.")
        elif not (value == _ABSENT or kind.allows(value) or (value is None and _may_be_open(key, values))):
            if not isinstance(raw, str) or not _refers(raw) or value not in told:  # of another key, which has been told
                wrong.append(f"{key}={shown(value)} is not allowed; it must be {kind.must_be}.")
            told.append(value)
    return wrong, empty


def _may_be_open(key: str, values: Mapping[str, Any]) -> bool:
    """Whether null means that somebody else decides: Lightning, or the file that a script measures."""
    if key.startswith("trainer."):
        return key not in ("trainer.max_epochs", "trainer.max_steps", "trainer.accelerator", "trainer.devices")
    return key in (_LEFT_OPEN if "recipe" not in values else ()) or (key == "out" and "index" not in values)


# Options that scripts which train nothing leave to the file that they look at.
_LEFT_OPEN = ("seed", "data.seed", "data.val_fraction")


def _missing(values: Mapping[str, Any]) -> Iterator[str]:
    networks = "model" in values or "split" in values
    others = (*(_OF_DATA if networks or "index" in values else ()), *(_OF_NETWORKS if networks else ()))
    for key in (*_OF_ALL, *others, *(_OF_FIT if "model" in values else ())):
        group, _, name = key.rpartition(".")
        above = _find(values, group) if group else values
        if isinstance(above, Mapping) and name not in above:
            kind = VALUES.get(key)
            must_be = f"; it must be {kind.must_be}" if kind else ""
            yield f"{key} is missing, and cannot be done without: leave ~{key} away{must_be}."


def _unknown(values: Mapping[str, Any]) -> Iterator[str]:
    """Keys that nothing reads and that are like those which are read, of ``+recipe.epoch=3`` or a file of one's own."""
    added = []
    for group in _NAMED:
        node = _find(values, group) if group else values
        names = map(str, node) if isinstance(node, Mapping) else ()
        added += [key for key in (f"{group}.{name}".lstrip(".") for name in names) if key not in _GROUPS]
    references = _references(values) if added else set()
    shipped = _shipped_keys() if added else set()
    for key in added:
        if key not in shipped and not any(
            f"{other}.".startswith((f"{key}.", f"{key.rpartition('.')[2]}.")) for other in references
        ):
            sentence, meant = unknown_key(key, VALUES)
            if meant:
                yield sentence


def _shipped_keys() -> set[str]:
    """The full keys in the package's own files, but for those of experiments."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    keys = set()
    for group in ("", "model", "recipe", "paths"):
        for file in (CONF / group).glob("*.yaml"):
            keys |= set(_keys(yaml.load(file.read_text(), loader) or {}, f"{group}." if group else ""))
    return keys


def _keys(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{name}.")


def unknown_key(key: str, known: Iterable[str]) -> tuple[str, list[str]]:
    """A sentence that says that a key is not known, and the keys that may have been meant.

    Args:
        key: the full key.
        known: all full keys that there are.
    """
    if options := _options_with(key):
        return f"{key} is not known, for want of {' or '.join(options[:3])}; add one to the command.", options
    known = list(known)
    group, _, name = key.rpartition(".")
    names = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == group}
    meant = [names[near] for near in get_close_matches(name, names, n=2, cutoff=0.7)] if group else []
    # What is nearly the name of a key in another group was hardly meant by who has named a group.
    meant = meant or _near_leaves(name, known, 1.0 if names and group else 0.8)
    meant = meant or ([] if names and group else get_close_matches(key, known, n=2, cutoff=0.8))
    if meant:
        return f"{key} is not known. Did you mean {' or '.join(meant)}?", meant
    if group and names:
        return f"{key} is not known; {group} has {', '.join(sorted(names))}.", []
    return f"{key} is not known; `--cfg all` prints all keys.", []


def _options_with(key: str) -> list[str]:
    """Options, as they are chosen, whose file has a full key: ``logger=wandb`` of ``logger.wandb.project``."""
    group = key.partition(".")[0]
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = []
    for file in (CONF / group).glob("*.yaml") if re.fullmatch(r"\w+", group) else ():
        text = file.read_text()
        prefix = "" if text.startswith("# @package _global_") else f"{group}."
        if key in _keys(yaml.load(text, loader) or {}, prefix):
            found.append(f"{group}={file.stem}")
    return sorted(found, key=len)


def _near_leaves(name: str, known: Iterable[str], cutoff: float) -> list[str]:
    """Full keys that end in a name, or nearly; what is tuned for a loss is not meant."""
    leaves: dict[str, str] = {}
    for key in known:  # the first of a name is what most mean by it
        if not key.startswith("model.tuned."):
            leaves.setdefault(key.rpartition(".")[2], key)
    return [leaves[near] for near in get_close_matches(name, leaves, n=2, cutoff=cutoff)]


def _references(values: Any) -> set[str]:
    """The keys that interpolations anywhere in a configuration name, without leading dots."""
    if isinstance(values, Mapping):
        return {name for value in values.values() for name in _references(value)}
    if isinstance(values, list):
        return {name for value in values for name in _references(value)}
    return {found.lstrip(".") for found in re.findall(r"\$\{(?:[\w.]+:)?([\w.]+)", str(values))}


def _find(values: Any, key: str) -> Any:
    """A value by full key, as it is written; :data:`_ABSENT` where there is no such key."""
    for name in key.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return _ABSENT
        values = values[name]
    return values


def _refers(raw: Any) -> bool:
    """Whether there is an interpolation in a value."""
    if isinstance(raw, list):
        return any(map(_refers, raw))
    return isinstance(raw, str) and "${" in raw


def _resolved(cfg: DictConfig, key: str) -> Any:
    value = OmegaConf.select(cfg, key, throw_on_resolution_failure=True)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
