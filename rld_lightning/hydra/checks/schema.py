"""The allowed values of each key in ``conf/``.

A table of plain functions, which costs nothing at startup: all mistakes of a command are reported at once, before
PyTorch Lightning is imported (:mod:`rld_lightning.hydra.checks.values`). The arguments of ``_target_`` classes are
checked by :mod:`rld_lightning.hydra.checks.targets`.
"""

import re
from collections.abc import Mapping

from rld_lightning.hydra.checks.value_kinds import (
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
    whole,
    words,
)
from rld_lightning.limits import LARGEST_RESIZE, LARGEST_SIDE, SEEDS

_WEIGHTS = "the directory of a run or of an export, student.safetensors, or a checkpoint"
_SEED = whole(0, SEEDS - 1)
_CLASS = Kind(
    "the import path of a class", lambda value: isinstance(value, str) and bool(re.fullmatch(r"\w+(\.\w+)+", value))
)
_LIMIT = Kind(
    "a number of batches, or a share of them such as 0.1",
    lambda value: (is_whole(value) and value >= 0) or (isinstance(value, float) and 0 <= value <= 1),
)
_TIME = Kind(
    "a time in days:hours:minutes:seconds such as 00:12:00:00",
    lambda value: isinstance(value, str) and bool(re.fullmatch(r"\d+(:\d\d){3}", value.strip())),
)
_SIDE, _RESIZE = whole(1, LARGEST_SIDE), whole(1, LARGEST_RESIZE)
_THREE = list_of(FINITE, "three numbers", 3)
_DEVICES = Kind(
    "auto, a number of devices, or a list of them such as [0,1]",
    lambda value: (
        (is_whole(value) and (value > 0 or value == -1))
        or (isinstance(value, str) and bool(re.fullmatch(r"auto|-1|\d+(,\d*)*", value)) and value != "0")
        or (isinstance(value, list) and bool(value) and all(is_whole(device) and device >= 0 for device in value))
    ),
)
# W&B refuses other names only after the run has started.
WANDB_PROJECT = Kind(
    r"the name of a project, at most 128 characters and none of / \ # ? % : in it (the user or team is entity)",
    lambda value: TEXT.allows(value) and len(value) <= 128 and not set(value) & set("/\\#?%:"),
)
WANDB_ENTITY = Kind(
    "the name of a user or a team (the project is project)", lambda value: TEXT.allows(value) and "/" not in value
)
_TAG = Kind("a tag", lambda value: value is None or isinstance(value, str | int | float))

_BATCH = COUNT | Kind("auto, for one that suits the device and the number of images", lambda value: value == "auto")

# By full key; keys that a configuration lacks are not checked.
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
    "model.student.weights": TEXT.such_as(_WEIGHTS) | NULL,
    "model.student.channels_last": FLAG,
    "model.teacher": KEYS.such_as("model.teacher.name=resnet56") | NULL,
    "model.teacher.name": TEXT.such_as("resnet56, or resnet56+wrn40_2 of an ensemble") | NULL,
    "model.teacher.weights": TEXT.such_as(f"{_WEIGHTS}; or auto, fit, published or pretrained")
    | list_of(TEXT, "files, whose teachers teach together"),
    "model.teacher.mean_of": words("logits", "probabilities"),
    "model.teacher.class_map": KEYS.such_as("{cat:tabby,dog:207}") | TEXT.such_as("a file of lines cat,tabby") | NULL,
    "model.teacher.image_size": _SIDE | words("auto") | NULL,
    "model.teacher.start": TEXT.such_as(f"{_WEIGHTS}; or pretrained") | NULL,
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
    "data.name": Kind(
        "a name without slashes, such as data.name=flowers",
        lambda value: isinstance(value, str) and bool(value.strip(" .")) and not {"/", "\\"} & set(value),
    )
    | NULL,
    "data.url": TEXT.such_as("data.url=file:///downloads/cifar-100-python.tar.gz") | NULL,
    "data.download": FLAG,
    "data.batch_size": _BATCH,
    "data.eval_batch_size": COUNT | NULL,
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
    "data.image_size": _SIDE | NULL,
    "data.resize": _RESIZE | NULL,
    "data.scale": list_of(SHARE, "two numbers > 0 and <= 1, the smaller first", 2),
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
    "trainer.max_time": _TIME | KEYS | NULL,
    "trainer.check_val_every_n_epoch": COUNT | NULL,
    "trainer.val_check_interval": _LIMIT | _TIME | NULL,
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
    # callbacks and loggers
    "callbacks": Kind(
        "a group such as callbacks=default, of which single ones are switched off with callbacks.<name>=null",
        KEYS.allows,
    ),
    "logger": KEYS,
    "logger.csv": KEYS.such_as("logger=csv, which is required: reports, curves and resume read its metrics.csv"),
    "logger.wandb.mode": words("online", "offline", "disabled", "shared") | NULL,
    "logger.wandb.project": WANDB_PROJECT,
    "logger.wandb.entity": WANDB_ENTITY | NULL,
    "logger.wandb.tags": TEXT | list_of(_TAG, "tags such as [first,second]") | NULL,
    "logger.wandb.log_model": FLAG,
    "logger.wandb.watch": words("gradients", "parameters", "all") | NULL,
    "logger.wandb.watch_every": COUNT,
    "logger.wandb.answer_timeout": POSITIVE,
    "logger.wandb.init_timeout": POSITIVE,
    "logger.wandb.finish_timeout": POSITIVE,
    # paths
    "paths": KEYS,
    "paths.data": TEXT,
    "paths.runs": TEXT,
    "paths.teachers": TEXT,
    "paths.run": TEXT,
    # scripts that do not train
    "run": TEXT.such_as("run=runs/..., the directory of a finished run"),
    "formats": list_of(words("safetensors", "onnx", "onnx_int8", "torch_export"), "formats in brackets").such_as(
        "[safetensors,onnx,onnx_int8,torch_export]"
    ),
    "checkpoint": words("last", "best"),
    "pixels": FLAG,
    "val_images": whole(0) | NULL,
    "train_images": COUNT,
    "any_size": FLAG,
    "root": TEXT | NULL,
    "images": TEXT.such_as("images=/photos, or - for a list on standard input") | list_of(TEXT, "several in brackets"),
    "backends": list_of(words("eager", "compiled", "onnx", "onnx_int8"), "backends in brackets").such_as(
        "[eager,compiled,onnx,onnx_int8]"
    ),
    "batch_sizes": list_of(COUNT, "whole numbers >= 1 in brackets").such_as("[1,64]"),
    "seconds": POSITIVE,
    "threads": COUNT | NULL,
    "teacher": TEXT.such_as(_WEIGHTS) | NULL,
    "port": whole(0, 65535),
    "top": COUNT,
    "format": words("table", "csv", "jsonl"),
    "batch_size": COUNT,
    "num_workers": whole(0) | NULL,
    "device": words("auto", "cpu", "cuda", "mps"),
    "class_names": TEXT | list_of(TEXT, "names in brackets") | NULL,
    "image_size": _SIDE | NULL,
    "resize": _RESIZE | NULL,
    "interpolation": words("bilinear", "bicubic") | NULL,
    "mean": _THREE | NULL,
    "std": list_of(POSITIVE, "three numbers > 0", 3) | NULL,
    "weights": TEXT.such_as(_WEIGHTS),
    "name": TEXT | NULL,
    "trust": TEXT.such_as("my_package.module:build") | list_of(TEXT, "names in brackets") | NULL,
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
