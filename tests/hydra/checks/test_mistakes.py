"""Mistakes on the command line: each ends in a sentence that names the key, the value and the way out."""

import re
import shlex
from functools import cache

import pytest
from helpers.configs import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from rld_lightning.errors import UserError, user_errors
from rld_lightning.hydra.checks.mistakes import check, checked, with_value
from rld_lightning.hydra.options import list_options


@cache
def base(*groups):
    name = "eval" if "eval" in groups else "fit"
    return compose(*(group for group in groups if group != "eval"), name=name, resolve=False)


def told(command, *groups):
    """The error message for overrides without groups; the groups' config is composed only once."""
    cfg = base(*groups)
    for line in shlex.split(command):
        if line.startswith("~"):
            cfg = with_value(cfg, "seed=0" if "seed" in cfg else "split=test")
            group, _, name = line[1:].rpartition(".")
            (OmegaConf.select(cfg, group) if group else cfg).pop(name)
        else:
            cfg = with_value(cfg, line)
    with pytest.raises(UserError) as error:
        check(cfg)
    return str(error.value)


# Overrides of values, and their error messages.
VALUES = {
    # data
    "data.batch_size=0": r"data\.batch_size=0 is not allowed; it must be a whole number >= 1",
    "data.batch_size=-64": r"data\.batch_size=-64 .* whole number >= 1",
    "data.batch_size=64.5": r"data\.batch_size=64\.5 .* whole number >= 1",
    "data.batch_size=abc": r"data\.batch_size=abc .* whole number >= 1",
    "data.batch_size=null": r"data\.batch_size=null .* whole number >= 1",
    "data.batch_size=true": r"data\.batch_size=true .* whole number >= 1",
    "data.batch_size=[64]": r"data\.batch_size=\[64\] .* whole number >= 1",
    "data.batch_size={a:1}": r"data\.batch_size=\{a:1\} .* whole number >= 1",
    "data.eval_batch_size=0": r"data\.eval_batch_size=0 .* whole number >= 1",
    "data.val_fraction=1": r"data\.val_fraction=1 .* >= 0 and < 1 \(0 validates on the test split",
    "data.val_fraction=-0.1": r"data\.val_fraction=-0\.1 .* >= 0 and < 1",
    "data.val_fraction=10%": r"data\.val_fraction=10% .* a number >= 0 and < 1",
    "data.val_fraction=null": r"data\.val_fraction=null .* a number >= 0 and < 1",
    "data.subset=0": r"data\.subset=0 .* > 0 and <= 1",
    "data.subset=1.5": r"data\.subset=1\.5 .* > 0 and <= 1",
    "data.subset=half": r"data\.subset=half .* > 0 and <= 1",
    "+data.scale=[0,1]": r"data\.scale=\[0, ?1\] .* two numbers > 0 and <= 1",
    "+data.scale=0.5": r"data\.scale=0\.5 .* two numbers > 0 and <= 1",
    "data.augment=maybe": r"data\.augment=maybe .* true or false",
    "data.augment=1": r"data\.augment=1 .* true or false",
    "data.drop_last=none": r"data\.drop_last=none .* true or false",
    "data.root=null": r"data\.root=null .* a text, such as data\.root=/photos",
    "data.seed=-1": r"data\.seed=-1 .* whole number from 0 to",
    # model
    "model.student.channels_last=maybe": r"model\.student\.channels_last=maybe .* true or false",
    "model.teacher.channels_last=null": r"model\.teacher\.channels_last=null .* true or false",
    "model.teacher.fuse=2": r"model\.teacher\.fuse=2 .* true or false",
    "model.teacher.shard=yes_please": r"model\.teacher\.shard=yes_please .* true or false",
    "model.compile=maybe": r"model\.compile=maybe .* true or false",
    "model.teacher.dtype=float": r"model\.teacher\.dtype=float .* float16, bfloat16, float32 or float64, or null",
    "model.teacher.dtype=16": r"model\.teacher\.dtype=16 .* float16",
    "model.teacher.weights=null": r"model\.teacher\.weights=null .* checkpoint; or auto, fit, published or pretrained",
    "model.teacher.weights=true": r"model\.teacher\.weights=true .* checkpoint; or auto, fit, published or pretrained",
    "model.student.name=20": r"model\.student\.name=20 .* such as resnet20, or null",
    "model.student=resnet8": r"model\.student=resnet8 .* such as model\.student\.name=resnet20",
    "model.teacher=resnet20": r"model\.teacher=resnet20 .* such as model\.teacher\.name=resnet56, or null",
    "model.teacher=false": r"model\.teacher=false .* such as model\.teacher\.name=resnet56, or null",
    "model.student.weights=false": r"model\.student\.weights=false .* or a checkpoint, or null",
    "model.tuned=3": r"model\.tuned=3 .* keys with values, or null",
    "+model.student.nmae=resnet8": r"model\.student\.nmae is not known\. Did you mean model\.student\.name\?",
    "+model.teacher.weight=fit": r"model\.teacher\.weight is not known\. Did you mean model\.teacher\.weights\?",
    "+model.compiled=true": r"model\.compiled is not known\. Did you mean model\.compile\?",
    "~model.compile": r"model\.compile is required; omit ~model\.compile; it must be auto, true or false",
    # loss
    "loss.alpha=abc": r"loss\.alpha=abc is not allowed; it must be a finite number >= 0",
    "loss.alpha=-1": r"loss\.alpha=-1 is not allowed; it must be a finite number >= 0",
    "loss.alpha=nan": r"loss\.alpha=nan .* finite number >= 0",
    "loss.alpha=inf": r"loss\.alpha=inf .* finite number >= 0",
    "loss.alpha=null": r"loss\.alpha=null .* finite number >= 0",
    "loss.alpha=[1,2]": r"loss\.alpha=\[1,2\] .* finite number >= 0",
    "loss.alpha=true": r"loss\.alpha=true .* finite number >= 0",
    "loss.temperature=0": r"loss\.temperature=0 .* finite number > 0",
    "loss.temperature=hot": r"loss\.temperature=hot .* finite number > 0",
    "loss.confidence_temperature=0": r"loss\.confidence_temperature=0 .* finite number > 0",
    "loss.mask=x": r"loss\.mask=x is not allowed; choose 'ge'",
    "loss.logit_standardization=maybe": r"loss\.logit_standardization=maybe .* true or false",
    "loss.warmup_epochs=0": r"loss\.warmup_epochs=0 .* >= 1 \(1 is no warm-up\)",
    "loss.warmup_epochs=2.5": r"loss\.warmup_epochs=2\.5 .* whole number",
    "loss.ce_weight=-1": r"loss\.ce_weight=-1 .* finite number >= 0",
    "loss.alpha=0 loss.beta=0 loss.ce_weight=0": r"all weights of the loss are 0, .* nothing to minimise; set one",
    "+loss.gamma=1": r"RLDLoss takes no gamma: remove it",
    "+loss.betta=1": r"RLDLoss takes no betta: remove it \('~loss\.betta'\)",
    "loss._target_=rld_lightning.losses.RDLLoss": r"rld_lightning\.losses has no RDLLoss\. Did you mean 'RLDLoss'",
    "loss._target_=nowhere.Loss": r"loss\._target_=nowhere\.Loss does not exist: No module named 'nowhere'",
    # recipe
    "recipe.epochs=0": r"recipe\.epochs=0 is not allowed; it must be a whole number >= 1, such as recipe\.epochs=240",
    "recipe.epochs=null": r"recipe\.epochs=null is not allowed; it must be a whole number >= 1",
    "recipe.epochs=2.5": r"recipe\.epochs=2\.5 is not allowed; it must be a whole number >= 1",
    "recipe.epochs=-1": r"recipe\.epochs=-1 is not allowed; it must be a whole number >= 1",
    "\"recipe.epochs='5'\"": r"recipe\.epochs='5' is not allowed; it must be a whole number >= 1",
    "recipe.epochs=": r"recipe\.epochs='' is not allowed",
    "recipe.epochs=ten": r"recipe\.epochs=ten is not allowed",
    "recipe.epochs=1e3": r"recipe\.epochs=1000\.0 is not allowed",
    "'recipe.epochs=${nowhere}'": r"recipe\.epochs has no value: Interpolation key 'nowhere' not found",
    "+recipe.epoch=3": r"recipe\.epoch is not known\. Did you mean recipe\.epochs\?",
    "+recipe.lr=3": r"recipe\.lr is not known\. Did you mean recipe\.optimizer\.lr\?",
    "recipe.batch_size=0": r"recipe\.batch_size=0 .* whole number >= 1",
    "recipe.warmup_epochs=0": r"recipe\.warmup_epochs=0 .* whole number >= 1 \(1 is no warm-up\)",
    "recipe.warmup_epochs=-1": r"recipe\.warmup_epochs=-1 .* whole number >= 1",
    "recipe.scale_lr_from=0": r"recipe\.scale_lr_from=0 .* such as the batch size that lr is meant for, or null",
    "recipe.optimizer=adamw": r"recipe\.optimizer=adamw .* such as recipe\.optimizer\._target_=torch\.optim\.AdamW",
    "recipe.optimizer=null": r"recipe\.optimizer=null .* such as recipe\.optimizer\._target_=",
    "recipe.optimizer.lr=0": r"recipe\.optimizer\.lr=0 is not allowed; it must be a number > 0",
    "recipe.optimizer.lr=-0.1": r"recipe\.optimizer\.lr=-0\.1 .* a number > 0",
    "recipe.optimizer.lr=nan": r"recipe\.optimizer\.lr=nan .* a number > 0",
    "recipe.optimizer.lr=fast": r"recipe\.optimizer\.lr=fast .* a number > 0",
    "recipe.optimizer.lr=null": r"recipe\.optimizer\.lr=null .* a number > 0",
    "~recipe.optimizer.lr": r"recipe\.optimizer\.lr is required; omit ~recipe\.optimizer\.lr",
    "recipe.optimizer.momentum=2": r"recipe\.optimizer\.momentum=2 .* >= 0 and < 1",
    "recipe.optimizer.momentum=-0.9": r"recipe\.optimizer\.momentum=-0\.9 .* >= 0 and < 1",
    "recipe.optimizer.momentum=high": r"recipe\.optimizer\.momentum=high .* >= 0 and < 1",
    "recipe.optimizer.weight_decay=-1": r"recipe\.optimizer\.weight_decay=-1 .* >= 0",
    "recipe.optimizer.weight_decay=abc": r"recipe\.optimizer\.weight_decay=abc .* >= 0",
    "+recipe.optimizer.nesterov=maybe": r"recipe\.optimizer\.nesterov=maybe .* true or false",
    "+recipe.optimizer.betas=0.9": r"recipe\.optimizer\.betas=0\.9 .* a list of two numbers",
    "recipe.optimizer._target_=torch.optim.AdamW": r"AdamW takes no momentum: remove it \('~recipe\.optimizer\.mom",
    "recipe.optimizer._target_=torch.optim.Adamm": r"torch\.optim has no Adamm\. Did you mean 'Adam'",
    "recipe.optimizer._target_=adamw": r"recipe\.optimizer\._target_=adamw .* import path of a class",
    "recipe.optimizer._target_=3": r"recipe\.optimizer\._target_=3 .* import path of a class",
    "recipe.optimizer._partial_=false": r"recipe\.optimizer\._partial_=false .* must be true",
    "+recipe.optimizer.lrr=1": r"torch\.optim\.SGD takes no lrr: remove it",
    "recipe.scheduler=cosine": r"recipe\.scheduler=cosine .* such as recipe\.scheduler\._target_=",
    "recipe.scheduler.milestones=150": r"recipe\.scheduler\.milestones=150 .* a list of whole numbers .*\[150,",
    "recipe.scheduler.milestones=[1.5]": r"recipe\.scheduler\.milestones=\[1\.5\] .* a list of whole numbers",
    "recipe.scheduler.milestones=[0]": r"recipe\.scheduler\.milestones=\[0\] .* a list of whole numbers >= 1",
    "recipe.scheduler.gamma=-1": r"recipe\.scheduler\.gamma=-1 .* > 0",
    "recipe.scheduler.gamma=abc": r"recipe\.scheduler\.gamma=abc .* > 0",
    "recipe.scheduler._target_=torch.optim.lr_scheduler.CosineAnnealingLR +recipe.scheduler.T_max=2": (
        r"CosineAnnealingLR takes no milestones and no gamma: remove them \('~recipe\.scheduler\.milestones' '~"
    ),
    "recipe.scheduler._target_=torch.optim.lr_scheduler.CosineLR": r"lr_scheduler has no CosineLR\. Did you mean",
    "recipe.scheduler_interval=steps": r"recipe\.scheduler_interval=steps .* epoch or step",
    "recipe.scheduler_interval=2": r"recipe\.scheduler_interval=2 .* epoch or step",
    # trainer
    "trainer.max_epochs=0": r"trainer\.max_epochs=0 .* whole number >= 1",
    "trainer.max_epochs=2.5": r"trainer\.max_epochs=2\.5 .* whole number >= 1",
    "trainer.max_epochs=null": r"trainer\.max_epochs=null .* whole number >= 1",
    "trainer.max_steps=0": r"trainer\.max_steps=0 .* whole number >= 1, or -1 for no limit",
    "trainer.max_steps=-5": r"trainer\.max_steps=-5 .* or -1 for no limit",
    "trainer.max_steps=ten": r"trainer\.max_steps=ten .* or -1 for no limit",
    "trainer.max_steps=null": r"trainer\.max_steps=null .* or -1 for no limit",
    "trainer.check_val_every_n_epoch=0": r"trainer\.check_val_every_n_epoch=0 .* whole number >= 1",
    "trainer.accelerator=cup": r"trainer\.accelerator=cup .* auto, cpu, gpu",
    "trainer.accelerator=null": r"trainer\.accelerator=null .* auto, cpu, gpu",
    "trainer.devices=0": r"trainer\.devices=0 .* auto, a number of devices, or a list",
    "trainer.devices=-2": r"trainer\.devices=-2 .* auto, a number of devices",
    "trainer.devices=two": r"trainer\.devices=two .* auto, a number of devices",
    "trainer.devices=1.5": r"trainer\.devices=1\.5 .* auto, a number of devices",
    "trainer.devices=[]": r"trainer\.devices=\[\] .* auto, a number of devices",
    "trainer.num_nodes=0": r"trainer\.num_nodes=0 .* whole number >= 1",
    "trainer.strategy=3": r"trainer\.strategy=3 .* a text",
    "trainer.sync_batchnorm=maybe": r"trainer\.sync_batchnorm=maybe .* true or false",
    "trainer.precision=8": r"trainer\.precision=8 .* 32-true, bf16-mixed",
    "trainer.precision=fp16": r"trainer\.precision=fp16 .* 32-true, bf16-mixed",
    "trainer.gradient_clip_val=nan": r"trainer\.gradient_clip_val=nan .* >= 0, or null",
    "trainer.gradient_clip_val=-1": r"trainer\.gradient_clip_val=-1 .* >= 0, or null",
    "trainer.gradient_clip_val=abc": r"trainer\.gradient_clip_val=abc .* >= 0, or null",
    "trainer.deterministic=maybe": r"trainer\.deterministic=maybe .* true, false or warn",
    "trainer.log_every_n_steps=-1": r"trainer\.log_every_n_steps=-1 .* whole number >= 0",
    "trainer.num_sanity_val_steps=-2": r"trainer\.num_sanity_val_steps=-2 .* whole number >= -1",
    "+trainer.limit_train_batches=-1": r"trainer\.limit_train_batches=-1 .* a number of batches, or a share",
    "+trainer.limit_train_batches=1.5": r"trainer\.limit_train_batches=1\.5 .* a number of batches, or a share",
    "+trainer.accumulate_grad_batches=0": r"trainer\.accumulate_grad_batches=0 .* whole number >= 1",
    "+trainer.overfit_batches=lots": r"trainer\.overfit_batches=lots .* a number of batches",
    "+trainer.max_time=3": r"trainer\.max_time=3 .* such as 00:12:00:00",
    "+trainer.max_time=12h": r"trainer\.max_time=12h .* days:hours:minutes:seconds such as",
    "+trainer.gradient_clip_algorithm=max": r"trainer\.gradient_clip_algorithm=max .* norm or value",
    "+trainer.fast_dev_run=maybe": r"trainer\.fast_dev_run=maybe .* true or false",
    # callbacks and loggers
    "callbacks=null": r"callbacks=null .* callbacks=default, of which single ones .* callbacks\.<name>=null",
    "~callbacks": r"callbacks is required; omit ~callbacks",
    "logger=null": r"logger=null .* keys with values",
    "~logger": r"logger is required; omit ~logger",
    "~logger.csv": r"logger\.csv is required; omit ~logger\.csv; .* metrics\.csv",
    "logger.csv=null": r"logger\.csv=null .* such as logger=csv, which is required",
    "+callbacks.es={_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:val_loss}": (
        r"callbacks\.es\.monitor=val_loss is not logged; choose one of val/top1, val/ce"
    ),
    "callbacks.checkpoint_best.monitor=val/acc": r"checkpoint_best\.monitor=val/acc is not logged",
    "+callbacks.lr={_target_:lightning.pytorch.callbacks.LearningRateFinder}": (
        r"LearningRateFinder changes an attribute .* sweep over values instead: -m recipe\.optimizer\.lr="
    ),
    "+callbacks.bs={_target_:lightning.pytorch.callbacks.BatchSizeFinder}": r"BatchSizeFinder .* -m recipe\.batch_s",
    # paths, seed, resume
    "paths.data=null": r"paths\.data=null .* a text",
    "paths.teachers=3": r"paths\.teachers=3 .* a text",
    "\"paths.runs=' '\"": r"paths\.runs=' ' .* a text",
    "+paths.dat=/x": r"paths\.dat is not known\. Did you mean paths\.data\?",
    "seed=1.5": r"seed=1\.5 .* whole number from 0 to 4294967295",
    "seed=-1": r"seed=-1 .* whole number from 0 to 4294967295",
    "seed=4294967296": r"seed=4294967296 .* whole number from 0 to 4294967295",
    "seed=null": r"seed=null .* whole number from 0",
    "seed=random": r"seed=random .* whole number from 0",
    "seed=[0,1]": r"seed=\[0,1\] .* whole number from 0",
    "~seed": r"seed is required",
    "resume=true": r"resume=true .* such as resume=runs/\.\.\./last\.ckpt, or null",
    "resume=3": r"resume=3 .* such as resume=runs/\.\.\./last\.ckpt, or null",
    "print_config=maybe": r"print_config=maybe .* true, false or tree",
    "+epochs=3": r"epochs is not known\. Did you mean recipe\.epochs\?",
    "+lr=0.1": r"lr is not known\. Did you mean recipe\.optimizer\.lr\?",
    "+batchsize=8": r"batchsize is not known\. Did you mean recipe\.batch_size\?",
    "+max_epoch=8": r"max_epoch is not known\. Did you mean trainer\.max_epochs\?",
    "+teachers=x": r"teachers is not known\. Did you mean paths\.teachers or",
}  # fmt: skip
SCHEDULERS = "recipe.scheduler._target_=torch.optim.lr_scheduler."
OTHER_GROUPS = {
    ("recipe=quick", "recipe.scheduler.max_lr=0"): r"recipe\.scheduler\.max_lr=0 .* > 0",
    ("recipe=quick", f"{SCHEDULERS}CosineAnnealingLR +recipe.scheduler.T_max=2"): (
        r"CosineAnnealingLR takes no max_lr: remove it \('~recipe\.scheduler\.max_lr'\)"
    ),
    ("data=imagefolder", "seed=0"): r"data\.root has no value; add data\.root=\.\.\. to the command",
    ("data=imagefolder", "data.root=/x data.num_workers=-1"): r"data\.num_workers=-1 .* whole number >= 0 \(0 decodes",
    ("data=imagefolder", "data.root=/x data.num_workers=many"): r"data\.num_workers=many .* whole number >= 0",
    ("data=imagefolder", "data.root=/x data.image_size=0"): r"data\.image_size=0 .* whole number from 1 to 4096",
    ("data=imagefolder", "data.root=/x data.image_size=[32,32]"): r"data\.image_size=\[32,32\] .* from 1 to 4096",
    ("data=imagefolder", "data.root=/x data.test_fraction=1"): r"data\.test_fraction=1 .* > 0 and < 1, such as 0\.2",
    ("data=imagefolder", "data.root=/x data.decode=turbo"): r"data\.decode=turbo .* auto, pil or cuda",
    ("data=imagefolder", "data.root=/x data.bad_images=skip"): r"data\.bad_images=skip .* replace or error",
    ("data=shards", "data.root=/x data.mixed_shards=0"): r"data\.mixed_shards=0 .* whole number >= 1, or null",
    ("data=shards", "data.root=/x data.streams=0"): r"data\.streams=0 .* whole number >= 1",
    ("data=shards", "data.root=/x data.cache_gb=-1"): r"data\.cache_gb=-1 .* >= 0",
    ("data=digits", "data.image_size=0"): r"data\.image_size=0 .* whole number from 1 to 4096",
    ("loss=ce", "loss.ce_weight=0"): r"all weights of the loss are 0",
    ("loss=kd", "+loss.beta=1"): r"KDLoss takes no beta: remove it",
    ("loss=dist", "loss.beta=-1"): r"loss\.beta=-1 .* finite number >= 0",
    ("loss=[kd,at]", "loss.kd.weight=abc"): r"loss\.kd\.weight=abc .* finite number >= 0",
    ("loss=[kd,at]", "loss.weights.kd=abc"): r"loss\.weights=\{.*\} is not allowed",
    ("loss=[kd,at]", "loss.ce_weight=0 loss.weights.kd=0 loss.weights.at=0"): r"all weights of the loss are 0",
    ("loss=kd", "model.student.name=resnett20"): r"unknown model 'resnett20'\. Did you mean 'resnet20'",
    ("loss=kd", "model.student.name=resnet8@resnett20"): r"unknown model 'resnett20'",
    ("loss=kd", "model.teacher.name=torchvision/resnet3"): r"unknown model .* Did you mean 'torchvision/resnet34'",
    ("loss=kd", "model.student.weights=/dev/null/nowhere.pth"): r"there is no weights file at /dev/null/nowhere\.pth",
    ("loss=kd", "+model.teacher.start=/dev/null/nowhere.pth::ema"): r"no weights file at /dev/null/nowhere\.pth",
    ("loss=kd", "model.teacher.weights=/dev/null/nowhere.pth"): r"no teacher's weights file at .*/nowhere\.pth; give",
    ("eval", "weights=/dev/null/nowhere.pth"): r"there is no weights file at /dev/null/nowhere\.pth",
    ("eval", f"weights={__file__} name=resnett20"): r"unknown model 'resnett20'",
    ("logger=wandb", "logger.wandb.project=me/mine"): r"project=me/mine .* none of / .* \(the user or team is",
    ("logger=wandb", "logger.wandb.entity=me/mine"): r"entity=me/mine .* user or a team \(the project is",
    ("logger=wandb", "logger.wandb.entity=3"): r"logger\.wandb\.entity=3 .* the name of a user or a team",
    ("logger=wandb", "logger.wandb.tags=3"): r"tags=3 .* a text, or a list of tags such as \[first,second\]",
    ("logger=wandb", "logger.wandb.mode=sometimes"): r"logger\.wandb\.mode=sometimes .* online, offline, disabled or",
    ("logger=wandb", "logger.wandb.watch=grads"): r"watch=grads .* gradients, parameters or all, or null",
    ("logger=wandb", "logger.wandb.init_timeout=0"): r"logger\.wandb\.init_timeout=0 .* a number > 0",
    ("eval", "split=train"): r"split=train .* test or val",
    ("eval", "split=test"): r"weights has no value; add weights=\.\.\. to the command",
    ("eval", "weights=3"): r"weights=3 .* such as the directory of a run or of an export, student\.safetensors",
    ("eval", "weights=x name=20"): r"name=20 .* a text, or null",
    ("eval", "weights=x data.val_fraction=2"): r"data\.val_fraction=2 .* >= 0 and < 1",
}  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("name", "value"), [("WANDB_PROJECT", "a/b"), ("WANDB_ENTITY", "me/mine")])
def test_names_that_wandb_would_refuse_are_told_of_the_environment_too(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    check(base())  # without W&B
    said = told("seed=0", "logger=wandb")
    assert f"{name}={value} in the environment is not allowed; it must be the name of a" in said


@pytest.mark.parametrize("command", VALUES)
def test_a_value_of_the_wrong_type_or_range(command):
    assert re.search(VALUES[command], told(command))


@pytest.mark.parametrize(("group", "command"), OTHER_GROUPS)
def test_a_value_of_the_wrong_type_or_range_in_other_groups(group, command):
    assert re.search(OTHER_GROUPS[group, command], told(command, group))


# Mistakes of whole command lines, some of which Hydra would accept.
COMMANDS = {
    "epochs=3": r"epochs is not known\. Did you mean recipe\.epochs\?",
    "recipe.epohcs=3": r"recipe\.epohcs is not known\. Did you mean recipe\.epochs\?",
    "loss.alhpa=2 data.batchsize=3": r"loss\.alhpa .* loss\.alpha\?\n?.*data\.batchsize .* data\.batch_size",
    "loss=kd loss.beta=2": r"loss\.beta is not known; loss has .*temperature, warmup_epochs, weight\.",
    "+recipe.epochs=3": r"adds a key that exists already; write recipe\.epochs=3",
    "+model=resnet20": r"adds a key that exists already; write model=resnet20",
    "logger.wandb.project=x": r"logger\.wandb\.project is not known without logger=wandb; add",
    "model=resnet8 model.teacher.name=x": r"model\.teacher\.name is not known without model=pair",
    "callbacks=ema": r"none of callbacks=default.*callbacks=\[default,ema\]",
    "callbacks=[swa,early_stopping] logger=wandb": r"none of callbacks=default",
    "~foo": r"~foo removes a key that does not exist",
    "model=wrn40_3": r"model=wrn40_3 is not an option\. Did you mean 'wrn40_2'",
    "data=cifar10": r"data=cifar10 is not an option\. Did you mean 'cifar100'",
    "loss=rdl": r"loss=rdl is not an option\. Did you mean .*'rld'",
    "callbacks=[default,emma]": r"callbacks=emma is not an option\. Did you mean 'ema'\?",
    "recipe=fast": r"recipe=fast is not an option; choose one of adamw_cosine, cifar240,",
    "experiment=quikstart": r"experiment=quikstart is not an option\. Did you mean 'quickstart'",
    "sweep=rld_gird": r"sweep=rld_gird is not an option\. Did you mean 'rld_grid'",
    "launcher=slurm": r"launcher=slurm is not an option",
    "callbacks=null": r"callbacks=null is not an option; .* callbacks\.<name>=null",
    "model=null": r"model=null is not an option",
    "seed=0,1": r"seed=0,1 gives several values; add -m",
    "recipe.epochs": r"recipe\.epochs is not of the form key=value",
    "loss = rld": r"^loss = rld is not of the form key=value, without spaces; [^\n]*$",
    "data.root=/my photos": r"^photos is not of the form key=value.* quoted, as in 'data\.root=/my photos'",
    "=3": r"=3 is not of the form key=value",
    "loss=": r"loss= is not an option; choose one of at, .*rld",
    "-cd /no/such seed=0": r"^--config-dir=/no/such is not a folder\.$",
    "'data.root=/a=b, c (1)'": r"data\.root=/a=b, c \(1\) cannot be read: .* \"data\.root='/a=b, c \(1\)'\"",
    "loss.alpha=[1": r"loss\.alpha=\[1 cannot be read: close its brackets",
    "hydra.mode=often": r"hydra\.mode=often is not allowed: .*RUN, MULTIRUN",
    "hydra.job.chdir=maybe": r"hydra\.job\.chdir=maybe is not allowed: .* not a valid bool",
    "-m seed=0,1 recipe.epochs=0": r"recipe\.epochs=0 is not allowed",
    "-m recipe.epochs=0,1": r"recipe\.epochs=0 is not allowed",
    "recipe.epochs=abc seed=-1 loss.alpah=3": r"(?s)alpah.*seed=-1.*recipe\.epochs=abc",
    "-cd {own} experiment=torn": r"torn\.yaml, line 2 is not valid YAML: expected .*; correct it there",
    "-cd {own} experiment=typo": r"recipe\.epohcs is not known\. Did you mean recipe\.epochs\?",
    "-cd {own} experiment=names": r"recipe=nosuch \(named in a file, not on the command line\) is not an option; ",
    "--config-dir={own} experiment=typo": r"recipe\.epohcs is not known",
    "-cd {own} experiment=mine mine.wieght=1": r"mine\.wieght is not known. Did you mean mine\.weight\?",
}  # fmt: skip
OWN = {
    "torn": "a: [1, 2\nb: 3\n",
    "typo": "# @package _global_\nrecipe: { epohcs: 3 }\n",
    "mine": "# @package _global_\nmine: { weight: 3 }\n",
    "names": "# @package _global_\ndefaults:\n  - override /recipe: nosuch\n",
}


# Composing is slow: one of each kind by default.
BY_DEFAULT = ("epochs=3", "data=cifar10", "seed=0,1", "callbacks=null", "-cd {own} experiment=torn")


@pytest.mark.parametrize(
    "command", [pytest.param(line, marks=() if line in BY_DEFAULT else pytest.mark.slow) for line in COMMANDS]
)
def test_what_is_wrong_with_a_command_line(command, tmp_path):
    (tmp_path / "experiment").mkdir()
    for name, text in OWN.items():
        (tmp_path / "experiment" / f"{name}.yaml").write_text(text)
    GlobalHydra.instance().clear()
    with pytest.raises(UserError, match=COMMANDS[command]):
        checked(shlex.split(command.format(own=tmp_path)))


def test_what_a_resolver_raises_is_one_line():
    OmegaConf.register_new_resolver("raises", lambda: 1 / 0)
    with pytest.raises(UserError, match=r"^division by zero$"), user_errors():
        OmegaConf.create({"a": "${raises:}"}).a  # noqa: B018
    OmegaConf.clear_resolver("raises")


def test_what_a_run_has_no_need_of_may_be_elsewhere():
    check(with_value(base("loss=ce"), "model.teacher.weights=/dev/null/nowhere.pth"))
    check(with_value(base("loss=kd"), "model.student.name=my_package.module:build"))  # known only when it is called


@pytest.mark.slow
def test_what_is_right_is_left_alone():
    GlobalHydra.instance().clear()
    checked(["+tags=[a,b]", "+notes=text", "+recipe.mine=3", "recipe.epochs=${recipe.mine}", "trainer=cpu"])
    checked(["sweep=rld_grid", "-m", "trainer=cpu"])


@pytest.mark.slow
@pytest.mark.parametrize("group", ["data", "recipe", "experiment", "debug", "logger", "callbacks"])
def test_every_shipped_option_passes(group):
    for name in list_options(group):
        beside = f"[default,{name}]" if group == "callbacks" and name != "default" else name
        cfg = compose(f"{group}={beside}", "trainer=cpu", resolve=False)
        check(with_value(cfg, "data.root=/x"))
