"""The text of --help."""

import re

import pytest
import yaml
from helpers.configs import CONF, LOSSES, PAIRS, SINGLES

from rld_lightning.hydra.help import WIDTH, options_help, script_help, values_help


@pytest.fixture(scope="module")
def text():
    return options_help("fit")


def test_all_options_are_listed_in_lines_of_80_columns(text):
    words = set(re.findall(r"[\w/]+", text))
    assert words >= {*LOSSES, *SINGLES, *PAIRS, "pair", "single", "digits", "rld_optuna", "joblib", "combined"}
    assert all(len(line) <= WIDTH for line in text.splitlines())
    assert len(text.splitlines()) < 120


def test_losses_and_networks_are_listed_by_family_with_a_description(text):
    logits, features = (text.index(family) for family in ("  On logits\n", "  On features\n"))
    assert logits < text.index("    rld            Refined Logit Distillation\n") < features
    assert features < text.index("    crd            Contrastive representation distillation\n")
    assert "    rld_mcd_g      rld alpha=0.0 mask=g\n" in text
    assert "    eadkd          DKD, samples weighted by entropy\n" in text
    assert "  Wide residual networks\n    wrn16_1, wrn16_2," in text


def test_groups_that_a_script_does_not_use_are_not_listed(text):
    groups = re.findall(r"^(\w+)(?:=\w+)?$", text, re.MULTILINE)
    assert groups[:4] == ["data", "model", "loss", "recipe"]
    assert set(groups) < {path.name for path in CONF.iterdir()}
    assert not {"wandb_sweeps", "parts", "hydra"} & set(groups)
    assert re.findall(r"^(\w+)=", options_help("eval"), re.MULTILINE) == ["data", "trainer", "paths"]


@pytest.mark.parametrize("script", ["fit", "export", "predict", "cost", "demo", "eval", "shards"])
def test_a_scripts_values_are_listed_with_their_defaults(script):
    text = values_help(script)
    own = yaml.safe_load((CONF / f"{script}.yaml").read_text())
    expected = {
        key
        for key, value in own.items()
        if key not in ("defaults", "hydra") and not isinstance(value, dict) and "$" not in str(value)
    }
    assert expected <= set(re.findall(r"^ +(\w+)=", text, re.MULTILINE))
    assert all(len(line) <= WIDTH for line in text.splitlines())
    assert script_help(script).startswith(f"Values with their defaults (...: required):\n\n{text}\n\n")
    assert "${script_help:" + script + "}" in (CONF / f"{script}.yaml").read_text()


def test_required_values_long_values_and_headings():
    text = values_help("export")
    assert "    run=...           the directory of a finished run\n" in text
    assert "    formats=[safetensors,onnx,torch_export]\n                      also: onnx_int8, which" in text
    assert "\n  Only if the file does not contain them, or to override it:\n    name=null " in values_help("predict")
    assert "\n    batch_size=64\n" in values_help("predict")
