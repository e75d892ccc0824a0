"""Options that need no file: each registered network is a ``model=<name>``, each registered loss a ``loss=<name>``.

They lie in Hydra's store, where ``--help``, completion and Hydra's messages find them. A file of that name in ``conf/``
takes an option's place.
"""

import json
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from rld_lightning.errors import did_you_mean
from rld_lightning.hydra.registered_names import known
from rld_lightning.shipped import shipped

CONF = shipped("conf")

_PLUGINS = "hydra_plugins.rld_lightning_sweepers"
_SWEEPERS: dict[str, dict[str, Any]] = {
    "basic": {"_target_": f"{_PLUGINS}.GridSweeper", "max_batch_size": None, "params": {}},
    "optuna": {
        "defaults": [{"sampler": "tpe"}],
        "_target_": f"{_PLUGINS}.OptunaSweeper",
        "_recursive_": False,  # the sampler of a study that goes on gets another seed
        "study_name": "${hydra.job.name}",
        "storage": "sqlite:///${hydra.sweep.dir}/study.db",  # so that an interrupted sweep goes on
        "direction": "maximize",
        "n_trials": 20,
        "n_jobs": 1,
        "params": {},
    },
}
_SAMPLERS: dict[str, dict[str, Any]] = {
    # By constant_liar trials side by side do not try the same.
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
_SMALL_RATE = ("mobilenetv2", "shufflev1", "shufflev2")  # the literature trains them with a learning rate of 0.01


class _Shared(dict[str, Any]):
    """A store that copies of it share. Nodes are copied when they are read, so that nothing writes into them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self


def register_options() -> None:
    """Puts all generated options into Hydra's store; once more after a network or a loss has been registered.

    Raises:
        ValueError: see :func:`tunable_losses`.
    """
    store = ConfigStore.instance()
    if not isinstance(store.repo, _Shared):  # Hydra copies it for each group that its help lists, which takes seconds
        store.repo = _Shared(store.repo)
    for group, options in (("model", network_options()), ("loss", tunable_losses())):
        for name in options.keys() - _files(group):
            store.store(group=group, name=name, node=options[name])
    Plugins.instance()  # these come first, because Hydra's own and others of the name would take our place
    own = {"hydra/sweeper": _SWEEPERS, "hydra/sweeper/sampler": _SAMPLERS, "hydra/launcher": _LAUNCHERS}
    for group, options in own.items():
        for name, node in options.items():
            store.store(group=group, name=name, node=node)


def list_options(group: str) -> list[str]:
    """The options of a group, those in files and those that are generated, in alphabetical order."""
    generated = {"model": network_options, "loss": tunable_losses}
    return sorted(_files(group) | set(generated[group]() if group in generated else ()))


def network_options() -> dict[str, dict[str, Any]]:
    """A single model for each registered network, by name: what a file in ``conf/model`` would hold."""
    small_rate = {"tuned": {"lr": 0.01}}
    return {
        name: {"defaults": ["single"], "student": {"name": name}} | (small_rate if name in _SMALL_RATE else {})
        for name in known().models
    }


def tunable_losses() -> dict[str, dict[str, Any]]:
    """All losses by name, registered ones and those of ``conf/loss_presets.yaml``, with each value open to a pair.

    ``beta: 8.0`` of ``rld`` becomes ``${tuned:rld.beta,8.0}``: what ``model.tuned.rld.beta`` says, else 8. Experiments
    and the command line put their own in the place of that.

    Raises:
        ValueError: a preset does not say which loss it starts from.
    """
    presets = yaml.safe_load((CONF / "loss_presets.yaml").read_text()) or {}
    registered = {name: _warmed_up(options) for name, options in known().losses.items()}
    losses = {name: _open_to_pairs(name, options) for name, options in registered.items() if name not in presets}
    for name, stated in presets.items():
        if (of := stated.pop("of", None)) not in losses:
            raise ValueError(
                f"{name} of conf/loss_presets.yaml starts from of={of}, which is not a loss before it."
                f"{did_you_mean(str(of), losses)}"
            )
        base = losses[of]
        own = registered.get(name, {})
        new = {key: value for key, value in own.items() if key == "_target_" or key not in base}
        losses[name] = _open_to_pairs(name, base | new | stated)
    return losses


def _warmed_up(options: dict[str, Any]) -> dict[str, Any]:
    """A loss's options; one that warms up by itself warms up as long as the recipe says."""
    return options | ({"warmup_epochs": "${recipe.warmup_epochs}"} if options.get("warmup_epochs", 1) != 1 else {})


def _open_to_pairs(name: str, options: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value if key == "_target_" else f"${{tuned:{name}.{key},{_in_interpolation(value)}}}"
        for key, value in options.items()
    }


def _in_interpolation(value: Any) -> str:
    is_interpolation = isinstance(value, str) and value.startswith("${")
    return value if is_interpolation else json.dumps(value)


def _files(group: str) -> set[str]:
    return {path.stem for path in (CONF / group).glob("*.yaml")}
