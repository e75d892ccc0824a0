"""Options without a file: each registered network is ``model=<name>``, each registered loss ``loss=<name>``.

They are in Hydra's ConfigStore, where ``--help``, completion and Hydra's messages find them. A file of the same name in
``conf/`` replaces an option.
"""

import json
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from rld_lightning.errors import did_you_mean
from rld_lightning.hydra.registered_names import known
from rld_lightning.package_files import package_folder

CONF = package_folder("conf")

_PLUGINS = "hydra_plugins.rld_lightning_sweepers"
_SWEEPERS: dict[str, dict[str, Any]] = {
    "basic": {"_target_": f"{_PLUGINS}.GridSweeper", "max_batch_size": None, "params": {}},
    "optuna": {
        "defaults": [{"sampler": "tpe"}],
        "_target_": f"{_PLUGINS}.OptunaSweeper",
        "_recursive_": False,  # the sampler of a resumed study gets another seed
        "study_name": "${hydra.job.name}",
        "storage": "sqlite:///${hydra.sweep.dir}/study.db",  # to resume an interrupted sweep
        "direction": "maximize",
        "n_trials": 20,
        "n_jobs": 1,
        "params": {},
    },
}
_SAMPLERS: dict[str, dict[str, Any]] = {
    # constant_liar: parallel trials try different values.
    "tpe": {"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 10, "constant_liar": True, "seed": None},
    "random": {"_target_": "optuna.samplers.RandomSampler", "seed": None},
    "grid": {"_target_": "optuna.samplers.GridSampler", "seed": None},
}
_LAUNCHERS: dict[str, dict[str, Any]] = {
    "joblib": {
        "_target_": "hydra_plugins.rld_lightning_launchers.SideBySideLauncher",
        "n_jobs": "${trials_at_once:${trainer.accelerator},${trainer.devices}}",
    },
}
_SMALL_LR = ("mobilenetv2", "shufflev1", "shufflev2")  # trained with a learning rate of 0.01 in the literature


class _NotCopied(dict[str, Any]):
    """A dict that ``deepcopy`` does not copy. Nodes are copied when they are read, so none is modified."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_NotCopied":
        return self


def register_options() -> None:
    """Adds all generated options to Hydra's store; call it again after registering a network or a loss.

    Raises:
        ValueError: see :func:`tunable_losses`.
    """
    store = ConfigStore.instance()
    if not isinstance(store.repo, _NotCopied):  # Hydra copies it for each group in its help, which takes seconds
        store.repo = _NotCopied(store.repo)
    for group, options in (("model", network_options()), ("loss", tunable_losses())):
        for name in options.keys() - _files(group):
            store.store(group=group, name=name, node=options[name])
    Plugins.instance()  # registers the plugins' configs first: later ones of the same name would replace ours
    ours = {"hydra/sweeper": _SWEEPERS, "hydra/sweeper/sampler": _SAMPLERS, "hydra/launcher": _LAUNCHERS}
    for group, options in ours.items():
        for name, node in options.items():
            store.store(group=group, name=name, node=node)


def list_options(group: str) -> list[str]:
    """Returns the options of a group, from files and generated, in alphabetical order."""
    generated = {"model": network_options, "loss": tunable_losses}
    return sorted(_files(group) | set(generated[group]() if group in generated else ()))


def network_options() -> dict[str, dict[str, Any]]:
    """Returns the option of each registered network, by name, as a file in ``conf/model`` would define it."""
    small_lr = {"tuned": {"lr": 0.01}}
    return {
        name: {"defaults": ["single"], "student": {"name": name}} | (small_lr if name in _SMALL_LR else {})
        for name in known().models
    }


def tunable_losses() -> dict[str, dict[str, Any]]:
    """Returns all losses by name, registered ones and ``conf/loss_presets.yaml``'s, with values that a pair can set.

    ``beta: 8.0`` of ``rld`` becomes ``${tuned:rld.beta,8.0}``: the value of ``model.tuned.rld.beta``, or 8. Experiments
    and the command line override it.

    Raises:
        ValueError: a preset's ``of`` is not a loss before it.
    """
    presets = yaml.safe_load((CONF / "loss_presets.yaml").read_text()) or {}
    registered = {name: _with_recipe_warmup(options) for name, options in known().losses.items()}
    losses = {name: _tunable(name, options) for name, options in registered.items() if name not in presets}
    for name, stated in presets.items():
        if (of := stated.pop("of", None)) not in losses:
            raise ValueError(
                f"{name} of conf/loss_presets.yaml starts from of={of}, which is not a loss before it."
                f"{did_you_mean(str(of), losses)}"
            )
        base = losses[of]
        options = registered.get(name, {})
        new = {key: value for key, value in options.items() if key == "_target_" or key not in base}
        losses[name] = _tunable(name, base | new | stated)
    return losses


def _with_recipe_warmup(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the number of warm-up epochs from the recipe, if the loss has a warm-up by default."""
    return options | ({"warmup_epochs": "${recipe.warmup_epochs}"} if options.get("warmup_epochs", 1) != 1 else {})


def _tunable(name: str, options: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value if key == "_target_" else f"${{tuned:{name}.{key},{_in_interpolation(value)}}}"
        for key, value in options.items()
    }


def _in_interpolation(value: Any) -> str:
    is_interpolation = isinstance(value, str) and value.startswith("${")
    return value if is_interpolation else json.dumps(value)


def _files(group: str) -> set[str]:
    return {path.stem for path in (CONF / group).glob("*.yaml")}
