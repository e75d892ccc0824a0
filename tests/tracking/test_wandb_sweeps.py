"""W&B sweeps in conf/wandb_sweeps: the commands of W&B's own agent compose."""

from itertools import product

import hydra
import pytest
import wandb.wandb_agent
import yaml
from helpers.configs import CONF, compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import load_sweep_config

FILES = sorted((CONF / "wandb_sweeps").glob("*.yaml"))


def corners(sweep):
    """Returns all settings of a grid; for ranges both ends and typical values."""
    values = {
        name: space.get("values") or [space["min"], 0.30298531721275555, space["max"]]
        for name, space in sweep["parameters"].items()
    }
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


@pytest.fixture
def command_of(monkeypatch, tmp_path):
    """Returns the command that wandb's agent runs for a trial, by the agent's own code, without starting anything."""
    started = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc123")
    monkeypatch.setenv("WANDB_RUN_ID", "set by the agent")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "set by the agent")
    monkeypatch.setattr(wandb.wandb_agent, "AgentProcess", lambda **options: started.append(options) or DummyProcess())

    def command(sweep, settings):
        agent = wandb.wandb_agent.Agent.__new__(wandb.wandb_agent.Agent)
        agent._sweep_command, agent._function, agent._in_jupyter = list(sweep["command"]), None, False
        agent._run_processes, agent._forward_signals = {}, False
        arguments = {name: {"value": value} for name, value in settings.items()}
        agent._command_run({"run_id": "xyz789", "program": sweep["program"], "args": arguments})
        return started[-1]["command"], started[-1]["env"]

    return command


class DummyProcess:
    last_sigterm_time = None


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_command_of_the_agent_trains_rld_on_a_held_out_part(file, command_of, monkeypatch):
    sweep = load_sweep_config(str(file))
    settings = corners(sweep)[-1]
    command, environment = command_of(sweep, settings)
    assert command[:3] == ["/usr/bin/env", "python", "scripts/fit.py"]
    assert (CONF.parent / sweep["program"]).exists()
    assert not [argument for argument in command if argument.startswith(("-", "${"))]
    monkeypatch.setenv("WANDB_RUN_ID", environment["WANDB_RUN_ID"])
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("fit", command[3:], return_hydra_config=True)
    assert cfg.hydra.run.dir == "runs/sweeps/wandb-abc123/xyz789"
    assert cfg.data.val_fraction == 0.1
    assert set(cfg.logger) == {"csv", "wandb"}
    assert cfg.logger.wandb.project == sweep["project"]
    assert cfg.loss._target_ == "rld_lightning.losses.RLDLoss"
    assert {name: OmegaConf.select(cfg, name) for name in settings} == settings


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_setting_is_parsed_by_hydra_unchanged(file):
    sweep = yaml.safe_load(file.read_text())
    parser = hydra.core.override_parser.overrides_parser.OverridesParser.create()
    for settings in corners(sweep):
        for override in parser.parse_overrides([f"{name}={value}" for name, value in settings.items()]):
            assert override.value() == settings[override.key_or_group]


def test_search_spaces_equal_those_of_the_sweeps_without_wandb():
    grid, bayes = (
        yaml.safe_load((CONF / "wandb_sweeps" / f"rld_{name}.yaml").read_text()) for name in ("grid", "bayes")
    )
    local = {name: yaml.safe_load((CONF / "sweep" / f"rld_{name}.yaml").read_text()) for name in ("grid", "optuna")}
    params = {name: sweep["hydra"]["sweeper"]["params"] for name, sweep in local.items()}
    for name, values in params["grid"].items():
        assert grid["parameters"][name]["values"] == [float(value) for value in str(values).split(",")]
    for name, interval in params["optuna"].items():
        space = bayes["parameters"][name]
        assert f"interval({space['min']}, {space['max']})" in interval
        assert ("log" in interval) == (space["distribution"] == "log_uniform_values")
    assert bayes["run_cap"] == local["optuna"]["hydra"]["sweeper"]["n_trials"]


def test_metric_is_logged_once_per_epoch_and_trials_are_stopped_after_warm_up():
    for file in FILES:
        sweep = yaml.safe_load(file.read_text())
        assert sweep["metric"] == {"name": "val/top1_best", "goal": "maximize"}
    bayes = yaml.safe_load((CONF / "wandb_sweeps" / "rld_bayes.yaml").read_text())
    stops, recipe = bayes["early_terminate"], compose("recipe=cifar240").recipe
    assert stops["type"] == "hyperband"
    assert recipe.warmup_epochs < stops["min_iter"] < recipe.scheduler.milestones[0]
