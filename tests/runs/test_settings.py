"""Which settings make two runs different."""

import pytest
from helpers.configs import compose
from omegaconf import OmegaConf

from rld_lightning.runs.settings import affects_training, canonical, changes, differences, settings

DEFAULT = ("recipe=quick", "trainer.precision=32-true")
EMA = "{_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.99}"


def composed(*overrides):
    return settings(OmegaConf.to_container(compose(*DEFAULT, *overrides)))


@pytest.fixture(scope="module")
def plain():
    return composed()


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "overrides",
    [
        "+tags=[a,b]",
        "+notes=tried_again",
        "++trainer.profiler=simple",
        "++trainer.detect_anomaly=true",
        "++trainer.plugins=null",
        "++trainer.benchmark=true",
        "trainer.deterministic=true",
        "trainer.devices=2 trainer.strategy=ddp trainer.accelerator=gpu",
        "trainer.precision=32",
        "++trainer.accumulate_grad_batches=1 ++trainer.gradient_clip_algorithm=norm trainer.gradient_clip_val=0.0",
        "++trainer.limit_train_batches=1.0 ++trainer.limit_val_batches=null ++trainer.overfit_batches=0",
        "++trainer.enable_autolog_hparams=false trainer.log_every_n_steps=1 trainer.check_val_every_n_epoch=5",
        "logger=tensorboard print_config=false",
        "callbacks.progress=null callbacks.random_state=null callbacks.checkpoint_best=null callbacks.divergence=null",
        "++callbacks.throughput.window=5",
        "+callbacks.memory._target_=pytorch_lightning.callbacks.DeviceStatsMonitor",
        "+callbacks.top.{_target_: lightning.pytorch.callbacks.ModelCheckpoint, save_top_k: 3}",
    ],
)
def test_settings_without_effect_are_ignored(plain, overrides):
    key, brace, rest = overrides.partition(".{")
    lines = [f"{key}={{{rest}"] if brace else overrides.split()
    assert composed(*lines) == plain


def test_weights_are_equal_by_file_and_by_run_directory(tmp_path):
    (tmp_path / "student.safetensors").write_bytes(b"")
    by_file = composed(f"model.teacher.weights={tmp_path / 'student.safetensors'}")
    assert composed(f"model.teacher.weights={tmp_path}") == by_file
    cfg = compose(*DEFAULT, f"model.teacher.weights={tmp_path}")
    assert changes(by_file, cfg) == {}
    assert changes(by_file | {"model.teacher.weights": str(tmp_path)}, cfg) == {}  # as it was noted before
    elsewhere = str(tmp_path / "other")
    told = changes(by_file | {"model.teacher.weights": elsewhere}, cfg)
    assert told == {"model.teacher.weights": (elsewhere, str(tmp_path / "student.safetensors"))}
    assert canonical("model.teacher.weights", "x" * 5000).endswith("x" * 5000)  # no name that a file could have


def test_network_names_are_normalised(plain):
    assert composed("model.teacher.name=wrn_40_2", "model.student.name=WRN-16-2") == plain


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        (f"+callbacks.ema={EMA}", "callbacks", "EMAWeightAveraging(decay=0.99)"),
        ("callbacks=[default,ema]", "callbacks", "WeightAverage(decay=0.999, start=0)"),
        (
            "+callbacks.swa={_target_: lightning.pytorch.callbacks.StochasticWeightAveraging, swa_lrs: 0.01}",
            "callbacks",
            "StochasticWeightAveraging(swa_lrs=0.01)",
        ),
        (
            "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/top1, patience: 3}",
            "callbacks",
            "EarlyStopping(monitor=val/top1, patience=3)",
        ),
        (
            "+callbacks.prune={_target_: lightning.pytorch.callbacks.ModelPruning, pruning_fn: l1_unstructured}",
            "callbacks",
            "ModelPruning(pruning_fn=l1_unstructured)",
        ),
        (
            "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: train/loss, patience: 5, "
            "check_on_train_epoch_end: true, check_finite: true}",
            "callbacks",
            "EarlyStopping(check_finite=True, check_on_train_epoch_end=True, monitor=train/loss, patience=5)",
        ),
        ("+callbacks.mine._target_=my.package.ModelCheckpoint", "callbacks", "my.package.ModelCheckpoint()"),
        (
            "+callbacks.mine={_target_: my.Watcher, dirpath: '${paths.run}/x', seed: '${seed}'}",
            "callbacks",
            "my.Watcher(dirpath=<run>/x)",
        ),
        ("trainer.precision=bf16-mixed", "trainer.precision", "bf16-mixed"),
        ("trainer.gradient_clip_val=1.0", "trainer.gradient_clip_val", "1"),
        ("++trainer.accumulate_grad_batches=4", "trainer.accumulate_grad_batches", "4"),
        ("trainer.max_steps=60", "trainer.max_steps", "60"),
        ("trainer.max_epochs=5", "trainer.max_epochs", "5"),
        ("++trainer.limit_train_batches=1", "trainer.limit_train_batches", "1"),  # a batch, where 1.0 is all of them
        ("++trainer.limit_val_batches=0.5", "trainer.limit_val_batches", "0.5"),
        ("++trainer.overfit_batches=1", "trainer.overfit_batches", "1"),
        ("data.mixup=0.2", "data.mixup", "0.2"),
        ("data.cutmix=1", "data.cutmix", "1"),
        ("+data.mean=[0.5,0.5,0.5]", "data.mean", "[0.5, 0.5, 0.5]"),
        ("loss.label_smoothing=0.1", "loss.label_smoothing", "0.1"),
        ("trainer.sync_batchnorm=true", "trainer.sync_batchnorm", "True"),
        ("++trainer.unheard_of=3", "trainer.unheard_of", "3"),
        ("+unheard_of=3", "unheard_of", "3"),
    ],
)
def test_settings_with_a_possible_effect_keep_runs_apart(plain, override, key, value):
    other = composed(override)
    assert other[key] == value
    assert {key for key in plain | other if plain.get(key) != other.get(key)} == {key}


def test_max_epochs_equal_to_the_recipe_is_no_difference(plain):
    said, other = composed("recipe.epochs=7", "trainer.max_epochs=7"), composed("recipe.epochs=7")
    assert said == other
    assert {key for key in plain if plain[key] != said[key]} == {"recipe.epochs"}


def test_different_weight_averages_differ():
    first, second = (composed(f"+callbacks.ema={EMA.replace('0.99', decay)}") for decay in ("0.99", "0.999"))
    assert first != second


def test_pruned_trials_are_equal_wherever_the_study_is_stored():
    first, second = (
        {
            "_target_": "rld_lightning.callbacks.OptunaPruner",
            "storage": f"sqlite:///{name}.db",
            "overrides": [f"loss.alpha={name}"],
            "pruner": {"_target_": "optuna.pruners.MedianPruner", "n_warmup_steps": 3},
        }
        for name in "12"
    )
    assert settings({"callbacks": {"pruner": first}}) == settings({"callbacks": {"pruner": second}})
    second["pruner"]["n_warmup_steps"] = 4
    assert settings({"callbacks": {"pruner": first}}) != settings({"callbacks": {"pruner": second}})
    assert settings({"callbacks": {"pruner": first}}) != settings({"callbacks": {}})


def test_missing_settings_of_older_runs_mean_the_default(plain):
    older = OmegaConf.to_container(compose(*DEFAULT))
    for key in ("callbacks", "print_config"):
        del older[key]
    for key in ("sync_batchnorm", "max_steps", "num_nodes", "gradient_clip_val"):
        del older["trainer"][key]
    del older["loss"]["label_smoothing"], older["data"]["mixup"], older["data"]["cutmix"]
    assert settings(older) == plain


def test_run_is_not_resumed_with_other_callbacks():
    plain, average = (OmegaConf.to_container(compose(*DEFAULT, *more)) for more in ((), (f"+callbacks.ema={EMA}",)))
    assert differences(plain, average) == {"callbacks": ("None", "EMAWeightAveraging(decay=0.99)")}


@pytest.mark.parametrize(
    "config",
    [
        *({"callbacks": None}, {"callbacks": {"a": None, "b": "text"}}, {"callbacks": "text"}, {"trainer": None}),
        {"callbacks": {"a": {"_target_": "mine.A"}}, "paths": "text"},
    ],
)
def test_invalid_configuration_is_no_traceback(config):
    settings(config)


def test_overrides_are_classified_by_key(plain):
    watchers = compose("logger=csv").callbacks
    assert not any(affects_training(f"callbacks.{name}") for name in watchers)
    assert plain["callbacks"] == "None"
    assert affects_training("callbacks.ema._target_")
    assert affects_training("trainer.precision")
    assert not affects_training("trainer.profiler")
    assert not affects_training("tags")
