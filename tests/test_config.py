"""The configs: everything composes, what they name exists, and mistakes are explained."""

import inspect
import re
from functools import cache

import hydra
import pytest
from helpers.configs import CONF, IMAGENET_PAIRS, LOSSES, MOBILE, PAIRS, SINGLES, TEMPLATES, compose
from helpers.scripts import run_script
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

from rld_lightning.hydra import options
from rld_lightning.hydra.compose import expand_combined_loss, flags_first, set_run_folder
from rld_lightning.hydra.options import list_options, register_options
from rld_lightning.losses import DistillationLoss, LogitLoss, kd_loss, register_loss, registry
from rld_lightning.models import list_models
from rld_lightning.models.teacher.teacher_store import PUBLISHED_URL
from rld_lightning.runs.naming import loss_choice, loss_name
from rld_lightning.tasks.run.make import make_trainer


@cache
def unresolved(*overrides):
    return OmegaConf.to_container(compose(*overrides, resolve=False))


@cache
def choices_of(group):
    """All options of a group, by name, composed at once."""
    names = {"model": [*PAIRS, *TEMPLATES, *SINGLES], "loss": LOSSES}[group]
    return unresolved(*(f"+{group}@choices.{name}={name}" for name in names))["choices"]


@cache
def combined(recipe="cifar240", **choices):
    """A config of a model, optionally a loss, and a recipe, from cached parts instead of a composition for each."""
    cfg = {group: choices_of(group)[name] for group, name in choices.items()}
    cfg = OmegaConf.create(cfg | {"recipe": unresolved(f"recipe={recipe}")["recipe"]})
    OmegaConf.resolve(cfg.loss if "loss" in cfg else cfg)
    return cfg


def pair(name):
    return combined(model=name)


def loss_of(model, loss, recipe="cifar240"):
    return combined(recipe, model=model, loss=loss).loss


@pytest.mark.parametrize(
    "choices", [{"model": "vgg13_to_mobilenetv2", "loss": "dkd_ls"}, {"model": "resnet34_to_resnet18"}]
)
def test_combined_configs_equal_hydras(choices):
    cfg, expected = combined(**choices), compose(*(f"{group}={name}" for group, name in choices.items()))
    for group in ["loss"] if "loss" in choices else ["model", "recipe"]:
        assert cfg[group] == expected[group]


def teachers_and_students(names):
    return {(pair(name).model.teacher.name, pair(name).model.student.name) for name in names}


def test_the_fourteen_pairs_of_the_benchmark_and_two_of_older_tables_exist():
    assert teachers_and_students(set(PAIRS) - set(IMAGENET_PAIRS)) == {
        ("resnet32x4", "resnet8x4"), ("vgg13", "vgg8"), ("wrn40_2", "wrn40_1"), ("wrn40_2", "wrn16_2"),
        ("resnet56", "resnet20"), ("resnet110", "resnet32"), ("resnet110", "resnet20"),
        ("resnet32x4", "shufflev2"), ("resnet32x4", "wrn16_2"), ("resnet32x4", "wrn40_2"),
        ("wrn40_2", "resnet8x4"), ("wrn40_2", "mobilenetv2"), ("vgg13", "mobilenetv2"), ("resnet50", "mobilenetv2"),
        ("resnet32x4", "shufflev1"), ("wrn40_2", "shufflev1"),
    }  # fmt: skip


def test_the_two_pairs_of_imagenet_have_torchvisions_teachers():
    assert teachers_and_students(IMAGENET_PAIRS) == {
        ("torchvision/resnet34", "torchvision/resnet18"), ("torchvision/resnet50", "mobilenetv1"),
    }  # fmt: skip
    assert {pair(name).model.teacher.weights for name in IMAGENET_PAIRS} == {"pretrained"}
    assert {pair(name).model.teacher.weights for name in PAIRS if name not in IMAGENET_PAIRS} == {"auto"}


@pytest.mark.parametrize("name", PAIRS)
def test_small_students_start_at_a_small_learning_rate(name):
    lr = 0.01 if pair(name).model.student.name in MOBILE else 0.05
    assert pair(name).recipe.optimizer.lr == lr


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name):
    cfg = loss_of("wrn40_2_to_wrn16_2", name)
    loss = instantiate(cfg)
    assert isinstance(loss, DistillationLoss)
    if isinstance(loss, LogitLoss) and name != "atkd":  # it always standardizes
        assert isinstance(cfg.logit_standardization, bool)


@pytest.mark.thinned(6)
@pytest.mark.parametrize("model", PAIRS)
def test_every_pair_with_the_losses_that_are_tuned_for_pairs(model):
    cfg = pair(model)
    # Labels are folder names, so they do not contain the library's name.
    plain = [name.removeprefix("torchvision/") for name in (cfg.model.teacher.name, cfg.model.student.name)]
    assert cfg.model.label == (model if model in IMAGENET_PAIRS else "_to_".join(plain))
    for loss in LOSSES:
        assert isinstance(instantiate(loss_of(model, loss)), DistillationLoss)


def test_losses_combine_in_a_list():
    cfg = compose("loss.weights.at=0.5", "loss=[rld_ls, at]", "loss.at.weight=10", "loss.ce_weight=0.5")
    loss = instantiate(cfg.loss)
    assert (loss.weights, loss.ce_weight) == ({"rld_ls": 1.0, "at": 0.5}, 0.5)
    assert (loss.losses["rld_ls"].logit_standardization, loss.losses["at"].weight) == (True, 10)
    assert loss_name(cfg.loss) == "rld_ls+at"
    assert expand_combined_loss(["seed=1", "loss=rld"]) == ["seed=1", "loss=rld"]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("loss=kd -m seed=0,1", "-m loss=kd seed=0,1"),
        ("loss=kd --cfg job ~data.padding seed=1", "--cfg job loss=kd ~data.padding seed=1"),
        ("a=1 --config-dir runs/seed=1 b=2", "--config-dir runs/seed=1 a=1 b=2"),
        ("a=1 --config-dir=x -m b=2,3 --help", "--config-dir=x --help"),
        ("a=1 b=2", "a=1 b=2"),
    ],
)
def test_flags_may_stand_anywhere(given, read):
    assert flags_first(given.split()) == read.split()


def test_cfg_with_multirun_is_refused():
    with pytest.raises(ValueError, match=r"--cfg shows one configuration, and -m means several"):
        flags_first(["-m", "seed=0,1", "--cfg", "job"])


def test_paths_run_sets_hydras_run_directory():
    assert set_run_folder(["seed=1", "paths.run=x/paths.run=y"]) == ["seed=1", "hydra.run.dir=x/paths.run=y"]
    for left in (["-m", "paths.run=x"], ["paths.run=x", "hydra.run.dir=y"], ["paths.runs=x"]):
        assert set_run_folder(left) == left


@pytest.mark.parametrize("flags", [["-m"], ["--cfg", "job"], []])
def test_a_list_of_losses_expands_after_the_flags(flags):
    expanded = expand_combined_loss([*flags, "seed=1", "loss=[kd,at]"])
    assert expanded[: len(flags)] == flags
    names = ["+loss@loss.kd=kd", "+loss@loss.at=at", "+loss.weights.kd=1.0", "+loss.weights.at=1.0"]
    assert expanded[len(flags) :] == [*names, "seed=1", "loss=combined"]


@pytest.mark.parametrize(
    "loss", ["loss=[]", "loss=[rld]", "loss=[rld,]", "loss=[rld,rld]", "loss=kd,[kd,swap]", 'loss=["kd","swap"]']
)
def test_invalid_lists_of_losses_are_refused(loss):
    with pytest.raises(ValueError, match=r"is not a combination of losses: write loss=\[rld,at\]"):
        expand_combined_loss(["-m", loss])


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", [name for name in LOSSES if "_" not in name or name == "mlkd_noaug"])
def test_configured_values_are_the_defaults_of_the_class(name):
    cfg = loss_of("pair", name)
    defaults = {}
    for cls in reversed(type(instantiate(cfg)).__mro__):
        if "__init__" in vars(cls):
            defaults |= {key: p.default for key, p in inspect.signature(cls.__init__).parameters.items()}
    values = {key: value for key, value in cfg.items() if key not in ("_target_", "warmup_epochs")}
    assert values == {key: defaults[key] for key in values}


NOT_CONFIGURED = {
    "shuffle",  # for tests
    "strong_view",  # set by the loss
    "self", "options",
}  # fmt: skip
OF_OTHERS = {"imagenet": {"name", "split_file", "test_fraction"}}  # ImageNet has its own name and test split


@pytest.mark.parametrize("name", list_options("data"))
def test_options_of_a_data_set_need_no_plus_and_have_the_defaults_of_its_class(name):
    cfg = dict(unresolved(f"data={name}")["data"])
    defaults = {}
    for cls in reversed(hydra.utils.get_class(cfg.pop("_target_")).__mro__):
        if "__init__" in vars(cls) and cls.__module__.startswith("rld_lightning"):
            defaults |= {key: p.default for key, p in inspect.signature(cls.__init__).parameters.items()}
    assert set(defaults) - NOT_CONFIGURED - OF_OTHERS.get(name, set()) == set(cfg) - {"_convert_"}
    for key in ("flip", "padding", "download", "url", "name"):
        assert key not in cfg or cfg[key] == defaults[key]


def test_a_run_folder_is_named_after_the_losses():
    assert loss_choice("rld_ls", compose("loss=rld_ls").loss) == "rld_ls"
    assert loss_choice("combined", compose("loss=[rld_ls, at]").loss) == "rld_ls+at"


@pytest.mark.parametrize("name", ["rld_reviewkd", "rld_crd"])
def test_experiments_with_features(name):
    loss = instantiate(compose(f"experiment={name}", "recipe.warmup_epochs=7").loss)
    assert list(loss.losses) == name.split("_")
    assert (loss.ce_weight, loss.losses["rld"].warmup_epochs) == (1.0, 7)


def test_reversed_distillation():
    cfg = compose("experiment=reversed", "loss=dkd")
    assert (cfg.model.teacher.name, cfg.model.student.name, cfg.loss.beta) == ("resnet56", "wrn40_2", 8.0)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("model", SINGLES)
def test_every_single_model(model):
    cfg = compose(f"model={model}", "loss=ce")
    assert cfg.model.student.name in list_models()
    assert cfg.model.teacher is None
    assert cfg.recipe.optimizer.lr == (0.01 if cfg.model.student.name in MOBILE else 0.05)


def test_every_published_model_has_a_configuration():
    assert {choices_of("model")[single]["student"]["name"] for single in SINGLES} == set(list_models())


def test_the_command_line_overrides_a_pairs_settings():
    mobile = compose("model=wrn40_2_to_mobilenetv2", "loss=dkd")
    assert (mobile.recipe.optimizer.lr, mobile.loss.beta) == (0.01, 6.0)
    assert compose("model=wrn40_2_to_mobilenetv2", "loss=dkd", "loss.beta=3", "recipe.optimizer.lr=0.1").loss.beta == 3
    assert compose("model=resnet56_to_resnet20", "loss=dkd").loss.beta == 2.0
    assert compose("model=resnet32x4_to_resnet8x4", "loss=dkd").loss.beta == 8.0


OWN_FILES = {
    "model/my_pair.yaml": """
defaults: [pair]
teacher: { name: resnet20 }
student: { name: resnet8 }
tuned:
  mine: { sharpness: 3, layers: [b], sign: null, extra: { depth: 2 }, ce_weight: 0.5, warmup_epochs: 4 }
  rld: { confidence_temperature: 2.0, mask: g, alpha: 3.0 }
  rld_ls: { alpha: 5.0 }
  at: { power: 3.0 }
""",
    "experiment/mine.yaml": """
# @package _global_
defaults:
  - override /model: my_pair
loss: { sharpness: 1, sign: plus }
""",
}


class MyLoss(LogitLoss):
    def __init__(
        self,
        sharpness: float = 1.0,
        *,
        layers: tuple[str, ...] = ("a", "b"),
        sign: str | None = "minus",
        extra: dict | None = None,
        ce_weight: float = 1.0,
        warmup_epochs: int = 20,
    ) -> None:
        super().__init__(ce_weight=ce_weight, warmup_epochs=warmup_epochs)
        self.values = sharpness, list(layers), sign, extra

    function = staticmethod(kd_loss)


@pytest.fixture
def compose_own(monkeypatch, tmp_path):
    """Composes with a user's loss, pair and experiment."""
    register_options()  # before the store is patched
    monkeypatch.setitem(ConfigStore.instance().repo, "loss", {})
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    register_loss("mine")(MyLoss)
    register_options()
    for name, text in OWN_FILES.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    return lambda *overrides: compose(f"hydra.searchpath=[{tmp_path}]", *overrides)


def test_a_pair_can_set_every_value_of_any_loss(compose_own):
    own = compose_own("loss=mine").loss
    assert (instantiate(own).values, own.warmup_epochs) == ((1.0, ["a", "b"], "minus", None), 20)
    assert compose_own("loss=mine", "recipe.warmup_epochs=7").loss.warmup_epochs == 7
    own = compose_own("model=my_pair", "loss=mine").loss
    assert instantiate(own).values == (3, ["b"], None, {"depth": 2})
    assert (own.ce_weight, own.warmup_epochs) == (0.5, 4)
    assert compose_own("model=my_pair", "loss=at").loss.power == 3.0
    assert compose_own("model=my_pair", "loss=[mine,at]").loss.mine.sharpness == 3


def test_a_preset_inherits_a_pairs_settings_for_its_base_loss(compose_own):
    values = compose_own("model=my_pair", "loss=rld").loss
    assert (values.alpha, values.beta, values.confidence_temperature, values.mask) == (3.0, 8.0, 2.0, "g")
    values = compose_own("model=my_pair", "loss=rld_ls").loss
    assert (values.alpha, values.beta, values.confidence_temperature, values.mask) == (5.0, 72.0, 2.0, "g")
    assert compose_own("model=my_pair", "loss=rld_mcd").loss.alpha == 0.0
    assert compose_own("model=my_pair", "loss=rld_g", "+model.tuned.rld_g.beta=7").loss.beta == 7


def test_an_experiment_overrides_a_pair_and_the_command_line_both(compose_own):
    own = compose_own("experiment=mine", "loss=mine").loss
    assert (own.sharpness, own.sign, own.layers) == (1, "plus", ["b"])
    own = compose_own("experiment=mine", "loss=mine", "loss.sharpness=2", "loss.layers=[c]", "loss.ce_weight=1.0").loss
    assert (own.sharpness, own.sign, own.layers, own.ce_weight) == (2, "plus", ["c"], 1.0)


def test_a_file_replaces_a_generated_option(monkeypatch, tmp_path):
    register_options()  # before the store is patched
    monkeypatch.setattr(options, "CONF", tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "resnet8.yaml").touch()
    (tmp_path / "loss_presets.yaml").write_text("{}")
    for group in ("model", "loss"):
        monkeypatch.setitem(ConfigStore.instance().repo, group, {})
    register_options()
    stored = ConfigStore.instance().repo["model"]
    assert "resnet14.yaml" in stored
    assert "resnet8.yaml" not in stored
    assert "resnet8" in options.list_options("model")


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("mine: { of: rdl }", r"mine of conf/loss_presets.yaml starts from of=rdl, .* Did you mean 'rld'"),
        ("mine: { beta: 1.0 }", "starts from of=None"),
    ],
)
def test_a_preset_of_an_unknown_loss_is_refused(monkeypatch, tmp_path, preset, words):
    monkeypatch.setattr(options, "CONF", tmp_path)
    (tmp_path / "loss_presets.yaml").write_text(preset)
    with pytest.raises(ValueError, match=words):
        register_options()


@pytest.mark.parametrize("model", [*PAIRS, "imagenet_pair"])
def test_every_setting_of_a_pair_reaches_its_loss(model):
    tuned = dict(pair(model).model.tuned or {})
    assert tuned.pop("lr", 0.01) == 0.01
    assert tuned.pop("epochs", {"mlkd": 960}) == {"mlkd": 960}  # used by a recipe
    for name, settings in tuned.items():
        loss = loss_of(model, name)
        assert {key: loss[key] for key in settings} == settings, name


# METHODS C2, from the names of LSKD's released logs: KD's temperature and weight; DKD's, and its beta.
LSKD = {
    "resnet32x4_to_resnet8x4": ((2, 9), (2, 9, 8)),
    "vgg13_to_vgg8": ((3, 9), (2, 15, 2)),
    "wrn40_2_to_wrn40_1": ((2, 9), (2, 12, 2)),
    "wrn40_2_to_wrn16_2": ((2, 9), (2, 12, 2)),
    "resnet56_to_resnet20": ((2, 9), (3, 18, 2)),
    "resnet110_to_resnet32": ((2, 9), (2, 15, 2)),
    "resnet110_to_resnet20": ((4, 12), (2, 15, 2)),
    "resnet32x4_to_shufflev2": ((2, 9), (2, 9, 8)),
    "resnet32x4_to_wrn16_2": ((3, 9), (2, 9, 2)),
    "resnet32x4_to_wrn40_2": ((3, 9), (2, 9, 8)),
    "wrn40_2_to_resnet8x4": ((2, 9), (2, 18, 2)),
    "wrn40_2_to_mobilenetv2": ((3, 9), (2, 15, 2)),
    "vgg13_to_mobilenetv2": ((3, 9), (3, 9, 2)),
    "resnet50_to_mobilenetv2": ((3, 1), (2, 15, 2)),
}


@pytest.mark.parametrize("model", sorted(set(PAIRS) - set(IMAGENET_PAIRS)))
def test_standardized_logits_have_the_settings_of_the_released_logs(model):
    kd, (temperature, weight, beta) = LSKD.get(model, ((2, 9), (2, 9, 8)))
    settings = loss_of(model, "kd_ls")
    assert (settings.temperature, settings.weight, settings.ce_weight) == (*kd, 0.1)
    settings = loss_of(model, "dkd_ls")
    assert (settings.temperature, settings.alpha, settings.beta) == (temperature, weight, weight * beta)
    settings = loss_of(model, "rld_ls")
    assert (settings.temperature, settings.alpha, settings.beta) == (2, 9, 72)
    # The file has only values that differ from the option's.
    default = {name: loss_of("pair", name) for name in ("kd_ls", "dkd_ls")}
    for name in default:
        tuned = (pair(model).model.tuned or {}).get(name, {})
        assert not {key: value for key, value in tuned.items() if value == default[name][key]}


OLDER_PAIRS = {  # METHODS D and the code of CAT-KD, ReviewKD and DTKD
    "resnet32x4_to_shufflev1": {"catkd": {"weight": 600, "pool_size": 4, "normalize": True}, "reviewkd": {"weight": 5}},
    "wrn40_2_to_shufflev1": {
        "catkd": {"weight": 80, "pool_size": 4, "normalize": True},
        "reviewkd": {"weight": 5},
        "dtkd": {"dtkd_weight": 2, "kd_weight": 0.5},
    },
}


@pytest.mark.parametrize("model", OLDER_PAIRS)
def test_pairs_with_shufflev1_have_the_published_settings(model):
    for name, expected in (OLDER_PAIRS[model] | {"dkd": {"alpha": 1, "beta": 8, "temperature": 4}}).items():
        settings = loss_of(model, name)
        assert {key: settings[key] for key in expected} == expected


# Settings for ImageNet in METHODS and the methods' code: one value for both pairs, or one for each.
IMAGENET = {
    "rld": {"alpha": 1, "beta": (0.5, 2), "temperature": 1, "ce_weight": 1, "confidence_temperature": None},
    "rld_reference": {"beta": (0.5, 2), "temperature": 1, "confidence_temperature": 1},
    "rld_scd": {"alpha": 1, "beta": 0, "temperature": 1},
    "rld_ls": {"alpha": 9, "beta": (4.5, 18), "temperature": 2},
    "kd": {"temperature": 1, "weight": 0.5, "ce_weight": (1, 0.5)},
    "kd_ls": {"temperature": 2, "weight": 9, "ce_weight": 1},
    "dkd": {"alpha": 1, "beta": (0.5, 2), "temperature": 1, "ce_weight": 1},
    "dkd_ls": {"alpha": 9, "beta": (4.5, 18), "temperature": 2},
    "nkd": {"gamma": 1.5, "temperature": 1},
    "dist": {"beta": 2, "gamma": 2, "temperature": 1, "ce_weight": 1},
    "ctkd": {"weight": 1, "ce_weight": 1, "curriculum_epochs": 5},
    "normkd": {"temperature": 1, "weight": 0.5, "ce_weight": 0.5},
    "mlkd": {"temperature": 1, "weight": 0.5, "ce_weight": 0.5},
    "swap": {"temperature": 1, "weight": 1, "ce_weight": 0},
    "rc": {"temperature": 1, "kd_weight": 1, "rc_weight": 0.1, "ce_weight": 1},
    "ofd": {"weight": 1e-4},
    "reviewkd": {"weight": (1, 8), "warmup_epochs": 1, "student_preactivations": True},
    "crd": {"weight": 0.8},
}
IMAGENET_RESNETS = {  # published for the ResNet pair only
    "eakd": {"temperature": 1, "weight": 0.5, "entropy_temperature": 2, "entropy_bound": None, "ce_weight": 1},
    "eadkd": {"beta": 0.5, "temperature": 1, "entropy_temperature": 3, "entropy_bound": None},
    "dhkd": {"head": "linear", "align_gradients": False, "weight": 0.1, "temperature": 2},
    "catkd": {"weight": 0.5, "pool_size": 4, "normalize": False},
}


@pytest.mark.parametrize("loss", [*IMAGENET, *IMAGENET_RESNETS])
def test_losses_have_the_published_settings_on_imagenet(loss):
    for position, model in enumerate(IMAGENET_PAIRS[: 2 if loss in IMAGENET else 1]):
        expected = (IMAGENET | IMAGENET_RESNETS)[loss]
        expected = {key: value[position] if isinstance(value, tuple) else value for key, value in expected.items()}
        settings = loss_of(model, loss, "imagenet100")
        assert {key: settings[key] for key in expected} == expected
        assert settings.get("warmup_epochs", 1) == 1


def test_imagenets_settings_can_be_overridden_and_apply_in_combinations():
    model = "model=resnet34_to_resnet18"
    cfg = compose(model, "loss=rld", "loss.beta=3", "loss.temperature=2")
    assert (cfg.loss.beta, cfg.loss.temperature) == (3, 2)
    assert compose(model, "loss=rld", "model.tuned.rld.beta=3").loss.beta == 3
    assert compose(model, "loss=[rld,ofd]").loss.rld.beta == 0.5
    assert compose(model, "loss=[rld,ofd]").loss.ofd.weight == 1e-4
    own = ("model.teacher.name=timm/convnext_tiny", "model.student.name=torchvision/resnet18")
    cfg = compose("model=imagenet_pair", *own, "loss=rld")
    assert (cfg.loss.temperature, cfg.loss.beta, cfg.model.teacher.weights) == (1, 0.5, "pretrained")


# Any pair: the common settings; otherwise those of ResNet34 > ResNet18, but the other pair's weight of CE with KD.
ANY_IMAGENET_PAIR = {
    name: {key: value[name == "kd"] if isinstance(value, tuple) else value for key, value in settings.items()}
    for name, settings in IMAGENET.items()
}


@pytest.mark.parametrize("loss", ANY_IMAGENET_PAIR)
def test_any_pair_on_imagenet_has_settings_of_imagenet(loss):
    settings = loss_of("imagenet_pair", loss, "imagenet100")
    assert {key: settings[key] for key in ANY_IMAGENET_PAIR[loss]} == ANY_IMAGENET_PAIR[loss]


def test_student_preactivations_are_used_on_imagenet_only():
    assert not any(loss_of(model, "reviewkd").student_preactivations for model in set(PAIRS) - set(IMAGENET_PAIRS))


def test_rld_takes_one_temperature_and_the_reference_takes_two():
    assert compose("loss=rld").loss.confidence_temperature is None
    assert compose("loss=rld_reference").loss.confidence_temperature == 1.0
    loss = instantiate(compose("loss=rld", "loss.alpha=2", "loss.beta=4", "loss.temperature=3").loss)
    assert (loss.alpha, loss.beta, loss.temperature, loss.warmup_epochs) == (2, 4, 3, 20)


def test_cifar240_is_the_literatures_recipe():
    recipe = compose("recipe=cifar240").recipe
    assert (recipe.epochs, recipe.batch_size, recipe.warmup_epochs) == (240, 64, 20)
    assert dict(recipe.optimizer) == {
        "_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4,
    }  # fmt: skip
    assert (recipe.scheduler.milestones, recipe.scheduler.gamma) == ([150, 180, 210], 0.1)


@pytest.mark.parametrize(
    ("model", "epochs", "lr"),
    [("wrn40_2_to_wrn16_2", 480, 0.025), ("vgg13_to_mobilenetv2", 480, 0.01), ("resnet32x4_to_shufflev2", 960, 0.01)],
)
def test_mlkd_has_its_own_recipe(model, epochs, lr):
    recipe = compose(f"model={model}", "loss=mlkd", "recipe=mlkd").recipe
    assert (recipe.epochs, recipe.optimizer.lr, recipe.scheduler.milestones) == (epochs, lr, [150, 180, 210])


def test_ldrld_and_simkd_have_their_own_recipes():
    ldrld = compose("loss=ldrld", "recipe=ldrld").recipe
    assert (ldrld.epochs, ldrld.scheduler.warmup, ldrld.scheduler.milestones) == (240, 20, [150, 180, 210])
    simkd = compose("model=resnet34_to_resnet18", "recipe=imagenet120").recipe
    assert (simkd.epochs, simkd.batch_size, simkd.optimizer.lr) == (120, 256, 0.1)
    assert simkd.scheduler.milestones == [30, 60, 90]
    for name in ("mlkd", "ldrld"):
        own = hydra.utils.get_class(compose(f"loss={name}", resolve=False).loss._target_).own_recipe
        assert own == name
        assert (CONF / "recipe" / f"{own}.yaml").exists()


def test_imagenet100_is_the_literatures_recipe():
    recipe = compose("recipe=imagenet100", "data=imagefolder", "data.root=/data").recipe
    assert (recipe.epochs, recipe.batch_size, recipe.warmup_epochs) == (100, 512, 1)
    assert dict(recipe.optimizer) == {
        "_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.2, "momentum": 0.9, "weight_decay": 1e-4,
    }  # fmt: skip
    assert (recipe.scheduler.milestones, recipe.scheduler.gamma) == ([30, 60, 90], 0.1)


@pytest.mark.parametrize("name", [path.stem for path in (CONF / "data").glob("*.yaml")])
def test_every_data_set(name):
    data = instantiate(compose(f"data={name}", "data.root=/data" if name != "digits" else "seed=1").data)
    assert data.batch_size == 64


WITH_TOTAL_STEPS = ("quick", "adamw_cosine", "finetune", "patient")  # schedules that get the number of steps


@pytest.mark.parametrize("recipe", [path.stem for path in (CONF / "recipe").glob("*.yaml")])
def test_every_recipe(recipe):
    import torch

    cfg = compose(f"recipe={recipe}")
    optimizer = instantiate(cfg.recipe.optimizer)([torch.nn.Parameter(torch.zeros(1))])
    scheduler = instantiate(cfg.recipe.scheduler)
    assert scheduler(optimizer, **({"total_steps": 10} if recipe in WITH_TOTAL_STEPS else {}))
    assert cfg.trainer.max_epochs == cfg.recipe.epochs


@pytest.mark.parametrize("name", ["auto", "cpu", "ddp_cpu"])
def test_every_trainer_without_a_gpu(name):
    trainer = make_trainer(compose(f"trainer={name}").trainer, logger=False, enable_checkpointing=False)
    assert isinstance(trainer, Trainer)
    assert trainer.world_size == (2 if name == "ddp_cpu" else 1)


@pytest.mark.parametrize(
    ("debug", "flag", "value"),
    [("fast", "fast_dev_run", True), ("overfit", "overfit_batches", 1), ("anomaly", "_detect_anomaly", True),
     ("profile", "limit_train_batches", 50)],
)  # fmt: skip
def test_every_way_to_debug(debug, flag, value):
    trainer = make_trainer(compose(f"debug={debug}", "trainer=cpu").trainer, logger=False)
    assert getattr(trainer, flag) == value
    assert (type(trainer.profiler).__name__ == "SimpleProfiler") == (debug == "profile")


def test_null_is_lightnings_default_of_every_trainer_flag():
    flags = compose("trainer=cpu").trainer
    ours, theirs = make_trainer(flags, logger=False), Trainer(accelerator="cpu", logger=False)
    known = inspect.signature(Trainer).parameters
    assert set(flags) <= {*known, "_target_"}
    for flag in (key for key, value in flags.items() if value is None and hasattr(theirs, key)):
        assert type(getattr(ours, flag)) is type(getattr(theirs, flag)), flag
    assert not {"accumulate_grad_batches", "limit_train_batches", "limit_test_batches", "profiler", "max_time"} - set(
        flags
    )


@pytest.mark.parametrize("name", ["gpu", "ddp"])
def test_gpu_trainers(name):
    cfg = compose(f"trainer={name}").trainer
    assert cfg.accelerator == "gpu"
    assert cfg.use_distributed_sampler is False


@pytest.mark.parametrize("name", [path.stem for path in (CONF / "callbacks").glob("*.yaml")])
def test_every_callback(name):
    assert all(map(instantiate, compose(f"callbacks={name}").callbacks.values()))


def test_callbacks_combine_and_early_stopping_uses_held_out_images():
    cfg = compose("callbacks=[default,ema,early_stopping]")
    assert {"checkpoint_last", "average", "early_stopping"} <= set(cfg.callbacks)
    assert cfg.data.val_fraction == 0.1
    assert compose("callbacks=[default,early_stopping]", "data.val_fraction=0").data.val_fraction == 0
    assert compose("callbacks=[default,swa]").callbacks.average.decay is None


def test_csv_is_always_logged_and_loggers_combine():
    for names in ("csv", "tensorboard", "mlflow", "[mlflow,tensorboard]"):
        assert set(compose(f"logger={names}").logger) == {"csv", *names.strip("[]").split(",")}
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("fit", ["logger=[csv,wandb]", "data=digits"])  # resolving needs a run
    assert set(cfg.logger) == {"csv", "wandb"}
    assert cfg.logger.wandb.group == "digits-wrn40_2_to_wrn16_2-recipe"
    assert "wandb_examples" in cfg.callbacks
    assert "wandb_examples" not in compose().callbacks


def test_experiments():
    cfg = compose("experiment=quickstart")
    assert (cfg.data._target_.split(".")[-1], cfg.model.teacher.weights) == ("DigitsDataModule", "fit")


@pytest.mark.parametrize("group", ["experiment", "debug", "sweep", "launcher"])
def test_a_typo_in_an_optional_group_is_refused(group):
    with pytest.raises(MissingConfigException, match=f"Could not find '{group}/quikstart'"):
        compose(f"{group}=quikstart")


def test_scripts_without_a_recipe_have_their_own_batch_size():
    for name in ("eval", "shards"):
        cfg = compose("data=digits", name=name, resolve=False)
        assert "recipe" not in cfg
        assert cfg.data.batch_size == 64
        assert compose("data=digits", "data.batch_size=32", name=name, resolve=False).data.batch_size == 32
    assert compose("recipe=imagenet100").data.batch_size == 512
    assert compose("recipe.batch_size=16").data.batch_size == 16
    assert compose("recipe.batch_size=16", "data.batch_size=8").data.batch_size == 8


def test_the_published_teachers_have_one_address():
    assert pair(PAIRS[0]).model.teacher.published_url == PUBLISHED_URL


def test_a_typo_ends_in_our_message_without_hydras():
    result = run_script("fit.py", "loss.alhpa=2", "data.batchsize=3", "--cfg", "job", check=False)
    assert result.returncode == 2
    assert result.stdout.startswith("error: loss.alhpa is not known. Did you mean loss.alpha?")
    assert "data.batchsize is not known. Did you mean data.batch_size" in result.stdout
    assert result.stderr == ""


@pytest.mark.slow
def test_help_lists_generated_options_and_the_configuration_shows_plain_numbers():
    text = run_script("fit.py", "--help").stdout
    assert set(SINGLES) | set(LOSSES) <= set(re.findall(r"\w+", text))
    shown = ("--cfg", "job", "--resolve", "--package", "loss")
    result = run_script("fit.py", "model=wrn40_2_to_wrn16_2", "loss=dkd", *shown)
    assert "beta: 6.0\n" in result.stdout


def compose_with_hydra(*overrides):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("fit", list(overrides), return_hydra_config=True)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "sweep").glob("*.yaml")))
def test_every_sweep(name):
    if "optuna" in name:
        pytest.importorskip("optuna")
    cfg = compose_with_hydra(f"sweep={name}", "hydra.sweep.dir=/sweep")
    assert cfg.hydra.mode.name == "MULTIRUN"
    for key in cfg.hydra.sweeper.params:
        assert OmegaConf.select(cfg, key) is not None
    if "optuna" in name:
        sampler = instantiate(cfg.hydra.sweeper.sampler)
        assert type(sampler).__name__ == "TPESampler"
        assert cfg.hydra.sweeper.storage == "sqlite:////sweep/study.db"
        assert cfg.hydra.sweeper.direction == "maximize"
        assert cfg.hydra.sweeper.study_name
        pruner = OmegaConf.to_container(cfg.callbacks.pruner, resolve=False)
        assert type(instantiate(pruner["pruner"])).__name__ == "MedianPruner"


def test_a_study_is_stored_in_the_sweeps_folder():
    cfg = compose_with_hydra("hydra/sweeper=optuna", "hydra.sweep.dir=/sweep")
    assert cfg.hydra.sweeper.storage == "sqlite:////sweep/study.db"


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "launcher").glob("*.yaml")))
def test_every_launcher(name):
    plugin = {"joblib": "rld_lightning_launchers", "submitit_slurm": "hydra_submitit_launcher"}[name]
    pytest.importorskip(f"hydra_plugins.{plugin}")
    assert f".{plugin}." in compose_with_hydra(f"launcher={name}").hydra.launcher._target_
